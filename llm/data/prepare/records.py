"""The rows of a piece, whatever the format of its file: a text or a chat, and the values that filters look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from llm.data.prepare.inputs import File, Piece
from llm.data.prepare.lines import Progress, lines, whole
from llm.utils.config import PrepareConfig

BOM = b"\xef\xbb\xbf"


@dataclass(slots=True)  # frozen ones take four times as long to make
class Row:
    """A document as it was read. ``values``: of the fields that filters name."""

    content: Any  # str; of chats a list of messages
    values: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Bad:
    """A line that is no document: why not."""

    cause: str


class Rows:
    """The rows of pieces, each with its number among the piece's lines (rows of Parquet), from 1.

    ``count`` is the number of lines of the last piece.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self.field = content_field(config)
        self.chat, self.paragraphs = config.chat, config.paragraphs
        self.filtered = list(dict.fromkeys(each.partition("=")[0] for each in config.keep))
        # Fields that nobody asked for are skipped, not built.
        names = [name for name in dict.fromkeys(self.top(each) for each in self.filtered) if name != self.field]
        fields: list[Any] = [("content", list[Any] if config.chat else str)]
        fields += [(f"value{index}", Any, None) for index in range(len(names))]
        renamed = {"content": self.field, **{f"value{index}": name for index, name in enumerate(names)}}
        self.names = names
        self.decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
            msgspec.defstruct("Line", fields, rename=renamed)
        )
        self.count = 0

    @staticmethod
    def top(field: str) -> str:
        """The key of a row that ``field``, which may go on with dots, begins with."""
        return field.partition(".")[0]

    def of(self, file: File, piece: Piece, progress: Progress) -> Iterator[tuple[int, Row | Bad]]:
        """Raises InputError for a file that cannot be read at all."""
        if file.form == "parquet":
            return self._parquet(file, piece, progress)
        if file.form == "jsonl":
            return self._jsonl(file, piece, progress)
        return self._paragraphs(file, piece, progress) if self.paragraphs else self._file(file, progress)

    def _jsonl(self, file: File, piece: Piece, progress: Progress) -> Iterator[tuple[int, Row | Bad]]:
        self.count = 0
        for at, line in lines(file, piece, progress):
            if at >= piece.end and not file.packing:
                return
            self.count += 1
            if at == 0:
                line = line.removeprefix(BOM)
            if not line or line.isspace():
                continue
            try:
                found = self.decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                yield self.count, Bad(_cause(error))
                continue
            values = {name: getattr(found, f"value{index}") for index, name in enumerate(self.names)}
            yield self.count, self._row(found.content, values)

    def _parquet(self, file: File, piece: Piece, progress: Progress) -> Iterator[tuple[int, Row | Bad]]:
        from llm.data.prepare.parquet import rows

        self.count = 0
        for content, *values in rows(file, piece, [self.field, *self.names], progress):
            self.count += 1
            if isinstance(content, bytes):
                yield self.count, Bad("invalid UTF-8")
            elif isinstance(content, list if self.chat else str):
                yield self.count, self._row(content, dict(zip(self.names, values, strict=True)))
            else:
                kind = "null" if content is None else type(content).__name__
                yield self.count, Bad(f"{self.field} is {kind}, no {'list' if self.chat else 'text'}")

    def _row(self, content: Any, values: dict[str, Any]) -> Row:
        if not self.filtered:
            return Row(content)
        values[self.field] = content
        return Row(content, tuple(_inside(values[self.top(each)], each) for each in self.filtered))

    def _file(self, file: File, progress: Progress) -> Iterator[tuple[int, Row | Bad]]:
        self.count = 1
        yield 1, _text(whole(file, progress).removeprefix(BOM))

    def _paragraphs(self, file: File, piece: Piece, progress: Progress) -> Iterator[tuple[int, Row | Bad]]:
        """Paragraphs that follow a blank line of this piece, or begin the file."""
        self.count = number = 0
        first, found = 0, []
        inside = piece.start == 0  # what stands before the piece's first blank line is the last piece's
        for at, line in lines(file, piece, progress):
            beyond = at >= piece.end and not file.packing
            number += 1
            self.count += not beyond
            if line and not line.isspace():
                if not inside and beyond:
                    return
                if inside:
                    first = first or number
                    found.append(line.removeprefix(BOM) if at == 0 else line)
                continue
            if found:
                yield first, _text(b"\n".join(found))
            first, found, inside = 0, [], True
            if beyond:
                return
        if found:
            yield first, _text(b"\n".join(found))


def content_field(config: PrepareConfig) -> str:
    """The field that documents are in."""
    return config.field or ("messages" if config.chat else "text")


def _text(data: bytes) -> Row | Bad:
    try:
        return Row(data.decode())
    except UnicodeDecodeError as error:
        return Bad(_cause(error))


def _cause(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 at byte {error.start}"
    return str(error) or type(error).__name__


def _inside(value: Any, field: str) -> Any:
    for name in field.split(".")[1:]:
        value = value.get(name) if isinstance(value, dict) else None
    return value
