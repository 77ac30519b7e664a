"""Initial weights: their sizes, on every layout the same, and muP's promise that widths behave alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.model.init import init_weights, initial_value, lr_scale
from llm.model.transformer import Transformer
from llm.train.optim import build
from llm.utils.config import ModelConfig, TrainConfig


def shape(width: int = 64, **changes: Any) -> ModelConfig:
    values = {
        "name": "t", "vocab_size": 64, "dim": width, "n_layers": 2, "n_heads": width // 16, "n_kv_heads": width // 16,
        "ffn_dim": 2 * width, "max_seq_len": 32, "mup_base_dim": 64,
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


def test_matrices_norms_and_biases_start_as_they_should() -> None:
    config = shape(256, n_layers=8, qkv_bias=True)
    std = {
        "embedding.weight": 0.02,
        "head.weight": 256**-0.5,
        "blocks.3.attention.wq.weight": 256**-0.5,
        "blocks.3.attention.wo.weight": 256**-0.5 / 4,  # sqrt(2 x 8 layers)
        "blocks.3.ffn.down.weight": 512**-0.5 / 4,
    }
    model = Transformer(config)
    init_weights(model, 0, config)
    found = dict(model.named_parameters())
    for name, expected in std.items():
        assert float(found[name].std()) == pytest.approx(expected, rel=0.03), name
    assert torch.equal(found["norm.weight"], torch.ones(256))
    assert torch.equal(found["blocks.0.attention.wq.bias"], torch.zeros(256))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_from_the_meta_device_is_the_same(tied: bool) -> None:
    config = shape(tie_embeddings=tied)
    plain = Transformer(config)
    with torch.device("meta"):
        empty = Transformer(config)
    empty.to_empty(device="cpu")
    empty.tie()
    for model in (plain, empty):
        init_weights(model, 5, config)
    assert (empty.head.weight is empty.embedding.weight) == tied
    ours, theirs = dict(empty.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_value_depends_on_seed_and_name_alone() -> None:
    config = shape()
    first = initial_value("blocks.0.attention.wq.weight", (64, 64), 0, config)
    assert torch.equal(first, initial_value("blocks.0.attention.wq.weight", (64, 64), 0, config))
    assert not torch.equal(first, initial_value("blocks.0.attention.wq.weight", (64, 64), 1, config))
    assert not torch.equal(first, initial_value("blocks.1.attention.wq.weight", (64, 64), 0, config))


def moved(width: int, init: str) -> tuple[float, float]:
    """How much the logits and the stream of a model of ``width`` change over a few steps, root mean square."""
    torch.manual_seed(0)
    config = shape(width, init=init)
    model = Transformer(config)
    init_weights(model, 0, config)
    train = TrainConfig(max_steps=9, seq_len=32, global_batch_size=8, micro_batch_size=8, lr=0.02, weight_decay=0.0)
    optimizer = build(dict(model.named_parameters()), train, config)
    seen: list[torch.Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    tokens = torch.randint(0, 64, (8, 33), generator=torch.Generator().manual_seed(1))
    before = model(tokens[:, :-1]).detach()
    for _ in range(4):
        losses = model(tokens[:, :-1], tokens[:, 1:])
        (losses[0] / 256).backward()
        optimizer.step(train.lr)
        optimizer.zero_grad()
    after = model(tokens[:, :-1]).detach()
    return float((after - before).square().mean() ** 0.5), float((seen[-1] - seen[0]).square().mean() ** 0.5)


def test_under_mup_updates_move_every_width_alike() -> None:
    narrow, wide = moved(64, "mup"), moved(512, "mup")
    for thin, thick in zip(narrow, wide, strict=True):
        assert 0.4 < thick / thin < 2.5
    plain = moved(64, "depth_scaled"), moved(512, "depth_scaled")
    assert plain[1][0] / plain[0][0] > 2 * wide[0] / narrow[0]  # without it they grow apart


def test_learning_rates_by_width() -> None:
    config = shape(256, init="mup")
    assert lr_scale("blocks.0.ffn.up.weight", (512, 256), config) == 0.25
    assert lr_scale("embedding.weight", (64, 256), config) == 1.0
    assert lr_scale("blocks.0.ffn_norm.weight", (256,), config) == 1.0
    assert lr_scale("blocks.0.ffn.up.weight", (512, 256), shape(256)) == 1.0
