"""What the ``.metadata`` of a torch.distributed.checkpoint directory says, read without trust.

The file is a pickle, and a pickle can name anything to be called. Here it gets nothing of this process into its hands:
each name that DCP's own metadata has stands for an inert record or function of this module, and any other name ends the
reading. What comes out is checked value by value before it is used.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch

from llm.checkpoint.boxes import Index, of_bytes
from llm.checkpoint.format import CheckpointError
from llm.train.pieces import NAMES

METADATA = ".metadata"
MAX_DIMENSIONS = 16
LIMIT = 2**62


@dataclass(frozen=True)
class Place:
    """Bytes of one item: ``length`` from ``offset`` on, in ``file`` of the directory."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: ``shape`` values at ``offset``, saved as a tensor of its own."""

    offset: list[int]
    shape: list[int]
    place: Place


@dataclass(frozen=True)
class SavedTensor:
    """A tensor; its chunks neither overlap nor leave anything out."""

    dtype: str  # as safetensors names it
    shape: list[int]
    chunks: list[Chunk]


@dataclass(frozen=True)
class Content:
    """What a directory holds, by the names that DCP gave: tensors, and pickled values."""

    tensors: dict[str, SavedTensor] = field(default_factory=dict)
    values: dict[str, Place] = field(default_factory=dict)


def read_metadata(data: bytes, path: str) -> Content:
    """Decode ``.metadata``, found at ``path``. Raises CheckpointError for what DCP would not have written."""
    try:
        root = _Unpickler(io.BytesIO(data), path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(f"{path} is no metadata of DCP: {type(error).__name__}: {_line(str(error))}") from error
    if not isinstance(root, _Metadata):
        raise CheckpointError(f"{path} is no metadata of DCP: it holds a {type(root).__name__}")
    try:
        return _content(root)
    except _Wrong as error:
        raise CheckpointError(f"{path}: {error}") from error


# --- the pickle ------------------------------------------------------------------------------------------------------


class _Record:
    """Stands for a dataclass of DCP: takes its state, and can do nothing."""

    __slots__ = ("state",)
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """One field; None where it is missing."""
        state = getattr(self, "state", None)  # a pickle may leave it out
        return state.get(name) if isinstance(state, dict) else None


class _Metadata(_Record):
    __slots__ = ()


class _Tensor(_Record):
    __slots__ = ()


class _Bytes(_Record):
    __slots__ = ()


class _Chunk(_Record):
    __slots__ = ()


class _Index(_Record):
    __slots__ = ()


class _Storage(_Record):
    __slots__ = ()


class _Ignored(_Record):
    __slots__ = ()


class _Properties(_Record):
    """Its state is (type, layout, requires_grad, memory format, pinned)."""

    __slots__ = ()


class _Function:
    """Something that a pickle may call, and that it cannot change: a function would take attributes."""

    __slots__ = ("work",)

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work = work

    def __call__(self, *arguments: Any) -> Any:
        return self.work(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


_SIZE = _Function(lambda values=(): tuple(values))
_LAYOUT = _Function(lambda name: name if isinstance(name, str) else "")
_NOTHING = _Function(lambda *_: None)  # paths and the formats of memory: nobody asks for them

_DCP = "torch.distributed.checkpoint"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"  # up to torch 2.2
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    (f"{_DCP}.metadata", "Metadata"): _Metadata,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): _Bytes,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_DCP}.metadata", "MetadataIndex"): _Index,
    (f"{_DCP}.metadata", "TensorProperties"): _Properties,
    (f"{_DCP}.metadata", "StorageMeta"): _Ignored,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _NOTHING,
    (f"{_DCP}.filesystem", "_StorageInfo"): _Storage,
    (_OLD, "TensorProperties"): _Properties,
    (_OLD, "MEM_FORMAT_ENCODING"): _NOTHING,
    ("torch", "Size"): _SIZE,
    ("torch.serialization", "_get_layout"): _LAYOUT,
    ("builtins", "getattr"): _NOTHING,  # how Python 3.11.0 to 3.11.3 pickle a memory format
    **{(module, name): _NOTHING for module in ("pathlib", "pathlib._local") for name in _PATHS},
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle._Unpickler):
    """In Python, since the one in C reserves as many gigabytes as a number in the file tells it to."""

    def __init__(self, stream: io.BytesIO, path: str) -> None:
        super().__init__(stream)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (found := _ALLOWED.get((module, name))) is not None:
            return found
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise CheckpointError(
            f"{self.path} refers to {_line(f'{module}.{name}')}, which is no part of DCP's metadata; nothing was loaded"
        )


# --- what it says ----------------------------------------------------------------------------------------------------


class _Wrong(Exception):
    """What DCP would not have written."""


def _content(root: _Metadata) -> Content:
    entries, storage = root.get("state_dict_metadata"), root.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise _Wrong("it lacks the lists of tensors and of where they are")
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for index, info in storage.items():
        if not isinstance(index, _Index) or not isinstance(info, _Storage):
            raise _Wrong("the list of places holds something else")
        name, offset = _name(index.get("fqn")), index.get("offset")
        key = name, None if offset is None else tuple(_numbers(offset, name))
        places[key] = _place(info, name)
    content = Content()
    for given, entry in entries.items():
        name = _name(given)
        if isinstance(entry, _Bytes):
            content.values[name] = _found(places, name, None)
        elif isinstance(entry, _Tensor):
            content.tensors[name] = _tensor(name, entry, places)
        else:
            raise _Wrong(f"{name} is neither a tensor nor a value")
    return content


def _tensor(name: str, entry: _Tensor, places: dict[tuple[str, tuple[int, ...] | None], Place]) -> SavedTensor:
    properties, chunks = entry.get("properties"), entry.get("chunks")
    state = getattr(properties, "state", None)
    if not isinstance(properties, _Properties) or not isinstance(state, tuple) or len(state) != 5:
        raise _Wrong(f"tensor {name} has no type")
    if state[1] != "torch.strided":
        raise _Wrong(f"tensor {name} has the layout {_line(state[1])}: only dense tensors can be imported")
    if not isinstance(state[0], torch.dtype) or state[0] not in NAMES:
        raise _Wrong(f"tensor {name} has the type {_dtype(state[0])}, which safetensors does not know")
    dtype, shape = NAMES[state[0]], _numbers(entry.get("size"), name)
    if not isinstance(chunks, list):
        raise _Wrong(f"tensor {name} has no list of chunks")
    found = []
    for chunk in chunks:
        if not isinstance(chunk, _Chunk):
            raise _Wrong(f"tensor {name} has a chunk that is none")
        offset, extent = _numbers(chunk.get("offsets"), name), _numbers(chunk.get("sizes"), name)
        if not len(offset) == len(extent) == len(shape):
            raise _Wrong(f"a chunk of tensor {name} has {len(extent)} dimensions, the tensor has {len(shape)}")
        if any(o + n > limit for o, n, limit in zip(offset, extent, shape, strict=True)):
            raise _Wrong(f"a chunk of tensor {name} reaches outside: {extent} at {offset} of {shape}")
        place = _found(places, name, tuple(offset))
        if math.prod(extent) * state[0].itemsize > place.length:
            raise _Wrong(f"a chunk of tensor {name} is {extent}, more than fits into {place.length} bytes")
        found.append(Chunk(offset, extent, place))
    filled = [chunk for chunk in found if all(chunk.shape)]
    index = Index([of_bytes(chunk.offset, chunk.shape, state[0].itemsize) for chunk in filled])
    if index.clash() is not None:
        raise _Wrong(f"chunks of tensor {name} overlap")
    if (count := sum(math.prod(chunk.shape) for chunk in filled)) != math.prod(shape):
        raise _Wrong(f"the chunks of tensor {name} have {count} of its {math.prod(shape)} values")
    return SavedTensor(dtype, shape, filled or found[:1])


def _dtype(value: Any) -> str:
    return str(value) if isinstance(value, torch.dtype) else _line(value)


def _found(places: dict[tuple[str, tuple[int, ...] | None], Place], name: str, offset: tuple[int, ...] | None) -> Place:
    try:
        return places[name, offset]
    except KeyError:
        where = "" if offset is None else f" at {list(offset)}"
        raise _Wrong(f"it does not say where {name}{where} is") from None


def _place(info: _Storage, name: str) -> Place:
    file = info.get("relative_path")
    if not isinstance(file, str) or not _is_inside(file):
        raise _Wrong(f"{name} is in {_quoted(file)}, which is not inside the directory")
    if info.get("transform_descriptors"):
        raise _Wrong(f"{name} was compressed or encrypted when it was saved: only plain files can be imported")
    offset, length = _numbers((info.get("offset"), info.get("length")), name)
    return Place(file, offset, length)


def _is_inside(file: str) -> bool:
    plain = bool(file) and "\\" not in file and "://" not in file and file.isprintable()
    return plain and not PurePosixPath(file).is_absolute() and ".." not in PurePosixPath(file).parts


def _numbers(values: Any, name: str) -> list[int]:
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMENSIONS:
        raise _Wrong(f"{name} has {_line(values)} for a list of numbers")
    if any(type(value) is not int or not 0 <= value < LIMIT for value in values):
        raise _Wrong(f"{name} has {_line(values)} for a list of numbers")
    return list(values)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value or value == "__metadata__":  # that key of a safetensors file is taken
        raise _Wrong(f"{_quoted(value)} is not the name of a tensor")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Wrong(f"{_quoted(value)} is not the name of a tensor") from None
    return value


def _quoted(value: Any) -> str:
    return repr(_line(value)) if isinstance(value, str) else _line(value)


def _line(value: Any) -> str:
    """At most 200 characters of one line, of what may be hostile: a small pickle can make a list without an end."""
    text = value if isinstance(value, str) else f"a {type(value).__name__}"
    return re.sub(r"[^\x20-\x7e]+", " ", text[:1000])[:200]
