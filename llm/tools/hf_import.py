"""Reading the safetensors files of a Hugging Face folder, on a path or any fsspec URL."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint.format import ITEMSIZE, CheckpointError
from llm.checkpoint.image import Box
from llm.tools.source import Item, Source
from llm.train.pieces import DTYPES
from llm.utils.storage import Storage

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
MAX_HEADER = 100 << 20  # what the safetensors library itself accepts


def open_hf(storage: Storage, sizes: dict[str, int | None]) -> Source:
    """The tensors of the folder, whose files have these ``sizes``. Raises CheckpointError for damage and shards."""
    source = Source("hf")
    for name, place in places(storage, sizes).items():
        shape = place.shape
        box = Box(name=name, dtype=place.dtype, shape=shape, offset=[0] * len(shape), local_shape=shape)
        source.items.append(Item(box, partial(_read, storage, place.file, place.begin, box)))
    return source


@dataclass(frozen=True)
class Place:
    """Where the values of a tensor lie, row after row: from byte ``begin`` of ``file`` on."""

    file: str
    begin: int
    dtype: str  # as safetensors names it
    shape: list[int]


def places(storage: Storage, sizes: dict[str, int | None]) -> dict[str, Place]:
    """Every tensor of the folder by name. Reads the headers alone. Raises CheckpointError for damage and shards."""
    found: dict[str, Place] = {}
    for file in _files(storage, list(sizes)):
        for name, entry, begin in _header(storage, file, sizes[file] or 0):
            if name in found:
                raise CheckpointError(f"{storage.url}/{file}: tensor {name} is in another file too")
            found[name] = Place(file, begin, entry["dtype"], entry["shape"])
    return found


def _files(storage: Storage, names: list[str]) -> list[str]:
    if INDEX not in names:
        return [name for name in names if name.endswith(SUFFIX)]
    try:
        files = set(json.loads(storage.read(INDEX))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{storage.url}/{INDEX} is damaged: {error}") from error
    for file in files:
        if file not in names:  # no path either
            raise CheckpointError(f"{storage.url}/{INDEX} names {file!r}, which is not in the folder")
    return sorted(files)


def _header(storage: Storage, file: str, size: int) -> list[tuple[str, dict[str, Any], int]]:
    """(name, entry, first byte in the file) of every tensor."""
    where = f"{storage.url}/{file}"
    length = int.from_bytes(storage.read(file, 0, 8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise CheckpointError(f"{where} is damaged: it has {size} bytes and says that its header has {length}")
    try:
        header = json.loads(storage.read(file, 8, 8 + length))
        notes = header.pop("__metadata__", {})
        found = [(name, entry, 8 + length + int(entry["data_offsets"][0])) for name, entry in header.items()]
        wrong = [name for name, entry, begin in found if not _fits(entry, size - 8 - length)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: its header cannot be read: {error}") from error
    if "DCP_SHARDING_INFO" in notes:
        raise CheckpointError(
            f"{where} holds a shard of each tensor: join the files first, with torch's consolidate_safetensors_files"
        )
    if wrong:
        raise CheckpointError(f"{where}: tensor {wrong[0]} does not lie in the file, or is of an unknown type")
    return found


def _fits(entry: dict[str, Any], size: int) -> bool:
    begin, end = entry["data_offsets"]
    numbers = [begin, end, *entry["shape"]]
    if entry["dtype"] not in ITEMSIZE or any(type(number) is not int or number < 0 for number in numbers):
        return False
    return bool(begin <= end <= size and end - begin == math.prod(entry["shape"]) * ITEMSIZE[entry["dtype"]])


def _read(storage: Storage, file: str, begin: int, box: Box) -> Tensor:
    data = torch.empty(box.bytes, dtype=torch.uint8)
    if box.bytes and storage.read_into(file, begin, [data.numpy().data]) < box.bytes:
        raise CheckpointError(f"{storage.url}/{file} is cut short, in tensor {box.name}")
    return data.view(DTYPES[box.dtype]).view(box.shape)
