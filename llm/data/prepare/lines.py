"""Bytes of an input as lines: plain or compressed, a whole file or a part of one. The next block is read meanwhile."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llm.data.prepare.inputs import File, InputError, Piece, read

BLOCK = 8 << 20  # bytes of a request
BEYOND = 256 << 10  # behind the end of a part, where its last line ends
FED = 128 << 10  # bytes decompressed at a time: they may become a thousand times as many
LONGEST = 256 << 20  # bytes of a line
Progress = Callable[[int], None]  # is told of bytes of the file that have been read


def lines(file: File, piece: Piece, progress: Progress) -> Iterator[tuple[int, bytes]]:
    """Lines of a file from the first that begins in ``piece`` on: where it begins, what it is without its end.

    Goes on after the piece, to the end of the file: the caller knows where it has enough. Raises InputError.
    """
    begin = max(piece.start - 1, 0)  # the byte before tells whether a line begins at the start
    blocks = _blocks(file, begin, piece.end, progress)
    if file.packing:
        blocks = _decompressed(file, blocks)
    at, kept, size, skip = begin, [], 0, piece.start > 0
    for block in blocks:
        found = block.split(b"\n")
        kept.append(found[0])
        size += len(found[0])
        if size > LONGEST:
            raise InputError(f"{file.url}: a line of more than {LONGEST >> 20} MiB at byte {at}: these are no lines")
        if len(found) == 1:
            continue
        found[0] = b"".join(kept)
        kept = [found.pop()]
        size = len(kept[0])
        for line in found:
            if not skip:
                yield at, line
            skip = False
            at += len(line) + 1
    last = b"".join(kept)
    if last and not skip:
        yield at, last


def whole(file: File, progress: Progress) -> bytes:
    """All of a file, decompressed."""
    blocks = _blocks(file, 0, file.size, progress)
    return b"".join(_decompressed(file, blocks) if file.packing else blocks)


def _blocks(file: File, begin: int, end: int, progress: Progress) -> Iterator[bytes]:
    starts = range(begin, end, BLOCK)
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(read, file, start, min(start + BLOCK, end)) for start in starts[:1]]
        for index in range(len(starts)):
            block = ahead.pop().result()
            if index + 1 < len(starts):
                start = starts[index + 1]
                ahead.append(pool.submit(read, file, start, min(start + BLOCK, end)))
            progress(len(block))
            yield block
    for start in range(end, file.size, BEYOND):
        yield read(file, start, min(start + BEYOND, file.size))


def _decompressed(file: File, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """What ``blocks`` hold. Both formats may consist of several members, end to end."""
    make, errors = _decompressor(file)
    current: Any = make() if not file.size else None  # an empty file is no whole member
    for block in blocks:
        for at in range(0, len(block), FED):
            left = block[at : at + FED]
            while left := left if current is not None else left.lstrip(b"\0"):  # gzip may be filled up with zeros
                current = make() if current is None else current
                try:
                    out = current.decompress(left)
                except errors as error:
                    raise InputError(f"{file.url} is no {file.packing} file, or damaged: {error}") from error
                left = b""
                if current.eof:
                    left, current = current.unused_data, None
                if out:
                    yield out
    if current is not None:
        raise InputError(f"{file.url} is cut off: its last {file.packing} member is not complete; copy it again")


def _decompressor(file: File) -> tuple[Callable[[], Any], type[Exception]]:
    if file.packing == "gzip":
        return lambda: zlib.decompressobj(31), zlib.error
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise InputError(f"{file.url}: zstandard is not installed here: pip install 'llmops[data]'") from error
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # large dumps are made with --long=31
    return reader.decompressobj, zstandard.ZstdError
