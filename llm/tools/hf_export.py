"""Writing the weights as Hugging Face's transformers read them: safetensors files, their index, and config.json."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint.format import CheckpointError
from llm.model.transformer import Transformer
from llm.tools.destination import REMOTE_FILE, local_path, new_folder
from llm.tools.export import Exported, Saved
from llm.tools.hf_import import INDEX
from llm.tools.hf_names import to_hf
from llm.train.pieces import DTYPES
from llm.utils.config import ModelConfig, RopeScaling, head_size

FILE = 4 << 30  # bytes of a file, unless one tensor is larger
SHOWN = 10


def export_hf(source: Exported, config: ModelConfig, dtype: str | None, target: str) -> None:
    """The model of ``config``, in the type ``dtype`` (as safetensors names it; None: as it was saved).

    Our rotary embedding pairs the halves of a head, as Hugging Face's does: no row changes its place. Memory: 512 MiB
    of tensors and, for a store, a file of 256 MiB or one tensor. Raises CheckpointError when the checkpoint does not
    hold this model.
    """
    names = _model(source, config)
    kept = {name: Saved(dtype or source.tensors[name].dtype, source.tensors[name].shape) for name in names}
    files = _files(kept, FILE if local_path(target) is not None else REMOTE_FILE)
    index: dict[str, str] = {}
    with new_folder(target) as folder:
        for number, inside in enumerate(files, start=1):
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            with folder.file(file) as sink:
                sink.write(_header({name: kept[name] for name in inside}))
                for part, data in source.read(inside):
                    sink.write(_bytes(data.to(DTYPES[kept[part.name].dtype])))
            index.update({_hf(name): file for name in inside})
        with folder.file("config.json") as sink:
            sink.write(json.dumps(hf_config(config, kept), indent=2).encode())
        total = sum(saved.bytes for saved in kept.values())
        with folder.file(INDEX, last=True) as sink:
            sink.write(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2).encode())


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
        "bos_token_id": None,
        "eos_token_id": None,
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


def _model(source: Exported, config: ModelConfig) -> list[str]:
    """The names of the model's weights, as the checkpoint has them."""
    with torch.device("meta"):
        model = Transformer(config)
    expected = {f"model.{name}": list(parameter.shape) for name, parameter in model.named_parameters()}
    there = {name: saved.shape for name, saved in source.tensors.items() if name.startswith("model.")}
    if wrong := sorted(name for name in expected.keys() | there.keys() if expected.get(name) != there.get(name)):
        names = ", ".join(wrong[:SHOWN]) + (f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
        raise CheckpointError(f"{source.commit.path} does not hold the model of config.yaml: they differ in {names}")
    return list(expected)


def _files(tensors: dict[str, Saved], limit: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    size = 0
    for name, saved in tensors.items():
        if files[-1] and size + saved.bytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += saved.bytes
    return files


def _hf(name: str) -> str:
    theirs = to_hf(name)
    assert theirs is not None, name  # every parameter of our model has one
    return theirs


def _header(tensors: dict[str, Saved]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, saved in tensors.items():
        entries[_hf(name)] = {
            "dtype": saved.dtype,
            "shape": saved.shape,
            "data_offsets": [begin, begin + saved.bytes],
        }
        begin += saved.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(data: Tensor) -> memoryview:
    return data.contiguous().reshape(-1).view(torch.uint8).numpy().data
