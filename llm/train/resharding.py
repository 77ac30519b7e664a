"""Loading a checkpoint of any number of ranks and any layout into the tensors of this job, all ranks together."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from llm.checkpoint.boxes import Box, Dims
from llm.checkpoint.format import CheckpointError, Commit, DamagedError, Manifest, PartManifest
from llm.checkpoint.lineage import read_part
from llm.checkpoint.plan import Copy, Read, Round, Want, alone, check, incoming, outgoing, plan
from llm.checkpoint.reader import is_remote, read_span
from llm.train.pieces import NAMES, LocalPiece
from llm.train.world import World
from llm.utils.storage import Storage
from llm.utils.structs import ready

STRAIGHT = 64 << 10  # bytes from which on it pays to read a segment into the target itself
T = TypeVar("T")
Bytes = NDArray[np.uint8]

LOCAL_THREADS = min(8, max(2, (os.cpu_count() or 2) // 2))  # of a file system; what is read is in the cache, or soon


def load(
    storage: Storage,
    commit: Commit,
    manifest: Manifest,
    targets: Sequence[LocalPiece],
    world: World,
    connections: int = 8,
    strict: bool = True,
    prefixes: Sequence[str] = ("",),
) -> dict[str, str] | None:
    """Fill ``targets`` in place from ``commit``. All ranks call it together, each with its own targets.

    ``strict``: every tensor of the checkpoint whose name begins with one of ``prefixes`` must be a target of some rank.
    Returns the states of the random generators that this rank saved, or None when the number of ranks was another.

    Every block is checked before a value of it is copied. Raises the same on every rank: CheckpointError before any
    data is read when tensors are missing, unexpected, or of another shape or type; DamagedError when any rank has
    proof of damage; CheckpointError with the reason when the store does not give the data. After an error the targets
    hold anything.

    Memory on top of the targets: ``connections`` reads of 8 MiB; where ranks exchange, two messages to send and one
    received, of 32 MiB each or 1 MiB for each of more than 32 receivers of the same; and what the part manifests say of
    tensors that are not read alone, about 1 kB per piece.
    """
    complaint = f"cannot load {commit.path} from {storage.url}"
    threads = connections if is_remote(storage) else min(connections, LOCAL_THREADS)
    with ThreadPoolExecutor(threads, thread_name_prefix="load") as pool:
        parts: list[PartManifest] = []
        failure: OSError | CheckpointError | None = None
        ranks = _share(manifest.world_size, world)
        try:
            parts += pool.map(lambda rank: read_part(storage, commit, manifest, rank), ranks)
        except (OSError, CheckpointError) as error:
            failure = error
        with _collector_paused():
            own, rounds = _agree(
                commit, parts, targets, world, prefixes if strict else (), is_remote(storage), failure, complaint
            )
        filler = _Filler(storage, targets, world, pool, threads)
        world.raise_together(filler.fill(own, rounds), complaint)
    rng = {part.rank: part.rng for part in parts}
    return rng[world.rank] if manifest.world_size == world.size else None


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """A plan is many small objects, none of them in a cycle: looking for cycles would take longer than the plan."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def together(world: World, complaint: str, work: Callable[[], T]) -> T:
    """Do ``work`` and wait for all ranks; raise the same error everywhere when it failed on any of them."""
    failure: OSError | CheckpointError | None = None
    result: list[T] = []
    try:
        result.append(work())
    except (OSError, CheckpointError) as error:
        failure = error
    world.raise_together(failure, complaint)
    return result[0]


# --- what there is, and what is wanted -------------------------------------------------------------------------------


class _Asked(msgspec.Struct, array_like=True):
    """What a rank's own share of the parts does not give it, and the tensors there that it has no use for."""

    wants: list[Want]
    foreign: list[str]
    failure: str | None  # why it does not have its share
    damaged: bool


class _Told(msgspec.Struct, array_like=True):
    """What a rank knows of the tensors that any rank asked about."""

    parts: list[PartManifest]
    wants: list[tuple[int, Want]]  # all its targets among them, by number
    known: list[str]  # foreign names that are targets here


def _share(saved: int, world: World) -> range:
    """The ranks of the checkpoint whose part manifests this rank reads: neighbours, which may be all that it needs."""
    if not world.grouped:
        return range(saved)
    return range(world.rank * saved // world.size, (world.rank + 1) * saved // world.size)


def _agree(
    commit: Commit,
    parts: list[PartManifest],
    targets: Sequence[LocalPiece],
    world: World,
    prefixes: Sequence[str],
    remote: bool,
    failure: OSError | CheckpointError | None,
    complaint: str,
) -> tuple[list[Read], list[Round]]:
    """The plan of this rank, after all ranks have told each other what does not go without help."""
    wants = [
        Want(piece.name, NAMES[piece.data.dtype], piece.shape, piece.offset, list(piece.data.shape))
        for piece in targets
    ]
    size, rank = (world.size, world.rank) if world.grouped else (1, 0)
    mine = {want.name for want in wants}
    theirs = {name for part in parts for name in part.tensors if name.startswith(tuple(prefixes))}
    simple = alone(parts, wants) if size > 1 else set()
    unserved = [] if failure is not None else [want for want in wants if want.name not in simple]
    reason = None if failure is None else str(failure)
    everyone = _gather(world, _Asked(unserved, sorted(theirs - mine), reason, isinstance(failure, DamagedError)))
    _raise_first(everyone, complaint, failure)
    names = {want.name for each in everyone for want in each.wants}
    foreign = {name for each in everyone for name in each.foreign} - names

    rest = [(number, want) for number, want in enumerate(wants) if want.name not in names]
    own = plan(commit, parts, {rank: rest}, rank, 1, remote)[0]
    if not names and not foreign:
        return own, []

    told = _gather(
        world,
        _Told(
            [_only(part, names) for part in parts],
            [(number, want) for number, want in enumerate(wants) if want.name in names],
            sorted(foreign & mine),
        ),
    )
    everything = [part for each in told for part in each.parts]
    shared = {other: each.wants for other, each in enumerate(told)}
    check(commit, everything, shared, foreign - {name for each in told for name in each.known})
    more, rounds = plan(commit, everything, shared, rank, size, remote)
    return own + more, rounds


def _raise_first(everyone: list[_Asked], complaint: str, cause: Exception | None) -> None:
    """Raise the same on every rank if any has failed: damage, or else what the first of them could not read."""
    failed = [(not each.damaged, rank, each.failure) for rank, each in enumerate(everyone) if each.failure is not None]
    if failed:
        undamaged, rank, reason = min(failed)
        who = f"rank {rank}: " if len(everyone) > 1 else ""
        raise (CheckpointError if undamaged else DamagedError)(f"{complaint}: {who}{reason}") from cause


def _only(part: PartManifest, names: set[str]) -> PartManifest:
    kept = {name: tensor for name, tensor in part.tensors.items() if name in names}
    return msgspec.structs.replace(part, tensors=kept, rng={})


S = TypeVar("S", _Asked, _Told)


def _gather(world: World, message: S) -> list[S]:
    if not world.grouped:
        return [message]
    received = world.all_gather_bytes(msgspec.json.encode(message))
    return [msgspec.json.decode(data, type=type(message)) for data in received]


# --- the bytes -------------------------------------------------------------------------------------------------------


_Job = tuple[Read, Bytes | None, list[int]]  # the message to others, and where each copy goes in it


class _Filler:
    """Reads in threads, copies what is for this rank, and passes on what is for others."""

    def __init__(
        self,
        storage: Storage,
        targets: Sequence[LocalPiece],
        world: World,
        pool: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        self.storage, self.world, self.pool, self.threads = storage, world, pool, threads
        self.rank, self.size = (world.rank, world.size) if world.grouped else (0, 1)
        self.targets = [_Target(piece.data) for piece in targets]
        self.failure: OSError | CheckpointError | None = None
        self.stopped = False
        self.lock = threading.Lock()
        self.local = threading.local()

    def fill(self, own: list[Read], rounds: list[Round]) -> OSError | CheckpointError | None:
        """Read everything of the plan; returns what stopped this rank. Another rank's failure ends it early."""
        prepared = [self._prepare(turn) for turn in rounds[:1]]
        rest = self._start([(read, None, []) for read in own])
        for number, turn in enumerate(rounds):
            if number + 1 < len(rounds):  # the next is read while this one is exchanged
                prepared.append(self._prepare(rounds[number + 1]))
            workers, message, sizes = prepared.pop(0)
            _wait(workers)
            if self.world.any(self.failure is not None):
                self.stopped = True
                break
            self._exchange(turn, message, sizes)
        _wait(rest)
        return self.failure

    def _prepare(self, turn: Round) -> tuple[list[Future[None]], Bytes, list[int]]:
        reads = turn.get(self.rank, [])
        sizes, places = outgoing(reads, self.rank, self.size)
        message = np.empty(sum(sizes), np.uint8)
        return self._start([(read, message, row) for read, row in zip(reads, places, strict=True)]), message, sizes

    def _start(self, jobs: list[_Job]) -> list[Future[None]]:
        """Let all threads work on ``jobs``, after what they have been given before."""
        queue = deque(jobs)
        return [self.pool.submit(self._work, queue) for _ in range(min(self.threads, len(jobs)))]

    def _work(self, queue: deque[_Job]) -> None:
        while not self.stopped:
            try:
                read, message, places = queue.popleft()
            except IndexError:
                return
            self._read(read, message, places)

    def _exchange(self, turn: Round, message: Bytes, sizes: list[int]) -> None:
        expected, copies = incoming(turn, self.rank, self.size)
        if not any(copy.rank != rank for rank, reads in turn.items() for read in reads for copy in read.copies):
            return
        data = self.world.exchange(torch.from_numpy(message), sizes, expected).numpy()
        for at, copy in copies:
            shape = copy.inside.shape
            source = data[at : at + copy.inside.size].reshape(shape)
            self.targets[copy.target].put(Box(copy.offset, shape), source)

    def _read(self, read: Read, message: Bytes | None, places: list[int]) -> None:
        """Runs in a thread. After a failure there is nothing left to do: no round ends without a look at it."""
        data = self._buffer(read.span.end - read.span.begin)
        straight, copies = self._straight(read)
        try:
            read_span(self.storage, read.span, data.data, straight)
        except (OSError, CheckpointError) as error:
            with self.lock:  # damage outranks what could not be read
                if self.failure is None or isinstance(error, CheckpointError):
                    self.failure = error
            self.stopped = True
            return
        for number in copies:
            copy = read.copies[number]
            shape = copy.inside.shape
            slab = _view(data, copy.at, copy.slab)
            source = slab if shape == copy.slab else slab[_slices(copy.inside)]
            if message is None or places[number] < 0:
                self.targets[copy.target].put(Box(copy.offset, shape), source)
            else:
                _view(message, places[number], shape)[...] = source

    def _straight(self, read: Read) -> tuple[dict[int, memoryview], list[int]]:
        """(memory of targets that takes whole segments as they come, by number; numbers of the copies left to make)."""
        found: dict[int, memoryview] = {}
        left: list[int] = []
        after = 0
        for number, segment in enumerate(read.span.segments):
            begin = read.span.at(segment)
            end = begin + segment.end - segment.begin
            first = after
            while after < len(read.copies) and read.copies[after].at < end:
                after += 1
            view = self._run(read.copies[first:after], begin, end) if end - begin >= STRAIGHT else None
            if view is None:
                left += range(first, after)
            else:
                found[number] = view
        return found, left

    def _run(self, copies: list[Copy], begin: int, end: int) -> memoryview | None:
        """The memory to which ``copies`` take the bytes ``begin`` .. ``end`` of a span, if they leave their order."""
        if {(copy.rank, copy.target) for copy in copies} != {(self.rank, copies[0].target if copies else -1)}:
            return None
        target, at, first = self.targets[copies[0].target], begin, 0
        for copy in copies:
            place = target.place(Box(copy.offset, copy.inside.shape))
            if place is None or copy.at != at or copy.inside.shape != copy.slab:
                return None
            if at == begin:
                first = place
            if place - first != at - begin:
                return None
            at += copy.inside.size
        return target.run(first, end - begin) if at == end else None

    def _buffer(self, size: int) -> Bytes:
        """Memory of this thread, used again: it stays in the core's cache."""
        buffer: Bytes | None = getattr(self.local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self.local.buffer = np.empty(size, np.uint8)
        return buffer[:size]


class _Target:
    """A tensor as an array of bytes, along its last dimension; one of no dimensions is an array of one value."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()
        if not tensor.dim():
            self.tensor = self.tensor.reshape(1)
        self.itemsize = tensor.element_size()
        self.flat = self.tensor.stride(-1) == 1 or not tensor.numel()
        self.bytes = self.tensor.view(torch.uint8) if self.flat else None
        self.array = self.bytes.numpy() if self.bytes is not None and tensor.device.type == "cpu" else None

    def place(self, where: Box) -> int | None:
        """Where the bytes of ``where`` begin in the memory of the target, if they lie there one after the other."""
        if self.array is None or not self.array.flags.c_contiguous:
            return None
        part = self.array[_slices(where)]
        if not part.flags.c_contiguous:
            return None
        return int(part.ctypes.data - self.array.ctypes.data)

    def run(self, at: int, size: int) -> memoryview:
        """``size`` bytes of the target's memory from ``at`` on."""
        assert self.array is not None
        return self.array.reshape(-1)[at : at + size].data

    def put(self, where: Box, source: Bytes) -> None:
        """Copy ``source`` to ``where``."""
        if self.array is not None:
            self.array[_slices(where)] = source
        elif self.bytes is not None:
            self.bytes[_slices(where)].copy_(torch.from_numpy(np.ascontiguousarray(source)))
        else:  # the values of a row do not lie side by side
            *outer, last = _slices(where)
            values = torch.from_numpy(np.array(source)).view(self.tensor.dtype)
            columns = slice(last.start // self.itemsize, last.stop // self.itemsize)
            self.tensor[(*outer, columns)].copy_(values)


def _wait(workers: list[Future[None]]) -> None:
    for worker in workers:
        worker.result()  # the store bounds every read


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))


def _view(data: Bytes, at: int, shape: Dims) -> Bytes:
    size = 1
    for n in shape:
        size *= n
    return data[at : at + size].reshape(shape)


ready(_Asked, _Told)
