"""Exported shapes, names and weights mean the same to Hugging Face's transformers: equal logits, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.checkpoint.format import CheckpointError
from llm.model.init import init_weights
from llm.model.transformer import Transformer
from llm.tools.hf_config import hf_config
from llm.tools.hf_names import recognise, to_hf
from llm.utils.config import ModelConfig, RopeScaling

LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=16)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=16)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("LlamaForCausalLM", {"n_kv_heads": 4}),
    "llama 3": ("LlamaForCausalLM", {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_embeddings": True}),
    "llama with biases": ("LlamaForCausalLM", {"qkv_bias": True, "out_bias": True, "ffn_bias": True}),
    "yarn": ("LlamaForCausalLM", {"rope_scaling": YARN}),
    "qwen 2": ("Qwen2ForCausalLM", {"qkv_bias": True, "norm_eps": 1e-6}),
    "qwen 2 with a window": ("Qwen2ForCausalLM", {"qkv_bias": True, "window": 7}),
    "qwen 3": ("Qwen3ForCausalLM", {"qk_norm": True, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", {"window": 7}),
}


def shape(**changes: Any) -> ModelConfig:
    values = {
        "name": "t", "vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48,
        "max_seq_len": 64,
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


def ours(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    init_weights(model, 1, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a mistake
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def theirs(model: Transformer) -> Any:
    """The same model, with the same weights, in transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = AutoConfig.for_model(**hf_config(model.config, {}), attn_implementation="eager")
    there = AutoModelForCausalLM.from_config(kind, dtype=torch.float32)
    names = {to_hf(f"model.{each}"): value.detach() for each, value in model.named_parameters()}
    if model.config.tie_embeddings:
        names["lm_head.weight"] = names["model.embed_tokens.weight"]
    there.load_state_dict(names)  # strict: nothing is missing and nothing is left over
    return there.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_compute_the_same(name: str) -> None:
    architecture, changes = FAMILIES[name]
    config = shape(**changes)
    model = ours(config)
    assert hf_config(config, {})["architectures"] == [architecture]
    tokens = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(model)(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_come_back(name: str) -> None:
    model = ours(shape(**FAMILIES[name][1]))
    theirs = {to_hf(f"model.{each}"): f"model.{each}" for each, _ in model.named_parameters()}
    family = recognise(each for each in theirs if each is not None)
    assert family is not None
    for there, here in theirs.items():
        assert there is not None
        target = family.target(there)
        assert target is not None
        assert target.name == here


@pytest.mark.parametrize(
    "changes",
    [{"qk_norm": True, "qkv_bias": True}, {"window": 7, "full_every": 2}, {"init": "mup"}, {"out_bias": True}],
)
def test_a_shape_of_no_family_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no family of Hugging Face has this shape"):
        hf_config(shape(**changes), {})
