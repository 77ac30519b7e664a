"""Sharded checkpoints: every rank writes and reads its own rows, and one small file commits them all.

The engine is synchronous. Its seam is small: ``newest_commit`` finds, :meth:`Checkpointer.load` reads, ``save`` writes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from llm.train.dist import World
from llm.train.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    Commit,
    Manifest,
    PartEntry,
    PartManifest,
    TensorPart,
    ancestors,
    decode,
    delete,
    part_name,
    read_manifest,
    seal,
    shard_name,
)
from llm.utils.sharding import place
from llm.utils.storage import Buffer, Storage

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Rows:
    """What this rank holds of one tensor: ``data`` starts at ``offset`` of the global ``shape``."""

    name: str
    data: Tensor
    shape: list[int]
    offset: list[int]

    @staticmethod
    def of(name: str, data: Tensor, whole: Tensor) -> Rows:
        """``data`` are this rank's rows of a tensor that is sharded as ``whole``."""
        shape = list(whole.shape)
        return Rows(name, data.detach(), shape, [place(whole)[0], *(0 for _ in shape[1:])] if shape else [])


class Checkpointer:
    """Saves and loads the checkpoints of one attempt. All ranks call each method together."""

    def __init__(self, storage: Storage, world: World, attempt: int, generation: int, keep_last: int) -> None:
        self.storage, self.world, self.keep_last = storage, world, keep_last
        self.attempt, self.generation = attempt, generation
        self.chain: list[Commit] = []  # rank 0: the commits that lead to the present state, oldest first

    def save(self, step: int, tensors: Iterable[Rows], state: dict[str, Any]) -> Commit:
        """Write and commit the state after ``step``; ``state`` is the same JSON on every rank.

        Returns once the commit is durable. Raises CheckpointError on every rank when any of them could not write.
        """
        commit = Commit(attempt=self.attempt, generation=self.generation, step=step)
        rows = [row for row in tensors if row.data.numel()]
        self._together(f"cannot save {commit.path}", lambda: self._write_part(commit, rows))
        self._together(f"cannot commit {commit.path}", lambda: self._commit(commit, state))
        if self.world.rank == 0:
            self.chain.append(commit)
            self._forget_old()
        return commit

    def load(self, commit: Commit, tensors: Iterable[Rows]) -> dict[str, Any]:
        """Fill ``tensors`` from ``commit``, saved by any number of ranks, and return its state.

        The random generators continue where they were when the number of ranks is the same. Raises CheckpointError
        that names the file, and the tensor, of anything missing or damaged.
        """
        state: dict[str, Any] = {}
        self._together(f"cannot load {commit.path}", lambda: state.update(self._load(commit, tensors)))
        return state

    def _load(self, commit: Commit, tensors: Iterable[Rows]) -> dict[str, Any]:
        manifest = read_manifest(self.storage, commit)
        parts = Parts(self.storage, commit, manifest, self.world.rank)
        for rows in tensors:
            parts.fill(rows)
        if manifest.world_size == self.world.size:
            restore_rng(parts.part(self.world.rank).rng, self.world.device)
        if self.world.rank == 0:
            self.chain = ancestors(self.storage, commit, manifest)
        return manifest.state

    def _write_part(self, commit: Commit, rows: list[Rows]) -> None:
        rank = self.world.rank
        header, spans = safetensors_header(rows)
        checksums: dict[str, int] = {}
        self.storage.write(f"{commit.path}/{shard_name(rank)}", _pieces(header, rows, checksums))
        part = PartManifest(
            format=FORMAT,
            rank=rank,
            file=shard_name(rank),
            bytes=max((end for _, end in spans.values()), default=len(header)),
            tensors={
                row.name: TensorPart(
                    dtype=NAMES[row.data.dtype],
                    shape=row.shape,
                    offset=row.offset,
                    local_shape=list(row.data.shape),
                    begin=spans[row.name][0],
                    end=spans[row.name][1],
                    crc32=checksums[row.name],
                )
                for row in rows
            },
            rng=capture_rng(self.world.device),
        )
        self.storage.write(f"{commit.path}/{part_name(rank)}", [msgspec.json.encode(part)])

    def _commit(self, commit: Commit, state: dict[str, Any]) -> None:
        """Rank 0 reads back every part manifest, which proves that all ranks write to the same place, and commits."""
        if self.world.rank:
            return
        entries = []
        for rank in range(self.world.size):
            path = f"{commit.path}/{part_name(rank)}"
            data = self.storage.read(path)
            part = decode(data, PartManifest, path)
            digest = hashlib.sha256(data).hexdigest()
            entries.append(
                PartEntry(rank=rank, manifest=part_name(rank), sha256=digest, file=part.file, bytes=part.bytes)
            )
        manifest = Manifest(
            format=FORMAT,
            step=commit.step,
            attempt=commit.attempt,
            generation=commit.generation,
            time=time.time(),
            world_size=self.world.size,
            parent=self.chain[-1].path if self.chain else None,
            parts=entries,
            state=state,
        )
        self.storage.create(f"{commit.path}/{MANIFEST}", seal(manifest))

    def _together(self, complaint: str, work: Callable[[], None]) -> None:
        """Do ``work``, wait for all ranks, and raise the same everywhere when it failed anywhere."""
        failure: OSError | CheckpointError | None = None
        try:
            work()
        except (OSError, CheckpointError) as error:
            failure = error
        if (reason := self.world.failure(None if failure is None else str(failure))) is not None:
            raise CheckpointError(f"{complaint} in {self.storage.url}: {reason}") from failure

    def _forget_old(self) -> None:
        """Keep the last ``keep_last`` commits of the chain. What an older attempt wrote beside it is left alone."""
        while len(self.chain) > self.keep_last:
            try:
                delete(self.storage, self.chain[0])
            except OSError as error:  # costs space, not the run
                print(f"cannot remove {self.chain[0].path}: {error}", file=sys.stderr, flush=True)
                return
            del self.chain[0]


class Parts:
    """What the ranks of one commit saved. Parts are read when needed, this rank's own first: often the only one."""

    def __init__(self, storage: Storage, commit: Commit, manifest: Manifest, rank: int) -> None:
        self.storage, self.commit, self.manifest = storage, commit, manifest
        self.order = sorted(range(manifest.world_size), key=lambda other: (other != rank, other))
        self.read: dict[int, PartManifest] = {}

    def part(self, rank: int) -> PartManifest:
        """The part manifest of ``rank``, checked against the commit's digest of it."""
        if rank not in self.read:
            entry = self.manifest.parts[rank]
            path = f"{self.commit.path}/{entry.manifest}"
            try:
                data = self.storage.read(path)
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing from a committed checkpoint") from None
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
            self.read[rank] = decode(data, PartManifest, path)
        return self.read[rank]

    def fill(self, rows: Rows) -> None:
        """Copy into ``rows`` whatever each part holds of them, until nothing is missing."""
        missing = rows.data.numel()
        for rank in self.order:
            if not missing:
                return
            part = self.part(rank)
            if (saved := part.tensors.get(rows.name)) is None:
                continue
            path = f"{self.commit.path}/{part.file}"
            if saved.shape != rows.shape:
                raise CheckpointError(f"{path}: tensor {rows.name} is {saved.shape}, the model wants {rows.shape}")
            box = overlap(rows.offset, list(rows.data.shape), saved.offset, saved.local_shape)
            if box is None:
                continue
            source, target = self._tensor(path, rows.name, saved), rows.data
            for dim, (begin, end) in enumerate(box):
                source = source.narrow(dim, begin - saved.offset[dim], end - begin)
                target = target.narrow(dim, begin - rows.offset[dim], end - begin)
            target.copy_(source)
            missing -= target.numel()
        if missing:
            total = rows.data.numel()
            raise CheckpointError(f"{self.commit.path} lacks {missing} of {total} values of tensor {rows.name}")

    def _tensor(self, path: str, name: str, saved: TensorPart) -> Tensor:
        try:
            data = bytearray(self.storage.read(path, saved.begin, saved.end))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing from a committed checkpoint (tensor {name})") from None
        if len(data) != saved.end - saved.begin:
            raise CheckpointError(f"{path} is cut short: tensor {name} ends at byte {saved.end}")
        if zlib.crc32(data) != saved.crc32:
            raise CheckpointError(f"{path} is damaged: the CRC-32 of tensor {name} does not match")
        return torch.frombuffer(data, dtype=DTYPES[saved.dtype]).view(saved.local_shape)


def overlap(a: list[int], a_shape: list[int], b: list[int], b_shape: list[int]) -> list[tuple[int, int]] | None:
    """Where two boxes of the same tensor meet: a range per dimension, or None."""
    box = [(max(x, y), min(x + n, y + m)) for x, n, y, m in zip(a, a_shape, b, b_shape, strict=True)]
    return box if all(begin < end for begin, end in box) else None


def safetensors_header(rows: list[Rows]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The head of a safetensors file, and where in the file each tensor lies."""
    entries: dict[str, Any] = {}
    position = 0
    for row in rows:
        end = position + row.data.numel() * row.data.element_size()
        entries[row.name] = {
            "dtype": NAMES[row.data.dtype],
            "shape": list(row.data.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    start = 8 + len(text)
    spans = {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for name, entry in entries.items()
    }
    return len(text).to_bytes(8, "little") + text, spans


def _pieces(header: bytes, rows: list[Rows], checksums: dict[str, int]) -> Iterator[Buffer]:
    """The bytes of the file. Tensors on the CPU are not copied; others pass through memory one at a time."""
    yield header
    for row in rows:
        flat = row.data.cpu().contiguous().view(-1).view(torch.uint8)
        data = flat.numpy().data
        checksums[row.name] = zlib.crc32(data)
        yield data


def capture_rng(device: torch.device) -> dict[str, str]:
    """State of the generators that this rank may draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def restore_rng(rng: dict[str, str], device: torch.device) -> None:
    """The inverse of :func:`capture_rng`; a generator of another kind of device is left as it is."""
    for name, text in rng.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == device.type:
            torch.cuda.set_rng_state(state, device)
