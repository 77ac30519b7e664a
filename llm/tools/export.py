"""Reading a checkpoint for an export: some tensors at a time, every block verified, and nobody removes it meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from llm.checkpoint.format import ITEMSIZE, CheckpointError, Commit, DamagedError, Manifest
from llm.checkpoint.image import split
from llm.checkpoint.leases import lease
from llm.checkpoint.lineage import read_manifest, read_part
from llm.tools.destination import new_file
from llm.train.pieces import DTYPES, LocalPiece
from llm.train.resharding import load
from llm.train.world import World
from llm.utils.storage import Storage

BATCH = 512 << 20  # bytes that are read at a time
PIECE = 128 << 20  # a larger tensor is read in pieces


class Saved(NamedTuple):
    """A tensor of the checkpoint."""

    dtype: str  # as safetensors names it
    shape: list[int]

    @property
    def bytes(self) -> int:
        """Size of its values."""
        size = ITEMSIZE[self.dtype]
        for n in self.shape:
            size *= n
        return size


class Part(NamedTuple):
    """Values that follow each other in a tensor: a box of ``shape`` at ``offset``."""

    name: str
    offset: list[int]
    shape: list[int]


@dataclass(frozen=True)
class Exported:
    """A checkpoint, opened for reading."""

    storage: Storage
    commit: Commit
    manifest: Manifest
    tensors: dict[str, Saved]
    advance: Callable[[int], None]  # told the bytes that were read

    def bytes(self, names: Sequence[str]) -> int:
        """Size of these tensors."""
        return sum(self.tensors[name].bytes for name in names)

    def read(self, names: Sequence[str]) -> Iterator[tuple[Part, Tensor]]:
        """The values of these tensors, in this order: tensors larger than PIECE in several parts.

        Raises DamagedError, or OSError when the store does not give the data.
        """
        batch: list[Part] = []
        size = 0
        for name in names:
            saved = self.tensors[name]
            for offset, shape in split(saved.shape, ITEMSIZE[saved.dtype], PIECE):
                part = Part(name, offset, shape)
                more = Saved(saved.dtype, shape).bytes
                if batch and size + more > BATCH:
                    yield from self._load(batch)
                    batch, size = [], 0
                batch.append(part)
                size += more
        yield from self._load(batch)

    def whole(self, names: Sequence[str]) -> dict[str, Tensor]:
        """All of these tensors, in memory at once."""
        found = {name: torch.empty(self.tensors[name].shape, dtype=self._dtype(name)) for name in names}
        pieces = [LocalPiece(name, data, list(data.shape), [0] * data.dim()) for name, data in found.items()]
        self._fill(pieces)
        self.advance(self.bytes(names))
        return found

    def _load(self, batch: Sequence[Part]) -> Iterator[tuple[Part, Tensor]]:
        pieces = [
            LocalPiece(part.name, torch.empty(part.shape, dtype=self._dtype(part.name)), shape, part.offset)
            for part in batch
            for shape in [self.tensors[part.name].shape]
        ]
        self._fill(pieces)
        for part, piece in zip(batch, pieces, strict=True):
            self.advance(piece.nbytes)
            yield part, piece.data

    def _fill(self, pieces: Sequence[LocalPiece]) -> None:
        alone = World(0, 1, 0, torch.device("cpu"), grouped=False)
        try:
            load(self.storage, self.commit, self.manifest, pieces, alone, strict=False)
        except DamagedError:
            raise
        except CheckpointError as error:  # what is asked for is there: it is the store that does not give it
            raise OSError(str(error)) from error

    def _dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.tensors[name].dtype]


@contextlib.contextmanager
def opened(storage: Storage, commit: Commit, advance: Callable[[int], None]) -> Iterator[Exported]:
    """A checkpoint under a read lease. Raises CheckpointError, DamagedError, or OSError."""
    with lease(storage, commit):
        manifest = read_manifest(storage, commit)
        tensors: dict[str, Saved] = {}
        for rank in range(manifest.world_size):
            for name, tensor in read_part(storage, commit, manifest, rank).tensors.items():
                tensors.setdefault(name, Saved(tensor.dtype, tensor.shape))
        yield Exported(storage, commit, manifest, dict(sorted(tensors.items())), advance)


def export_torch(source: Exported, names: Sequence[str], target: str) -> None:
    """One file of torch.save: ``{"tensors": {name: tensor}, "state": {...}}``. Needs memory for all of it."""
    with new_file(target, source.bytes(names)) as stream:
        tensors = source.whole(names)
        torch.save({"tensors": tensors, "state": msgspec.to_builtins(source.manifest.state)}, stream)
