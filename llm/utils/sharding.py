"""Which part of a tensor this rank holds. FSDP2 splits dimension 0 as ``torch.chunk`` does; a plain tensor is whole."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def chunk(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and one-past-last row of ``rank``; empty for the last ranks when there are few rows."""
    size = -(-rows // world_size)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def local(tensor: Tensor) -> Tensor:
    """The rows that this rank holds, as a plain tensor that shares memory. Call it without gradient tracking."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def like(data: Tensor, whole: Tensor) -> Tensor:
    """``data``, the rows that this rank holds, as a tensor that is spread as ``whole``. Shares memory."""
    mesh = getattr(whole, "device_mesh", None)
    if mesh is None:
        return data
    from torch.distributed.tensor import DTensor

    spread: Any = whole
    return DTensor.from_local(data, mesh, spread.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def place(tensor: Tensor) -> tuple[int, int]:
    """Range of rows of the global tensor that :func:`local` returns; (0, 1) for a scalar."""
    rows = tensor.shape[0] if tensor.dim() else 1
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return 0, rows
    return chunk(rows, mesh.get_local_rank(), mesh.size())


def slices(tensor: Tensor) -> tuple[slice, ...]:
    """The box of the global tensor that :func:`local` returns, whatever the mesh; one slice per dimension."""
    if getattr(tensor, "device_mesh", None) is None:
        return tuple(slice(0, size) for size in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spread: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, spread.device_mesh, spread.placements)
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))


def copies(tensor: Tensor) -> int:
    """On how many ranks of its mesh the values that :func:`local` returns lie."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return 1
    spread: Any = tensor
    return math.prod(size for size, each in zip(mesh.shape, spread.placements, strict=True) if each.is_replicate())
