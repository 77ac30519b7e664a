"""Reading what stock torch.distributed.checkpoint saved, on a path or any fsspec URL, without running any of it."""

from __future__ import annotations

import abc
import io
import json
import math
import zipfile
from functools import partial
from typing import IO, Any, cast

import torch
from torch import Tensor

from llm.checkpoint.format import CheckpointError
from llm.checkpoint.image import Box
from llm.tools.dcp_metadata import METADATA, Chunk, Place, SavedTensor, read_metadata
from llm.tools.source import Item, Source
from llm.train.pieces import DTYPES
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import Storage

STATE = "state.json"  # the name under which an export of ours keeps the state


def open_dcp(storage: Storage) -> Source:
    """What the directory holds. Values are read at once, tensors when they are asked for.

    Raises CheckpointError for what DCP would not have written, OSError when the store does not answer.
    """
    content = read_metadata(storage.read(METADATA), f"{storage.url}/{METADATA}")
    source = Source("dcp")
    for name, tensor in content.tensors.items():
        for chunk in tensor.chunks:
            box = Box(name=name, dtype=tensor.dtype, shape=tensor.shape, offset=chunk.offset, local_shape=chunk.shape)
            source.items.append(Item(box, partial(_tensor, storage, name, tensor, chunk)))
    for name, place in content.values.items():
        try:
            source.values[name] = to_json(_load(storage, name, place))
        except CheckpointError:
            source.unreadable.append(name)
    if isinstance(text := source.values.get(STATE), str):
        source.state = _state(text, storage)
        del source.values[STATE]
    return source


def to_json(value: Any) -> Any:
    """``value`` in what JSON knows: bytes become text by hexadecimal digits, numbers that JSON lacks their names.

    Raises CheckpointError for anything else.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, bytes | bytearray):
        return {"hex": bytes(value).hex()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {str(key): to_json(each) for key, each in value.items()}
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        return to_json(value.item())
    raise CheckpointError(f"a {type(value).__name__} cannot be kept in a checkpoint's state")


def _state(text: str, storage: Storage) -> dict[str, Any]:
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{storage.url}: its {STATE} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{storage.url}: its {STATE} is damaged: it is no object")
    return state


def _tensor(storage: Storage, name: str, tensor: SavedTensor, chunk: Chunk) -> Tensor:
    """One chunk, on the CPU."""
    found = _load(storage, f"tensor {name}", chunk.place)
    where = f"{storage.url}/{chunk.place.file}: tensor {name}"
    if type(found) not in (Tensor, torch.nn.Parameter) or found.layout != torch.strided:
        raise CheckpointError(f"{where} is stored as a {type(found).__name__}: only plain dense tensors are read")
    if found.dtype != DTYPES[tensor.dtype] or list(found.shape) != chunk.shape:
        raise CheckpointError(
            f"{where} is {found.dtype} {list(found.shape)}, {METADATA} says {DTYPES[tensor.dtype]} {chunk.shape}"
        )
    values: Tensor = found.detach()
    return values


def _load(storage: Storage, name: str, place: Place) -> Any:
    """What torch.save wrote there, through torch's restricted unpickler. Raises CheckpointError."""
    where = f"{storage.url}/{place.file}: {name} at bytes {place.offset} to {place.offset + place.length}"
    try:
        stream: _Stream = _Slice(storage, place) if isinstance(storage, LocalStorage) else _whole(storage, place)
    except FileNotFoundError:
        raise CheckpointError(f"{where}: the file is missing") from None
    try:
        # Nothing in it is compressed: a small file cannot claim all memory.
        with zipfile.ZipFile(stream) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > place.length:
            raise CheckpointError(f"{where} claims {claimed} bytes")
        stream.seek(0)
        return torch.load(cast(IO[bytes], stream), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a broken file can make torch raise anything
        if stream.failure is not None:  # zipfile takes it for a broken archive
            raise stream.failure from None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{where} cannot be read: {lines[0][:300]}") from error


class _Stream(io.RawIOBase, abc.ABC):
    """``length`` bytes as a file that torch.load reads and rewinds."""

    def __init__(self, length: int) -> None:
        self.length, self.position = length, 0
        self.failure: OSError | None = None

    @abc.abstractmethod
    def fetch(self, begin: int, view: memoryview) -> int:
        """Fill ``view`` with the bytes from ``begin`` on."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self.length - self.position), 0)
        done = self.fetch(self.position, view[:count]) if count else 0
        self.position += done
        return done


class _Slice(_Stream):
    """A part of a file on disk, read as it is needed: the tensor is in memory once."""

    def __init__(self, storage: LocalStorage, place: Place) -> None:
        super().__init__(place.length)
        self.storage, self.place = storage, place
        storage.read_into(place.file, place.offset, [memoryview(bytearray(1))])  # is it there?

    def fetch(self, begin: int, view: memoryview) -> int:
        try:
            return self.storage.read_into(self.place.file, self.place.offset + begin, [view])
        except OSError as error:
            self.failure = error
            raise


class _Memory(_Stream):
    def __init__(self, data: memoryview) -> None:
        super().__init__(len(data))
        self.data = data

    def fetch(self, begin: int, view: memoryview) -> int:
        view[:] = self.data[begin : begin + len(view)]
        return len(view)


def _whole(storage: Storage, place: Place) -> _Memory:
    """A part of an object, in one request: torch.load goes back and forth."""
    data = memoryview(bytearray(place.length))
    return _Memory(data[: storage.read_into(place.file, place.offset, [data])])
