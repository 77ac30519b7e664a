"""Rows of Parquet files, by row group. pyarrow is imported by those who have such files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from llm.data.prepare.inputs import File, InputError, Piece, read
from llm.data.prepare.lines import Progress

AHEAD = 4 << 20  # bytes of a request: pyarrow asks for little pieces
ROWS = 512  # turned into Python objects at a time


class _Seekable(io.RawIOBase):
    """A file of the inputs for pyarrow."""

    def __init__(self, file: File) -> None:
        self.file, self.at, self.start, self.data = file, 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.file.size}[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        end = self.file.size if size is None or size < 0 else min(self.at + size, self.file.size)
        if end <= self.at:
            return b""
        if not self.start <= self.at <= end <= self.start + len(self.data):
            self.start = self.at
            self.data = read(self.file, self.at, max(end, min(self.at + AHEAD, self.file.size)))
        found = self.data[self.at - self.start : end - self.start]
        self.at = end
        return found


def _open(file: File) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError(f"{file.url}: pyarrow is not installed here: pip install 'llmops[data]'") from error
    try:
        return pyarrow.parquet.ParquetFile(_Seekable(file))
    except (pyarrow.ArrowException, EOFError) as error:
        raise InputError(f"{file.url} is no Parquet file, or damaged: {error}") from error


def row_groups(file: File) -> list[int]:
    """Bytes of each row group, compressed."""
    metadata = _open(file).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [sum(group.column(index).total_compressed_size for index in range(group.num_columns)) for group in groups]


def rows(file: File, piece: Piece, fields: Sequence[str], progress: Progress) -> Iterator[list[Any]]:
    """The values of ``fields`` (columns), for each row of the piece's row groups.

    A text that is no UTF-8 comes as bytes. Raises InputError: a column is missing, or the file is damaged.
    """
    import pyarrow

    table = _open(file)
    names = table.schema_arrow.names
    for name in fields:
        if name not in names:
            raise InputError(f"{file.url} has no column {name!r}: it has {', '.join(names)}")
    groups = range(piece.start, table.num_row_groups if piece.end < 0 else piece.end)
    total = sum(table.metadata.row_group(group).num_rows for group in groups)
    size = file.size if piece.end < 0 else 0  # without the footer
    for group in groups if piece.end >= 0 else ():
        columns = table.metadata.row_group(group)
        size += sum(columns.column(index).total_compressed_size for index in range(columns.num_columns))
    seen = told = 0
    try:
        for batch in table.iter_batches(ROWS, row_groups=list(groups), columns=list(fields), use_threads=False):
            columns = [_values(batch.column(name)) for name in fields]
            yield from map(list, zip(*columns, strict=True))
            seen += batch.num_rows
            progress(size * seen // total - told)
            told = size * seen // total
    except (pyarrow.ArrowException, EOFError) as error:
        raise InputError(f"{file.url} is damaged: {error}") from error
    if seen != total:
        raise InputError(f"{file.url} is damaged: {seen} of {total} rows can be read")


def _values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # pyarrow believes writers that strings are UTF-8
        values = [_value(item) for item in column]
    return values


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return item.as_buffer().to_pybytes()
