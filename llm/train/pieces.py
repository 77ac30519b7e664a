"""From a state dict to the boxes of it that this rank holds, as torch's checkpoint planner sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# torch's types by the names that safetensors uses.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LocalPiece:
    """What this rank holds of one tensor: ``data`` is the box at ``offset`` of the global ``shape``.

    ``data`` shares memory with the state dict. ``placement`` has one mark per dimension of the device mesh: S0, R.
    ``spread`` is the number of ranks over which the tensor is sharded, each with rows or columns of its own.
    """

    name: str
    data: Tensor
    shape: list[int]
    offset: list[int]
    placement: str = ""
    spread: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of ``data``."""
        return self.data.numel() * self.data.element_size()


def local_pieces(state: Mapping[str, Tensor]) -> list[LocalPiece]:
    """Every box of every tensor of ``state`` that this rank holds; boxes without values are left out.

    Plain tensors are the same on every rank. Names become canonical, and tensor subclasses fall into what they are
    made of (:func:`flatten`). Raises ValueError when two tensors get the same name, TypeError for a type without one.
    """
    flat: dict[str, Tensor] = {}
    for given, tensor in state.items():
        for name, inner in flatten(canonical(given), tensor):
            if name in flat:
                raise ValueError(f"two tensors of the state are called {name}")
            if inner.dtype not in NAMES:
                raise TypeError(f"tensor {name} has the type {inner.dtype}, which safetensors does not know")
            flat[name] = inner
    sharded = {name: tensor for name, tensor in flat.items() if hasattr(tensor, "device_mesh")}
    found = {name: _planned(name, tensor) for name, tensor in sharded.items()}
    with torch.no_grad():
        pieces = [
            piece
            for name, tensor in flat.items()
            for piece in (found[name] if name in found else [_whole(name, tensor)])
        ]
    return [piece for piece in pieces if piece.data.numel() or not all(piece.shape)]


def _whole(name: str, tensor: Tensor) -> LocalPiece:
    return LocalPiece(name, tensor.detach(), list(tensor.shape), [0] * tensor.dim())


def _planned(name: str, tensor: Tensor) -> list[LocalPiece]:
    """The boxes of a DTensor, from torch's own planner: it knows every placement, uneven and strided ones too."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner()
    planner.set_up_planner({name: tensor}, is_coordinator=False)
    whole: Any = tensor
    placement = ",".join(_mark(each) for each in whole.placements)
    spread = math.prod(
        size for size, each in zip(whole.device_mesh.shape, whole.placements, strict=True) if not each.is_replicate()
    )
    boxes = []
    for item in planner.create_local_plan().items:
        assert item.tensor_data is not None
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor)
        offset = list(item.tensor_data.chunk.offsets)
        boxes.append(LocalPiece(name, data.detach(), list(item.tensor_data.size), offset, placement, spread))
    return boxes


def _mark(placement: Any) -> str:
    return f"S{placement.dim}" if placement.is_shard() else "R" if placement.is_replicate() else str(placement)


def canonical(name: str) -> str:
    """A tensor's name without what compiling, activation checkpointing or data parallelism wrap around a module."""
    wrappers = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def flatten(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor subclass (quantised optimizer states, float8 weights) as the plain tensors inside it.

    They are called ``name:inner``, recursively, after the attributes that the subclass itself names in
    ``__tensor_flatten__``. DTensors stay whole, but what they are made of must be plain.
    """
    if hasattr(tensor, "device_mesh"):
        local = tensor.to_local()  # type: ignore[attr-defined]
        if hasattr(local, "__tensor_flatten__"):
            raise TypeError(f"tensor {name} is a DTensor of {type(local).__name__}: only plain tensors can be sharded")
        return [(name, tensor)]
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(name, tensor)]
    inner, _ = tensor.__tensor_flatten__()
    return [found for each in inner for found in flatten(f"{name}:{each}", getattr(tensor, each))]
