"""How two checkpoints differ: in their state, in which tensors they have, and, where wanted, in the values of these."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from llm.checkpoint.format import ITEMSIZE, Commit, DamagedError, Manifest, PartManifest
from llm.checkpoint.lineage import read_part
from llm.utils.storage import Storage

CHUNK = 4 << 20  # bytes of either side that are compared at a time
THREADS = 8
MISSING = "-"  # stands for a key that one side lacks


class Box(NamedTuple):
    """A piece: ``shape`` values of its tensor that start at ``offset``, at byte ``begin`` of a file."""

    offset: list[int]
    shape: list[int]
    path: str
    begin: int
    block: int
    crc32c: str


class Whole(NamedTuple):
    """A tensor as all ranks saved it."""

    dtype: str
    shape: list[int]
    placement: str
    boxes: list[Box]

    @property
    def bytes(self) -> int:
        """Size of all of its values."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def read_parts(storage: Storage, commit: Commit, manifest: Manifest) -> list[PartManifest]:
    """All part manifests of a commit. Raises DamagedError when one cannot be trusted."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda rank: read_part(storage, commit, manifest, rank), range(manifest.world_size)))


def tensors(commit: Commit, parts: Iterable[PartManifest]) -> dict[str, Whole]:
    """Every tensor of a commit, by name. Raises DamagedError when ranks do not mean the same tensor by one name."""
    found: dict[str, Whole] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            whole = found.setdefault(name, Whole(tensor.dtype, tensor.shape, tensor.placement, []))
            if (whole.dtype, whole.shape) != (tensor.dtype, tensor.shape):
                raise DamagedError(f"{commit.path}: tensor {name} is another one in the part of rank {part.rank}")
            for piece in tensor.pieces:
                path = f"{commit.path}/{part.files[piece.file].name}"
                whole.boxes.append(Box(piece.offset, piece.shape, path, piece.begin, piece.block, piece.crc32c))
    return dict(sorted(found.items(), key=lambda each: _natural(each[0])))


def state_differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value in ``a``, value in ``b``) of whatever differs; MISSING where one side has no such key."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from state_differences(a.get(key, MISSING), b.get(key, MISSING), f"{name}.{key}" if name else key)
    elif type(a) is not type(b) or a != b:
        yield name, a, b


def tensor_differences(a: Mapping[str, Whole], b: Mapping[str, Whole]) -> Iterator[tuple[str, str]]:
    """(tensor, how it differs) but for the values: added, removed, another type, shape or placement."""
    for name in sorted({*a, *b}):
        if name not in a:
            yield name, f"added: {_describe(b[name])}"
        elif name not in b:
            yield name, f"removed: {_describe(a[name])}"
        elif (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
            yield name, f"{_describe(a[name])} -> {_describe(b[name])}"
        elif a[name].placement != b[name].placement:
            yield name, f"placement {a[name].placement or MISSING} -> {b[name].placement or MISSING}"


def comparable(a: Mapping[str, Whole], b: Mapping[str, Whole]) -> list[str]:
    """The tensors that both have, with the same type and shape."""
    return [name for name in a if name in b and (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)]


def same_values(a: Storage, one: Whole, b: Storage, two: Whole) -> bool:
    """Whether two tensors of one type and shape have the same bytes.

    Where they were cut in the same way their checksums are compared; else both are read, a little at a time. Raises
    DamagedError for a file that is missing or too short.
    """
    for whole in (one, two):
        if sum(math.prod(box.shape) for box in whole.boxes) != math.prod(whole.shape):
            raise DamagedError(f"a tensor of {whole.dtype} {whole.shape} does not have each of its values once")
    if sorted(map(_cut, one.boxes)) == sorted(map(_cut, two.boxes)):
        return sorted((box.offset, box.crc32c) for box in one.boxes) == sorted(
            (box.offset, box.crc32c) for box in two.boxes
        )
    itemsize = ITEMSIZE[one.dtype]
    for left in one.boxes:
        for right in two.boxes:
            for offset, shape in _small(_meet(left, right), left, right, itemsize):
                if _read(a, left, offset, shape, itemsize) != _read(b, right, offset, shape, itemsize):
                    return False
    return True


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"([0-9]{1,18})", name)]


def _describe(tensor: Whole) -> str:
    return f"{tensor.dtype} {tensor.shape}"


def _cut(box: Box) -> tuple[list[int], list[int], int]:
    return box.offset, box.shape, box.block


Area = tuple[list[int], list[int]]  # offset and shape, in the whole tensor


def _meet(a: Box, b: Box) -> Area | None:
    """The values that both have."""
    begin = [max(x, y) for x, y in zip(a.offset, b.offset, strict=True)]
    ends = zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    shape = [min(x + n, y + m) - start for start, (x, n, y, m) in zip(begin, ends, strict=True)]
    return (begin, shape) if all(count > 0 for count in shape) else None


def _small(area: Area | None, a: Box, b: Box, itemsize: int) -> Iterator[Area]:
    """Cut an area until what has to be read of either side for a part of it fits CHUNK."""
    if area is None:
        return
    offset, shape = area
    wide = next((dimension for dimension, count in enumerate(shape) if count > 1), None)
    if wide is None or max(_span(box, offset, shape, itemsize)[1] for box in (a, b)) <= CHUNK:
        yield area
        return
    half = shape[wide] // 2
    for begin, count in ((0, half), (half, shape[wide] - half)):
        inner, start = list(shape), list(offset)
        inner[wide], start[wide] = count, start[wide] + begin
        yield from _small((start, inner), a, b, itemsize)


def _strides(shape: Sequence[int], itemsize: int) -> list[int]:
    """Bytes from one index to the next, of each dimension of a row-major box."""
    strides, size = [], itemsize
    for count in reversed(shape):
        strides.append(size)
        size *= count
    return strides[::-1]


def _span(box: Box, offset: Sequence[int], shape: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Where in its piece an area begins, and the bytes from its first to its last value."""
    strides = _strides(box.shape, itemsize)
    begin = sum((o - base) * stride for o, base, stride in zip(offset, box.offset, strides, strict=True))
    return begin, sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) + itemsize


def _read(storage: Storage, box: Box, offset: Sequence[int], shape: Sequence[int], itemsize: int) -> bytes:
    """The values of an area, row-major."""
    begin, size = _span(box, offset, shape, itemsize)
    try:
        data = storage.read(box.path, box.begin + begin, box.begin + begin + size)
    except FileNotFoundError:
        raise DamagedError(f"{box.path} is missing from a committed checkpoint") from None
    if len(data) != size:
        raise DamagedError(
            f"{box.path} is cut short: it has no bytes {box.begin + begin} to {box.begin + begin + size}"
        )
    if size == math.prod(shape) * itemsize:
        return data
    return b"".join(_rows(memoryview(data), _strides(box.shape, itemsize), shape, itemsize))


def _rows(data: memoryview, strides: Sequence[int], shape: Sequence[int], itemsize: int) -> Iterator[memoryview]:
    if len(shape) <= 1:
        yield data[: math.prod(shape) * itemsize]
        return
    for index in range(shape[0]):
        yield from _rows(data[index * strides[0] :], strides[1:], shape[1:], itemsize)
