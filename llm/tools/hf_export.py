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
from llm.utils.config import ModelConfig

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
    """``config.json`` of a LlamaForCausalLM."""
    dtypes = {str(DTYPES[saved.dtype]).removeprefix("torch.") for saved in tensors.values()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.dim // config.n_heads,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
    }


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
