"""Reading what a commit holds: contiguous spans of its files, every block checked before anyone sees a byte of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from crc32c import crc32c

from llm.checkpoint.format import Commit, DamagedError, DataFile, PartManifest, Piece
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import Storage

# Bytes of one read. From a store, what makes a request worth its round trip; from a file system, what stays in a
# core's cache until it is checked and copied.
SPAN, LOCAL_SPAN = 8 << 20, 4 << 20
WASTE = 32  # a gap of unneeded bytes is read when it is at most 1/WASTE of what comes before it


class Segment(NamedTuple):
    """The bytes ``begin`` .. ``end`` of a piece: whole blocks, or its end."""

    tensor: str
    piece: Piece
    begin: int
    end: int


@dataclass(slots=True)
class Span:
    """A contiguous part of a file: one read. It has the file's header where that lies before the first segment."""

    path: str
    file: DataFile
    begin: int
    end: int
    segments: list[Segment] = field(default_factory=list)

    def at(self, segment: Segment) -> int:
        """Where in the span a segment begins."""
        return segment.piece.begin + segment.begin - self.begin


def is_remote(storage: Storage) -> bool:
    """Does every read cost a request?"""
    return not isinstance(storage, LocalStorage)


def spans(
    commit: Commit, file: DataFile, needed: Sequence[Segment], limit: int, least: dict[str, int] | None = None
) -> list[Span]:
    """The reads for what is needed of one file, in its order, each segment cut where a span is full.

    ``limit`` is in bytes, of which a header in front takes none that a block needs; ``least`` has a lower one for some
    tensors.
    """
    path, found = f"{commit.path}/{file.name}", list[Span]()
    full = limit  # bytes that the last span may have
    for segment in sorted(needed, key=lambda each: each.piece.begin + each.begin):
        piece, at = segment.piece, segment.begin
        bound = limit if least is None else min(limit, least.get(segment.tensor, limit))
        while at < segment.end:
            begin, take = piece.begin + at, 0
            if found:
                length, gap = found[-1].end - found[-1].begin, begin - found[-1].end
                room = min(full, bound) - length - gap
                if room > 0 and gap * WASTE <= length:
                    take = _take(room, piece.block, segment.end - at)
                    full = min(full, bound)
            if not take:
                found.append(Span(path, file, 0 if begin == file.header else begin, begin))
                take = _take(max(bound, piece.block), piece.block, segment.end - at)
                full = bound
            found[-1].segments.append(Segment(segment.tensor, piece, at, at + take))
            found[-1].end = begin + take
            at += take
    return found


def _take(room: int, block: int, rest: int) -> int:
    """Bytes to take of ``rest``: all, or as many whole blocks as there is room for."""
    return rest if rest <= room else room // block * block


def whole(part: PartManifest, file: int) -> list[Segment]:
    """Everything in one file of a part."""
    return [
        Segment(name, piece, 0, tensor.bytes(piece))
        for name, tensor in part.tensors.items()
        for piece in tensor.pieces
        if piece.file == file
    ]


def read_span(
    storage: Storage, span: Span, buffer: memoryview, straight: Mapping[int, memoryview] | None = None
) -> None:
    """Read a span into the front of ``buffer`` and check all of it.

    ``straight`` has memory for some segments, by their number, that takes them instead: ``buffer`` has holes there.
    Raises DamagedError that names the file and the tensor, or OSError when the store did not give the bytes.
    """
    straight = straight or {}
    size = span.end - span.begin
    views, at = [], 0
    for number, view in sorted(straight.items()):
        begin = span.at(span.segments[number])
        views += [buffer[at:begin], view]
        at = begin + len(view)
    views.append(buffer[at:size])
    first = span.segments[0].tensor if span.segments else "its header"
    try:
        count = storage.read_into(span.path, span.begin, views)
    except FileNotFoundError:
        raise DamagedError(f"{span.path} is missing from a committed checkpoint (tensor {first})") from None
    except OSError as error:
        raise OSError(f"cannot read {span.path}: {error}") from error
    if count < size:
        raise DamagedError(_short(span, span.begin + count))
    if span.begin == 0 and crc32c(buffer[: span.file.header]) != span.file.header_crc32c:
        raise DamagedError(f"{span.path} is damaged: the CRC-32C of its header does not match (before tensor {first})")
    for number, segment in enumerate(span.segments):
        _check(span, segment, straight[number] if number in straight else buffer[span.at(segment) :])


def _check(span: Span, segment: Segment, data: memoryview) -> None:
    """``data`` begins with the segment."""
    block, size = segment.piece.block, segment.end - segment.begin
    first = segment.begin // block
    whole = range(0, size - size % block, block)
    found = [crc32c(data[at : at + block]) for at in whole]
    if size % block:
        found.append(crc32c(data[size - size % block : size]))
    expected = segment.piece.checksums()[first : first + len(found)].tolist()
    if found != expected:
        number = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        begin = segment.piece.begin + segment.begin + number * block
        end = min(begin + block, segment.piece.begin + segment.end)
        raise DamagedError(
            f"{span.path} is damaged: the CRC-32C of bytes {begin} to {end} does not match "
            f"(block {first + number} of tensor {segment.tensor} at {segment.piece.offset})"
        )


def _short(span: Span, end: int) -> str:
    lost = (each for each in span.segments if each.piece.begin + each.end > end)
    tensor = next((f"tensor {each.tensor}" for each in lost), "its header")
    return f"{span.path} is cut short: it ends at byte {end} of {span.file.bytes}, in {tensor}"


def part_spans(commit: Commit, part: PartManifest, limit: int = SPAN) -> Iterator[Span]:
    """The reads that check everything a rank saved. A file without data is a span of its header alone."""
    for number, file in enumerate(part.files):
        found = spans(commit, file, whole(part, number), limit)
        if not found or found[0].begin:
            found.insert(0, Span(f"{commit.path}/{file.name}", file, 0, file.header))
        yield from found
