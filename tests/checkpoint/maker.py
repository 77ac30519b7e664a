"""Writes checkpoints of any layout straight from the format: one process, no torch."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from crc32c import crc32c

from llm.checkpoint.format import (
    FORMAT,
    MANIFEST,
    Commit,
    DataFile,
    Manifest,
    PartEntry,
    PartManifest,
    Piece,
    Tensor,
    block_size,
    file_name,
    pack_checksums,
    part_name,
    seal,
)
from llm.utils.storage import Storage

# Values, the tensor's whole shape, where in it the values lie; a fourth entry names a type that numpy lacks (BF16).
Box = tuple[Any, ...]
Held = Mapping[str, Box | list[Box]]  # what one rank holds: tensor -> a box of it, or several

NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
}  # fmt: skip


def make_commit(
    storage: Storage,
    step: int,
    tensors_per_rank: Sequence[Held],
    attempt: int = 0,
    generation: int = 0,
    parent: str | None = None,
    state: dict[str, Any] | None = None,
    file_bytes: int = 1 << 20,
) -> Commit:
    """Write and commit what ``tensors_per_rank`` hold. Files have at most ``file_bytes`` of data, larger rows apart.

    The random generators of rank r are in the state ``bytes([r]) * 8``.
    """
    commit = Commit(attempt=attempt, generation=generation, step=step)
    manifest = Manifest(
        format=FORMAT,
        step=step,
        attempt=attempt,
        generation=generation,
        time=time.time(),
        seconds=0.5,
        world_size=len(tensors_per_rank),
        mesh={"dp": len(tensors_per_rank)},
        parent=parent,
        code="test",
        parts=[_write_part(storage, commit, rank, held, file_bytes) for rank, held in enumerate(tensors_per_rank)],
        state={"step": step} if state is None else state,
    )
    storage.create(f"{commit.path}/{MANIFEST}", seal(manifest))
    return commit


def split_rows(tensors: Mapping[str, np.ndarray], size: int) -> list[Held]:
    """What each of ``size`` ranks holds when every tensor is cut along its first dimension; rank 0 has the scalars."""
    held: list[dict[str, Box | list[Box]]] = [{} for _ in range(size)]
    for name, whole in tensors.items():
        if whole.ndim == 0 or len(whole) == 0:
            held[0][name] = (whole, list(whole.shape), [0] * whole.ndim)
            continue
        rows = -(-len(whole) // size)
        for rank in range(size):
            if len(values := whole[rank * rows : (rank + 1) * rows]):
                held[rank][name] = (values, list(whole.shape), [rank * rows] + [0] * (whole.ndim - 1))
    return held


def _write_part(storage: Storage, commit: Commit, rank: int, held: Held, file_bytes: int) -> PartEntry:
    tensors: dict[str, Tensor] = {}
    waiting = [
        (name, dtype, values, [int(n) for n in shape], offset)
        for name, boxes in held.items()
        for box in (boxes if isinstance(boxes, list) else [boxes])
        for dtype, values, shape, offset in _pieces(box, file_bytes)
    ]
    for name, dtype, _, shape, _ in waiting:
        tensors[name] = Tensor(dtype=dtype, shape=shape, pieces=[])
    files: list[DataFile] = []
    while waiting:
        count, size = 0, 0
        while count < len(waiting) and (count == 0 or size + waiting[count][2].nbytes <= file_bytes):
            size += waiting[count][2].nbytes
            count += 1
        inside, waiting = waiting[:count], waiting[count:]
        header, begins = _header(inside)
        name = file_name(rank, len(files))
        data = b"".join([header, *(values.tobytes() for _, _, values, _, _ in inside)])
        for (tensor, _, values, _, offset), begin in zip(inside, begins, strict=True):
            tensors[tensor].pieces.append(_piece(values, offset, len(files), len(header) + begin))
        files.append(DataFile(name=name, bytes=len(data), header=len(header), header_crc32c=crc32c(header)))
        storage.write(f"{commit.path}/{name}", data)
    rng = {"cpu": base64.b64encode(bytes([rank]) * 8).decode()}
    part = msgspec.json.encode(PartManifest(format=FORMAT, rank=rank, files=files, tensors=tensors, rng=rng))
    entry = PartEntry(sha256=hashlib.sha256(part).hexdigest(), bytes=sum(file.bytes for file in files))
    storage.write(f"{commit.path}/{part_name(rank, entry.bytes, entry.sha256)}", part)
    return entry


def _pieces(box: Box, limit: int) -> list[tuple[str, np.ndarray, Sequence[int], list[int]]]:
    """A box cut along its first dimension, so that each piece has at most ``limit`` bytes."""
    values, shape, offset = np.ascontiguousarray(box[0]).reshape(np.shape(box[0])), box[1], [int(n) for n in box[2]]
    dtype = box[3] if len(box) > 3 else NAMES[values.dtype.name]
    if values.nbytes <= limit or values.ndim == 0:
        return [(dtype, values, shape, offset)]
    rows = max(limit * len(values) // values.nbytes, 1)
    return [
        (dtype, values[begin : begin + rows], shape, [offset[0] + begin, *offset[1:]])
        for begin in range(0, len(values), rows)
    ]


def _header(inside: list[tuple[str, str, np.ndarray, list[int], list[int]]]) -> tuple[bytes, list[int]]:
    """The head of a safetensors file, and where each piece begins after it."""
    names = [name for name, *_ in inside]
    entries, begins, position = {}, [], 0
    for name, dtype, values, _, offset in inside:
        key = name if names.count(name) == 1 else f"{name}@{','.join(map(str, offset))}"
        begins.append(position)
        end = position + values.nbytes
        entries[key] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins


def _piece(values: np.ndarray, offset: list[int], file: int, begin: int) -> Piece:
    data, block = values.tobytes(), block_size(values.nbytes)
    checksums = array("I", [crc32c(data[at : at + block]) for at in range(0, len(data), block)])
    return Piece(
        offset=offset, shape=list(values.shape), file=file, begin=begin, block=block, crc32c=pack_checksums(checksums)
    )
