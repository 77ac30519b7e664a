"""Who reads what of a checkpoint, and who gets it: the same plan on every rank, from the same facts.

A tensor is read in one of two ways. *Direct*: each rank reads the blocks that it needs; best where ranks need different
rows. *Exchange*: every block that anyone needs is read by one rank, in long spans, and passed on to the others; best
where they all need the same rows (replicas, columns), or rows so few that the reads would be small.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from llm.checkpoint.boxes import Box, Dims, Index, merge, of_bytes, ranges, slabs, within
from llm.checkpoint.format import (
    ITEMSIZE,
    MAX_BLOCK,
    CheckpointError,
    Commit,
    DamagedError,
    PartManifest,
    Piece,
    file_name,
)
from llm.checkpoint.reader import LOCAL_SPAN, SPAN, Segment, Span, spans

ROUND = 32 << 20  # bytes that a rank sends, or receives, before the next round
DIRECT_WASTE, LOCAL_DIRECT_WASTE = 1.02, 1.25  # bytes read by all ranks over bytes needed, at most, for direct reads
DIRECT_READ = 4 << 20  # from a store, direct reads have at least so many bytes on average
LOCAL_DIRECT_READ = 64 << 10  # a rank's read of a tensor that is not worth telling others about
SHOWN = 10


class Want(msgspec.Struct, frozen=True, array_like=True):
    """A box of a tensor that a rank is to fill: ``extent`` values at ``offset`` of the whole ``shape``."""

    name: str
    dtype: str
    shape: list[int]
    offset: list[int]
    extent: list[int]

    @property
    def box(self) -> Box:
        """The same in bytes."""
        return of_bytes(self.offset, self.extent, ITEMSIZE[self.dtype])


class Copy(NamedTuple):
    """Bytes of a span that go into a target. All shapes count bytes along the last dimension."""

    at: int  # where in the span the slab begins
    slab: Dims  # shape of a row-major array in the span
    inside: Box  # what of the slab is wanted
    rank: int  # who wants it
    target: int  # the number of the want
    offset: Dims  # where in the target it goes


@dataclass(slots=True)
class Read:
    """A span, and what becomes of it."""

    span: Span
    copies: list[Copy]


Round = dict[int, list[Read]]  # rank -> what it reads before the ranks exchange
Wants = Mapping[int, Sequence[tuple[int, Want]]]  # rank -> its wants and the numbers that it gave them


class _Need(NamedTuple):
    rank: int
    which: int  # its number among all that is wanted of the tensor
    origin: Dims  # of the target, as seen from the piece
    box: Box  # what of the piece


class _Layout(NamedTuple):
    """How one layout of a tensor becomes another. Layers and optimizer states repeat the same few."""

    needs: list[list[_Need]]  # of each piece
    blocks: list[dict[int, list[tuple[int, int]]]]  # of each piece: rank -> the bytes that it has to read
    unique: list[list[tuple[int, int]]]  # of each piece: the bytes that anyone has to read
    direct: bool
    span: int  # bytes of a read that all of its receivers get in one round


@dataclass(slots=True)
class _Stored:
    """A piece that a part holds, and who needs what of it."""

    part: int
    tensor: str
    piece: Piece
    box: Box
    needs: list[_Need] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)  # the target of a need, by its `which`


class _Misfit(NamedTuple):
    """Why a tensor cannot be put together."""

    clash: tuple[int, int] | None
    lacking: int


def check(commit: Commit, parts: Sequence[PartManifest], wants: Wants, unexpected: Iterable[str]) -> None:
    """Does the checkpoint have what is wanted? Raises CheckpointError that lists the first ten that do not fit."""
    saved: dict[str, tuple[str, list[int]]] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if saved.setdefault(name, (tensor.dtype, tensor.shape)) != (tensor.dtype, tensor.shape):
                raise DamagedError(
                    f"{commit.path}: the ranks that saved tensor {name} disagree about its shape or type"
                )
    missing, different = dict[str, None](), dict[str, None]()
    for _, want in itertools.chain.from_iterable(wants.values()):
        if want.name not in saved:
            missing[want.name] = None
        elif saved[want.name] != (want.dtype, want.shape):
            dtype, shape = saved[want.name]
            different[f"{want.name} is {dtype} {shape}, wanted is {want.dtype} {want.shape}"] = None
        elif any(o + n > whole for o, n, whole in zip(want.offset, want.extent, want.shape, strict=True)):
            different[f"{want.name} has {want.shape}, wanted is {want.extent} at {want.offset}"] = None
    complaints = [
        f"{len(names)} {what}: {_few(names)}"
        for names, what in (
            (sorted(missing), "missing in the checkpoint"),
            (sorted(set(unexpected)), "unexpected in the checkpoint"),
            (list(different), "of another shape or type"),
        )
        if names
    ]
    if complaints:
        raise CheckpointError(f"{commit.path} does not fit the tensors of this job: {'; '.join(complaints)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def alone(parts: Sequence[PartManifest], wants: Sequence[Want]) -> set[str]:
    """Names of the tensors of which these parts, that no other rank reads, have all that is wanted."""
    by_name: dict[str, list[Want]] = defaultdict(list)
    for want in wants:
        by_name[want.name].append(want)
    found = set()
    for name, boxes in by_name.items():
        saved = [part.tensors[name] for part in parts if name in part.tensors]
        if not saved or any(
            (tensor.dtype, tensor.shape) != (want.dtype, want.shape) for tensor in saved for want in boxes
        ):
            continue
        size = ITEMSIZE[saved[0].dtype]
        if len(boxes) == 1 and sum(len(tensor.pieces) for tensor in saved) == 1:
            (want,), (piece,) = boxes, next(tensor.pieces for tensor in saved if tensor.pieces)
            if want.offset == piece.offset and want.extent == piece.shape:
                found.add(name)
                continue
        pieces = [of_bytes(piece.offset, piece.shape, size) for tensor in saved for piece in tensor.pieces]
        index = Index([piece for piece in pieces if piece.size])
        if index.clash() is None and all(
            sum(common.size for _, common in index.hits(want.box)) == want.box.size for want in boxes
        ):
            found.add(name)
    return found


def plan(
    commit: Commit, parts: Sequence[PartManifest], wants: Wants, me: int, size: int, remote: bool
) -> tuple[list[Read], list[Round]]:
    """What rank ``me`` of ``size`` reads for itself, and the rounds of the exchange, the same on every rank.

    Every wanted byte is in exactly one Copy to its target. Raises DamagedError when the checkpoint lacks some of them.
    """
    limit = SPAN if remote else LOCAL_SPAN
    own: list[tuple[_Stored, int, int]] = []
    shared: list[tuple[_Stored, int, int]] = []
    least: dict[str, int] = {}
    by_name: dict[str, list[tuple[int, int, Box]]] = defaultdict(list)
    for rank, listed in wants.items():
        for target, want in listed:
            if (box := want.box).size:
                by_name[want.name].append((rank, target, box))
    known: dict[Hashable, _Layout | _Misfit] = {}
    for name, wanted in by_name.items():
        pieces = _pieces(parts, name)
        targets = [target for _, target, _ in wanted]
        key = tuple((each.box, each.piece.block) for each in pieces), tuple((rank, box) for rank, _, box in wanted)
        if (layout := known.get(key)) is None:
            layout = known[key] = _lay_out(*key, size, remote)
        if isinstance(layout, _Misfit):
            raise DamagedError(f"{commit.path}: {_explain(layout, name, pieces)}")
        for stored, needs in zip(pieces, layout.needs, strict=True):
            stored.needs, stored.targets = needs, targets
        if layout.direct:
            for stored, ranks in zip(pieces, layout.blocks, strict=True):
                own += [(stored, *each) for each in ranks.get(me, ())]
        else:
            shared += [(stored, *each) for stored, all in zip(pieces, layout.unique, strict=True) for each in all]
            least[name] = layout.span
    return _reads(commit, parts, own, limit, {}, me), _rounds(_reads(commit, parts, shared, limit, least, None), size)


def _pieces(parts: Sequence[PartManifest], name: str) -> list[_Stored]:
    """The pieces of a tensor, one of each: what several ranks saved alike is read from the first of them."""
    found: dict[Box, _Stored] = {}
    for part in parts:
        if (tensor := part.tensors.get(name)) is not None:
            for piece in tensor.pieces:
                if (box := of_bytes(piece.offset, piece.shape, ITEMSIZE[tensor.dtype])).size:
                    found.setdefault(box, _Stored(part.rank, name, piece, box))
    return list(found.values())


def _explain(misfit: _Misfit, name: str, pieces: list[_Stored]) -> str:
    if misfit.clash is not None:
        one, other = (file_name(pieces[each].part, pieces[each].piece.file) for each in misfit.clash)
        return f"pieces of tensor {name} in {one} and {other} overlap"
    return f"{misfit.lacking} wanted bytes of tensor {name} are in no file"


def _lay_out(
    pieces: tuple[tuple[Box, int], ...], wanted: tuple[tuple[int, Box], ...], size: int, remote: bool
) -> _Layout | _Misfit:
    """``pieces`` are boxes and the bytes of their blocks, ``wanted`` ranks and the boxes that they want."""
    index = Index([box for box, _ in pieces])
    if (clash := index.clash()) is not None:
        return _Misfit(clash, 0)
    needs: list[list[_Need]] = [[] for _ in pieces]
    for which, (rank, box) in enumerate(wanted):
        lacking = box.size
        for number, common in index.hits(box):
            corner = pieces[number][0].offset
            needs[number].append(_Need(rank, which, within(box, corner).offset, within(common, corner)))
            lacking -= common.size
        if lacking:
            return _Misfit(None, lacking)
    blocks = [_blocks(*piece, each) for piece, each in zip(pieces, needs, strict=True)]
    unique = [merge(list(itertools.chain.from_iterable(ranks.values()))) for ranks in blocks]
    reads = [end - begin for ranks in blocks for listed in ranks.values() for begin, end in listed]
    needed = sum(end - begin for listed in unique for begin, end in listed)
    copied = sum(box.size for _, box in wanted)
    span = max(ROUND * needed // copied, MAX_BLOCK)
    return _Layout(needs, blocks, unique, size == 1 or _is_direct(reads, needed, size, remote), span)


def _blocks(box: Box, block: int, needs: list[_Need]) -> dict[int, list[tuple[int, int]]]:
    """Rank -> the bytes of a piece that it has to read, to get what it needs: whole blocks."""
    size = box.size
    found: dict[int, list[tuple[int, int]]] = {}
    for need in needs:
        found.setdefault(need.rank, []).extend(
            (begin // block * block, min(-(-end // block) * block, size))
            for begin, end in ranges(box.shape, need.box, 4 * block)
        )
    return {rank: merge(listed) for rank, listed in found.items()}


def _is_direct(reads: list[int], needed: int, size: int, remote: bool) -> bool:
    """Does each rank read a tensor for itself? ``reads`` has the bytes of each of these reads."""
    total = sum(reads)
    if remote:
        return total <= DIRECT_WASTE * needed and total >= DIRECT_READ * len(reads)
    return total <= max(LOCAL_DIRECT_WASTE * needed, LOCAL_DIRECT_READ * size)


def _reads(
    commit: Commit,
    parts: Sequence[PartManifest],
    needed: list[tuple[_Stored, int, int]],
    limit: int,
    least: dict[str, int],
    only: int | None,
) -> list[Read]:
    """Spans of what is ``needed``, with the copies to all ranks or to one."""
    files = {part.rank: part.files for part in parts}
    grouped: dict[tuple[int, int], list[tuple[_Stored, int, int]]] = defaultdict(list)
    for each in needed:
        grouped[each[0].part, each[0].piece.file].append(each)
    found = []
    for (part, file), inside in sorted(grouped.items()):
        indexed = {}
        for stored, _, _ in inside:
            needs = [need for need in stored.needs if only is None or need.rank == only]
            indexed[stored.piece.begin] = stored, needs, Index([need.box for need in needs])
        segments = [Segment(stored.tensor, stored.piece, begin, end) for stored, begin, end in inside]
        for span in spans(commit, files[part][file], segments, limit, least):
            copies = []
            for segment in span.segments:
                stored, needs, index = indexed[segment.piece.begin]
                for at, slab in slabs(stored.box.shape, segment.begin, segment.end):
                    start = span.at(segment) + at - segment.begin
                    for number, common in index.hits(slab):
                        need = needs[number]
                        to = within(common, need.origin).offset
                        inner = within(common, slab.offset)
                        copies.append(Copy(start, slab.shape, inner, need.rank, stored.targets[need.which], to))
            found.append(Read(span, copies))
    return found


def _rounds(reads: list[Read], size: int) -> list[Round]:
    """A reader for each span, the one that needs most of it while the shares are even; then rounds of bounded size."""
    total = sum(read.span.end - read.span.begin for read in reads)
    share = total / size + SPAN
    load = [0] * size
    queues: list[list[tuple[Read, Counter[int]]]] = [[] for _ in range(size)]
    for read in reads:
        wanted: Counter[int] = Counter()
        for copy in read.copies:
            wanted[copy.rank] += copy.inside.size
        length = read.span.end - read.span.begin
        # most wanted first, and the less loaded one of equals
        order = sorted(wanted, key=lambda rank: (-wanted[rank], load[rank], rank))
        reader = next((rank for rank in order if load[rank] + length <= share), None)
        if reader is None:
            reader = min(range(size), key=lambda rank: load[rank])
        load[reader] += length
        del wanted[reader]  # what stays there is not sent
        queues[reader].append((read, wanted))
    rounds: list[Round] = []
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for turn in itertools.zip_longest(*queues):  # every rank's first read, every rank's second
        for rank, queued in enumerate(turn):
            if queued is None:
                continue
            read, wanted = queued
            out = sum(wanted.values())
            full = sent[rank] + out > ROUND or any(received[to] + count > ROUND for to, count in wanted.items())
            if not rounds or (full and out):
                rounds.append({})
                sent, received = Counter(), Counter()
            rounds[-1].setdefault(rank, []).append(read)
            sent[rank] += out
            received.update(wanted)
    return rounds


def outgoing(reads: Sequence[Read], me: int, size: int) -> tuple[list[int], list[list[int]]]:
    """(bytes that ``me`` sends to each rank, where in its message each copy of each read goes; -1 for its own)."""
    sizes = [0] * size
    for read in reads:
        for copy in read.copies:
            if copy.rank != me:
                sizes[copy.rank] += copy.inside.size
    free = list(itertools.accumulate(sizes, initial=0))
    places = []
    for read in reads:
        row = []
        for copy in read.copies:
            row.append(free[copy.rank] if copy.rank != me else -1)
            if copy.rank != me:
                free[copy.rank] += copy.inside.size
        places.append(row)
    return sizes, places


def incoming(turn: Round, me: int, size: int) -> tuple[list[int], list[tuple[int, Copy]]]:
    """(bytes that ``me`` gets from each rank, where in what it gets each copy lies)."""
    sizes, found, at = [0] * size, [], 0
    for rank in range(size):
        for read in turn.get(rank, ()) if rank != me else ():
            for copy in read.copies:
                if copy.rank == me:
                    found.append((at, copy))
                    at += copy.inside.size
                    sizes[rank] += copy.inside.size
    return sizes, found
