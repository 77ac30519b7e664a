"""The decoder: shapes, positions, grouped heads, initial weights."""

from __future__ import annotations

import pytest
import torch

from llm.estimate.parameters import parameter_count
from llm.model.init import init_weights, initial_value
from llm.model.transformer import Transformer
from llm.utils.config import ModelConfig


def shape(**changes: object) -> ModelConfig:
    values = {
        "name": "t",
        "vocab_size": 50,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 48,
        "max_seq_len": 16,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.set_num_threads(1)
    model = Transformer(config)
    init_weights(model, seed, config)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_logits_and_parameter_count(kv: int, tied: bool) -> None:
    config = shape(n_kv_heads=kv, tie_embeddings=tied)
    model = build(config)
    assert model(torch.zeros(3, 16, dtype=torch.long)).shape == (3, 16, 50)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config)
    assert (model.head.weight is model.embedding.weight) == tied


def test_the_tiny_model_has_the_published_size() -> None:
    tiny = shape(vocab_size=256, dim=128, n_layers=4, ffn_dim=352, max_seq_len=256)
    assert parameter_count(tiny) == 803_968


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="max_seq_len=16"):
        build(shape())(torch.zeros(1, 17, dtype=torch.long))


def test_no_position_sees_a_later_one() -> None:
    model = build(shape())
    tokens = torch.randint(0, 50, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 50
    torch.testing.assert_close(model(tokens)[:, :9], model(changed)[:, :9])
    assert not torch.equal(model(tokens)[:, 9], model(changed)[:, 9])


def test_grouped_heads_equal_repeated_heads() -> None:
    grouped, full = build(shape(n_kv_heads=2)), build(shape(n_kv_heads=4))
    full.load_state_dict(
        {
            name: value.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
            if name.endswith(("wk.weight", "wv.weight"))
            else value
            for name, value in grouped.state_dict().items()
        }
    )
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(grouped(tokens), full(tokens))


def test_initial_weights_follow_the_seed_and_the_depth() -> None:
    first, again, other = build(shape(), 1), build(shape(), 1), build(shape(), 2)
    for name, value in first.named_parameters():
        assert torch.equal(value, again.get_parameter(name))
        assert value.dim() < 2 or not torch.equal(value, other.get_parameter(name))
    inner = initial_value("blocks.0.attention.wq.weight", (256, 256), 0, shape(n_layers=8))
    residual = initial_value("blocks.0.attention.wo.weight", (256, 256), 0, shape(n_layers=8))
    assert inner.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert residual.std().item() == pytest.approx(1 / 16 / 4, rel=0.02)
