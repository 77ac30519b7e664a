"""Writing a folder that Hugging Face's transformers, and what reads its folders, take as it is.

    python -m llm.tools.export_hf RUN TARGET [--commit C] [--dtype bfloat16]

Weights as safetensors files and their index, config.json, the tokenizer, generation_config.json, and a model card that
says where they are from. The same as ``python -m llm.tools.convert export --format hf``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint.format import CheckpointError
from llm.model.transformer import Transformer
from llm.tools.destination import REMOTE_FILE, local_path, new_folder
from llm.tools.export import Exported, Saved
from llm.tools.hf_card import model_card
from llm.tools.hf_config import generation_config, hf_config
from llm.tools.hf_import import INDEX
from llm.tools.hf_names import to_hf
from llm.tools.hf_tokenizer import tokenizer_files
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
        for file, content in _beside(source, config, kept).items():
            with folder.file(file) as sink:
                sink.write(content)
        total = sum(saved.bytes for saved in kept.values())
        with folder.file(INDEX, last=True) as sink:
            sink.write(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2).encode())


def _beside(source: Exported, config: ModelConfig, tensors: dict[str, Saved]) -> dict[str, bytes]:
    """What the folder has beside the weights: name -> content."""
    from llm.inference.load import load_run_tokenizer

    url = source.storage.url
    tokenizer = load_run_tokenizer(url, source.commit)
    described = {
        "config.json": hf_config(config, tensors) | generation_config(tokenizer),
        "generation_config.json": generation_config(tokenizer),
    }
    files = {name: json.dumps(values, indent=2).encode() for name, values in described.items()}
    files |= tokenizer_files(tokenizer, config.max_seq_len)
    return files | {"README.md": model_card(source, config, tokenizer).encode()}


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


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit code. See :mod:`llm.tools.convert`."""
    from llm.tools.convert import main as convert

    given = sys.argv[1:] if argv is None else argv
    return convert(["--prog", "python -m llm.tools.export_hf", "export", "--format", "hf", *given])


if __name__ == "__main__":
    sys.exit(main())
