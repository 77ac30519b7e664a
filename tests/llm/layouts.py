"""A state with every kind of tensor, saved and wanted in every layout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from llm.checkpoint import plan
from llm.checkpoint.format import Commit
from llm.train.pieces import NAMES, LocalPiece
from llm.utils.storage import Storage
from tests.checkpoint.maker import make_commit

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "model.weight": ((700, 96), torch.float32),
    "model.head": ((37, 301), torch.bfloat16),
    "model.float8": ((33, 130), torch.float8_e4m3fn),
    "model.scale": ((9,), torch.float8_e5m2),
    "model.experts": ((4, 30, 50), torch.float32),
    "model.norm": ((3,), torch.float32),
    "model.counts": ((5, 7, 3), torch.int64),
    "model.mask": ((11, 5), torch.bool),
    "model.spectrum": ((6, 4), torch.complex64),
    "model.empty": ((0, 4), torch.float16),
    "model.one": ((), torch.float64),
    "optimizer.moment": ((700, 96), torch.float32),
    "optimizer.quantised": ((4099,), torch.uint8),
    "optimizer.step": ((), torch.int64),
}


def full(name: str) -> torch.Tensor:
    """The values of a tensor: all bit patterns, NaN among them."""
    shape, dtype = SHAPES[name]
    size = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(sorted(SHAPES).index(name))
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


Boxes = list[tuple[list[int], list[int]]]


def boxes(name: str, layout: str, rank: int, size: int) -> Boxes:
    """What a rank holds of a tensor: (offset, shape) of each box with values."""
    shape, dims = list(SHAPES[name][0]), len(SHAPES[name][0])
    everything: Boxes = [([0] * dims, shape)]
    if dims == 0 or not all(shape) or layout == "replicated":
        return everything
    if layout == "strips":  # rows dealt like cards
        width = -(-shape[0] // (3 * size))
        strips = range(rank * width, shape[0], size * width)
        return [([at] + [0] * (dims - 1), [min(width, shape[0] - at), *shape[1:]]) for at in strips]
    tall = {"rows": size, "columns": 1, "grid": 2 if size % 2 == 0 else 1}[layout] if dims > 1 else size
    parts = [(tall, rank // (size // tall)), (size // tall, rank % (size // tall))]
    offset, extent = [0] * dims, list(shape)
    for axis, (count, which) in zip(range(dims), parts, strict=False):
        width = -(-shape[axis] // count)
        offset[axis] = min(which * width, shape[axis])
        extent[axis] = min(width, shape[axis] - offset[axis])
    return [(offset, extent)] if all(extent) else []


def cut(values: torch.Tensor, offset: list[int], extent: list[int]) -> torch.Tensor:
    return values[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))]


def raw(values: torch.Tensor) -> bytes:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(storage: Storage, step: int, size: int, layout: str, only: str = "") -> Commit:
    """A checkpoint of the state; what is replicated is in the part of one rank, another one for each tensor."""
    held: list[dict[str, Any]] = [{} for _ in range(size)]
    for number, name in enumerate(each for each in SHAPES if each.startswith(only)):
        shape, dtype = SHAPES[name]
        for rank in range(size):
            whole = layout == "replicated" or not shape or not all(shape)
            if whole and rank != number % size:
                continue
            values = full(name)
            for offset, extent in boxes(name, layout, rank, size):
                data = np.frombuffer(raw(cut(values, offset, extent)), f"V{dtype.itemsize}").reshape(extent)
                held[rank].setdefault(name, []).append((data, list(shape), offset, NAMES[dtype]))
    return make_commit(storage, step, held, file_bytes=200_000)


def targets(layout: str, rank: int, size: int, only: str = "") -> list[LocalPiece]:
    return [
        LocalPiece(name, torch.zeros(extent, dtype=dtype), list(shape), offset)
        for name, (shape, dtype) in SHAPES.items()
        if name.startswith(only)
        for offset, extent in boxes(name, layout, rank, size)
    ]


def assert_filled(pieces: list[LocalPiece]) -> None:
    for piece in pieces:
        expected = cut(full(piece.name), piece.offset, list(piece.data.shape))
        assert raw(piece.data) == raw(expected), f"{piece.name} at {piece.offset}"


USUAL = (plan.ROUND, plan.LOCAL_SPAN, plan.MAX_BLOCK, plan.LOCAL_DIRECT_READ)


def set_limits(small: bool) -> None:
    """Small ones: a small state takes many reads and rounds, and nothing is too little to exchange."""
    chosen = (50_000, 20_000, 4096, 0) if small else USUAL
    plan.ROUND, plan.LOCAL_SPAN, plan.MAX_BLOCK, plan.LOCAL_DIRECT_READ = chosen
