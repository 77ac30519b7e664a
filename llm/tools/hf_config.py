"""Shapes of models as Hugging Face's ``config.json`` has them, and back."""

from __future__ import annotations

from typing import Any

import msgspec

from llm.checkpoint.format import CheckpointError
from llm.data.tokenizer import Tokenizer
from llm.tools.export import Saved
from llm.train.pieces import DTYPES
from llm.utils.config import ConfigError, ModelConfig, RopeScaling, head_size

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def hf_config(config: ModelConfig, tensors: dict[str, Saved]) -> dict[str, Any]:
    """``config.json`` of the family that has this shape: Llama, Qwen 2, Qwen 3 or Mistral.

    Raises CheckpointError for a shape that none of them has.
    """
    family, own = _family(config)
    dtypes = {str(DTYPES[saved.dtype]).removeprefix("torch.") for saved in tensors.values()}
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": head_size(config),
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
        **own,
    }


def _family(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Its name in transformers, and what its config has beside that of the others."""
    biases = config.qkv_bias, config.out_bias, config.ffn_bias
    windows = {"use_sliding_window": config.window is not None, "sliding_window": config.window, "max_window_layers": 0}
    if config.init != "mup" and not config.full_every:
        if config.qk_norm and not any(biases):
            return "Qwen3", {"attention_bias": False, **windows}
        if not config.qk_norm and biases == (True, False, False) and head_size(config) * config.n_heads == config.dim:
            return "Qwen2", windows
        if not config.qk_norm and config.window is not None and not any(biases):
            return "Mistral", {"sliding_window": config.window}
        if not config.qk_norm and config.window is None and config.qkv_bias == config.out_bias:
            return "Llama", {"attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}
    raise CheckpointError(
        "no family of Hugging Face has this shape (qk_norm, biases, window, full_every, init=mup together): "
        "export --format dcp or torch keeps it"
    )


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    own: dict[str, Any] = {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        own = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            own["attention_factor"] = scaling.attention_factor
    original = scaling.original_max_seq_len
    return {
        "rope_type": scaling.kind, "factor": scaling.factor, "original_max_position_embeddings": original, **own
    }  # fmt: skip


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids that generation has to know, for ``generation_config.json``. None are special to a tokenizer without."""
    ids = {name: tokenizer.special.get(spelling) for name, spelling in tokenizer.named.items()}
    return {
        "bos_token_id": ids.get("bos_token"),
        "eos_token_id": tokenizer.end,
        "pad_token_id": ids.get("pad_token"),
    }


def from_hf_config(described: dict[str, Any], name: str) -> ModelConfig:
    """The shape that a ``config.json`` describes. Raises ConfigError for a model that ours is not."""
    kind = described.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"config.json: model_type={kind!r}: only {', '.join(FAMILIES)} can be read")
    for key, wanted in (("hidden_act", "silu"), ("quantization_config", None)):
        if described.get(key) not in (wanted, None):
            raise ConfigError(f"config.json: {key}={described[key]!r}: only {wanted!r} can be read")
    windowed = kind == "mistral" or (kind in ("qwen2", "qwen3") and described.get("use_sliding_window"))
    window = described.get("sliding_window") if windowed else None
    if window is not None and kind != "mistral" and described.get("max_window_layers"):
        if described["max_window_layers"] < described["num_hidden_layers"]:
            raise ConfigError("config.json: max_window_layers: layers with and without a window cannot be mixed so")
        window = None  # no layer comes after the last one
    biases = {"llama": "attention_bias", "qwen3": "attention_bias"}.get(str(kind))
    attention_bias = bool(described.get(biases)) if biases else False
    try:
        return msgspec.convert(
            {
                "name": name,
                "vocab_size": described["vocab_size"],
                "dim": described["hidden_size"],
                "n_layers": described["num_hidden_layers"],
                "n_heads": described["num_attention_heads"],
                "n_kv_heads": described.get("num_key_value_heads") or described["num_attention_heads"],
                "ffn_dim": described["intermediate_size"],
                "max_seq_len": described["max_position_embeddings"],
                "head_dim": described.get("head_dim"),
                "norm_eps": described["rms_norm_eps"],
                "tie_embeddings": bool(described.get("tie_word_embeddings")),
                "qk_norm": kind == "qwen3",
                "qkv_bias": attention_bias or kind == "qwen2",
                "out_bias": attention_bias,
                "ffn_bias": bool(described.get("mlp_bias")),
                "window": window,
                **_rope(described),
            },
            ModelConfig,
        )
    except KeyError as error:
        raise ConfigError(f"config.json: no {error.args[0]}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"config.json: {error}") from error


def _rope(described: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding; transformers 5 has one object where older versions have two keys."""
    given = described.get("rope_parameters") or described.get("rope_scaling") or {}
    theta = given.get("rope_theta") or described.get("rope_theta") or 10000.0
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("llama3", "yarn"):
        raise ConfigError(f"config.json: rope_type={kind!r}: only llama3 and yarn can be read")
    own = {
        key: given[key]
        for key in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        if given.get(key) is not None
    }
    original = given.get("original_max_position_embeddings") or described.get("original_max_position_embeddings")
    if original is None:
        raise ConfigError("config.json: rope_scaling has no original_max_position_embeddings")
    for key in ("mscale", "mscale_all_dim"):
        if given.get(key):
            raise ConfigError(f"config.json: rope_scaling.{key}={given[key]}: cannot be read")
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, "original_max_seq_len": original, **own}}
