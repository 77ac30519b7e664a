"""Reads all of a checkpoint and says what is not as it was saved. In parallel, in bounded memory, and without torch."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import NamedTuple, TypeVar

import msgspec
from crc32c import crc32c

from llm.checkpoint.format import (
    MANIFEST,
    PARTS,
    CheckpointError,
    Commit,
    DamagedError,
    DataFile,
    Manifest,
    PartManifest,
    Piece,
    Tensor,
    part_name,
)
from llm.checkpoint.lineage import is_committed, read_manifest, read_part
from llm.utils.storage import Storage
from llm.utils.structs import ready

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 8 << 20  # bytes of a read; with THREADS of them at a time, this bounds the memory
THREADS = 8
PARTS_AHEAD = 4
SHOWN = 3  # tensors that the message about a file names

Held = list[tuple[str, Tensor, Piece]]  # what a file should hold, in the order of its bytes


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it was saved. ``tensor`` is empty where it is about a whole file."""

    file: str  # path in the run directory
    tensor: str = ""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {f'tensor {self.tensor} ' if self.tensor else ''}{self.what}"


class Report(msgspec.Struct, kw_only=True):
    """What was checked, and what was found."""

    commit: Commit
    bytes: int = 0  # that were read of data files
    tensors: int = 0
    damage: list[Damage] = []
    extra: list[str] = []  # files in its folder that are no part of it


class _Block(NamedTuple):
    begin: int
    end: int
    crc32c: int
    tensor: str


class _Read(NamedTuple):
    """One request: bytes ``begin`` to ``end`` of a file. Without blocks it is the file's header."""

    path: str
    begin: int
    end: int
    blocks: list[_Block]
    file: DataFile
    held: Held


class _Found(NamedTuple):
    """What a read gave. ``bad`` has the blocks whose content or absence is damage."""

    read: _Read
    bytes: int
    bad: list[_Block]
    damage: list[Damage]


def verify(
    storage: Storage, commit: Commit, progress: Callable[[int], None] | None = None, threads: int = THREADS
) -> Report:
    """Check every byte of a commit. ``progress`` is told how many bytes of data each read gave, from this thread.

    Raises OSError where the store does not answer, which proves nothing, and CheckpointError where the commit has
    another format or was removed in the meantime.
    """
    report = Report(commit=commit)
    try:
        manifest = read_manifest(storage, commit)
    except DamagedError as error:
        report.damage.append(_damage(f"{commit.path}/{MANIFEST}", error))
    else:
        _check_all(_Checker(storage, commit, manifest, report), progress, threads)
    if report.damage and not is_committed(storage, commit):
        raise CheckpointError(f"{commit.path} is not, or no longer, committed in {storage.url}")
    return report


def _check_all(checker: _Checker, progress: Callable[[int], None] | None, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool, closing(checker.parts(pool)) as parts:
        reads = (read for part in parts for read in checker.reads(part))
        with closing(_ahead(pool, checker.check, reads, 2 * threads)) as found:
            for each in found:
                checker.note(each)
                if progress is not None:
                    progress(each.bytes)
    checker.finish()


class _Checker:
    """The state of one verification. Only ``check`` and ``_read_part`` run in threads; they change nothing."""

    def __init__(self, storage: Storage, commit: Commit, manifest: Manifest, report: Report) -> None:
        self.storage, self.commit, self.manifest, self.report = storage, commit, manifest, report
        self.coverage = Coverage()
        self.sizes = storage.sizes(commit.path)
        self.known = {MANIFEST, PARTS}
        self.bad: dict[tuple[str, str], tuple[int, int]] = {}  # (file, tensor) -> damaged blocks, first byte
        self.whole = True  # all part manifests could be read

    def parts(self, pool: ThreadPoolExecutor) -> Generator[PartManifest]:
        """The part manifests that can be read."""
        for rank, part in enumerate(_ahead(pool, self._read_part, range(self.manifest.world_size), PARTS_AHEAD)):
            if isinstance(part, DamagedError):
                entry = self.manifest.parts[rank]
                path = f"{self.commit.path}/{part_name(rank, entry.bytes, entry.sha256)}"
                self.report.damage.append(_damage(path, part))
                self.whole = False
            else:
                self.coverage.add(part)
                yield part

    def _read_part(self, rank: int) -> PartManifest | DamagedError:
        try:
            return read_part(self.storage, self.commit, self.manifest, rank)
        except DamagedError as error:
            return error

    def reads(self, part: PartManifest) -> Iterator[_Read]:
        """What to read of the files of a part."""
        held: list[Held] = [[] for _ in part.files]
        for name, tensor in part.tensors.items():
            for piece in tensor.pieces:
                held[piece.file].append((name, tensor, piece))
        for file, pieces in zip(part.files, held, strict=True):
            pieces.sort(key=lambda each: (each[2].begin, each[1].bytes(each[2])))
            yield from self._reads_of_file(file, pieces)

    def _reads_of_file(self, file: DataFile, held: Held) -> Iterator[_Read]:
        path = f"{self.commit.path}/{file.name}"
        self.known.add(file.name)
        size = self.sizes.get(file.name)
        if size is None:
            what = "is a folder" if file.name in self.sizes else "is missing"
            self.report.damage.append(Damage(file=path, what=f"{what}; it should hold {_names(held)}"))
            return
        if size != file.bytes:
            self.report.damage.append(Damage(file=path, what=f"has {size} bytes, not {file.bytes}"))
        position = file.header
        for begin, end in [*((piece.begin, piece.begin + tensor.bytes(piece)) for _, tensor, piece in held),
                           (file.bytes, file.bytes)]:  # fmt: skip
            if begin > position:
                what = f"has bytes that belong to no tensor, {position} to {begin}"
                self.report.damage.append(Damage(file=path, what=what))
            position = max(position, end)
        yield _Read(path, 0, min(file.header, size), [], file, held)
        for blocks in _batches(held):
            end = min(blocks[-1].end, size)  # never ask for, or make room for, what is not there
            yield _Read(path, min(blocks[0].begin, end), end, blocks, file, held)

    def check(self, read: _Read) -> _Found:
        """Read, and compare the checksums."""
        try:
            data = memoryview(self.storage.read(read.path, read.begin, read.end) if read.end > read.begin else b"")
        except FileNotFoundError:
            return _Found(read, 0, read.blocks, [Damage(file=read.path, what="is missing")])
        if not read.blocks:
            return _Found(read, len(data), [], list(check_header(data, read.path, read.file, read.held)))
        bad = []
        for block in read.blocks:
            content = data[block.begin - read.begin : block.end - read.begin]
            if len(content) < block.end - block.begin or crc32c(content) != block.crc32c:
                bad.append(block)
        return _Found(read, len(data), bad, [])

    def note(self, found: _Found) -> None:
        """Add up what was found, by file and tensor: a bad disk must not fill the memory."""
        self.report.bytes += found.bytes
        self.report.damage.extend(found.damage)
        for block in found.bad:
            count, first = self.bad.get((found.read.path, block.tensor), (0, block.begin))
            self.bad[found.read.path, block.tensor] = count + 1, min(first, block.begin)

    def finish(self) -> None:
        """What shows only when everything was read."""
        for (path, tensor), (count, first) in self.bad.items():
            blocks = "a block" if count == 1 else f"{count} blocks"
            self.report.damage.append(
                Damage(file=path, tensor=tensor, what=f"has {blocks} damaged, from byte {first} on")
            )
        self.report.tensors = len(self.coverage.tensors)
        if self.whole:  # else the values of the part that cannot be read would be missing everywhere
            manifest = f"{self.commit.path}/{MANIFEST}"
            self.report.damage.extend(
                Damage(file=manifest, tensor=name, what=what) for name, what in self.coverage.wrong()
            )
        self.report.damage = sorted(set(self.report.damage), key=lambda each: (each.file, each.tensor, each.what))
        self.report.extra = sorted(set(self.sizes) - self.known)


class _Entry(msgspec.Struct):
    """A tensor in a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def check_header(data: memoryview, path: str, file: DataFile, held: Held) -> Iterator[Damage]:
    """Compare a safetensors header with its checksum and with what the part manifest says the file holds."""
    if len(data) < file.header or crc32c(data) != file.header_crc32c:
        yield Damage(file=path, what=f"has a damaged header; it should hold {_names(held)}")
        return
    if int.from_bytes(data[:8], "little") + 8 != file.header:
        yield Damage(file=path, what="has a header whose length is not what it says")
        return
    try:
        entries = msgspec.json.decode(data[8:], type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        there = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in entries.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        yield Damage(file=path, what="has a header that is not safetensors")
        return
    for name, tensor, piece in held:
        begin = piece.begin - file.header
        wanted = _Entry(tensor.dtype, piece.shape, (begin, begin + tensor.bytes(piece)))
        keys = (f"{name}@{','.join(map(str, piece.offset))}", name)
        if not any(there.get(key) == wanted and there.pop(key) for key in keys):
            what = f"is not in the header as {tensor.dtype} {piece.shape} at byte {piece.begin}"
            yield Damage(file=path, tensor=name, what=what)
    for name in there:
        yield Damage(file=path, tensor=name, what="is in the header, and in no part manifest")


class Coverage:
    """Whether the pieces of each tensor fill it, each value once, in a few numbers per tensor whatever their count.

    Each coordinate gets a random number; a piece measures the product over its dimensions of the difference between
    the numbers at its end and its start. The pieces' sum is the whole tensor's measure if every value is there once,
    and otherwise, but for a chance of less than 2**-50, not: it is a polynomial in those numbers.
    """

    PRIME = 2**61 - 1

    def __init__(self) -> None:
        self.key = secrets.token_bytes(16)
        self.tensors: dict[str, Tensor] = {}  # name -> type and shape
        self.measure: dict[str, int] = {}
        self.values: dict[str, int] = {}
        self.odd: dict[str, str] = {}

    def add(self, part: PartManifest) -> None:
        """Count what a rank saved."""
        for name, tensor in part.tensors.items():
            known = self.tensors.setdefault(name, msgspec.structs.replace(tensor, pieces=[]))
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                self.odd[name] = (
                    f"is {known.dtype} {known.shape}, but {tensor.dtype} {tensor.shape} in part {part.rank}"
                )
                continue
            for piece in tensor.pieces:
                ends = [begin + count for begin, count in zip(piece.offset, piece.shape, strict=True)]
                self.measure[name] = (self.measure.get(name, 0) + self._measure(piece.offset, ends)) % self.PRIME
                self.values[name] = self.values.get(name, 0) + math.prod(piece.shape)

    def wrong(self) -> Iterator[tuple[str, str]]:
        """(tensor, what is wrong with it) of those that are not covered."""
        for name, tensor in self.tensors.items():
            total, there = math.prod(tensor.shape), self.values.get(name, 0)
            if name in self.odd:
                yield name, self.odd[name]
            elif there < total:
                yield name, f"lacks {total - there} of {total} values"
            elif there > total:
                yield name, f"has {there} values where {total} belong"
            elif self.measure.get(name, 0) != self._measure([0] * len(tensor.shape), tensor.shape):
                yield name, "has values twice, and lacks as many others"

    def _measure(self, begin: Iterable[int], end: Iterable[int]) -> int:
        product = 1
        for dimension, (a, b) in enumerate(zip(begin, end, strict=True)):
            product = product * (self._number(dimension, b) - self._number(dimension, a)) % self.PRIME
        return product

    def _number(self, dimension: int, coordinate: int) -> int:
        digest = hashlib.blake2b(b"%d %d" % (dimension, coordinate), digest_size=8, key=self.key).digest()
        return int.from_bytes(digest, "little") % self.PRIME


def _batches(held: Held) -> Iterator[list[_Block]]:
    """The blocks of a file, in runs without a gap of about CHUNK bytes."""
    batch: list[_Block] = []
    for name, tensor, piece in held:
        end = piece.begin + tensor.bytes(piece)
        for begin, value in zip(range(piece.begin, end, piece.block), piece.checksums(), strict=True):
            block = _Block(begin, min(begin + piece.block, end), value, name)
            if batch and (block.begin != batch[-1].end or block.end - batch[0].begin > CHUNK):
                yield batch
                batch = []
            batch.append(block)
    if batch:
        yield batch


def _ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], count: int) -> Generator[R]:
    """The results of ``work``, in order, with at most ``count`` under way or waiting to be taken."""
    rest = iter(items)
    under_way: list[Future[R]] = []
    try:
        while True:
            under_way.extend(pool.submit(work, item) for item in islice(rest, count - len(under_way)))
            if not under_way:
                return
            yield under_way.pop(0).result()
    finally:
        for future in under_way:
            future.cancel()


def _damage(path: str, error: DamagedError) -> Damage:
    return Damage(file=path, what=str(error).removeprefix(path).lstrip(": "))


def _names(held: Held) -> str:
    names = list(dict.fromkeys(name for name, _, _ in held))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"tensors {', '.join(names[:SHOWN])}{more}" if names else "no tensor"


ready(_Entry)
