"""What was found in a unit, and in all of them: the part records, and the report of the index."""

from __future__ import annotations

from typing import Any

import msgspec

from llm.data.format import Shard

SAMPLES = 10
CAUSE = 200  # characters


class Sample(msgspec.Struct, kw_only=True):
    """A line that is no document. ``line`` counts from the beginning of its piece."""

    file: int
    piece: int
    line: int
    cause: str


class Part(msgspec.Struct, kw_only=True):
    """The record of a unit."""

    plan: str
    unit: int
    splits: dict[str, list[Shard]] = {}
    documents: dict[str, int] = {}
    tokens: dict[str, int] = {}
    bytes: dict[str, int] = {}  # of text
    rows: dict[str, int] = {}  # packed ones
    used: dict[str, int] = {}  # tokens of packed rows that are no filling
    cut: dict[str, int] = {}  # documents that were longer than a row
    filtered: dict[str, int] = {}
    duplicates: int = 0
    lines: list[int] = []  # of each piece
    records: list[int] = []  # of each piece: lines that are not blank
    bad: list[int] = []  # of each piece
    samples: list[Sample] = []

    def miss(self, file: int, piece: int, line: int, cause: str) -> None:
        """Count a bad line; the first few are told."""
        self.bad[piece] += 1
        if len(self.samples) < SAMPLES:
            cause = cause if len(cause) <= CAUSE else f"{cause[:CAUSE]}…"
            self.samples.append(Sample(file=file, piece=piece, line=line, cause=cause))


def add(counts: dict[str, int], name: str, count: int) -> None:
    """Count."""
    counts[name] = counts.get(name, 0) + count


class Report(msgspec.Struct, kw_only=True):
    """Of a whole dataset, as the index has it."""

    documents: dict[str, int] = {}
    tokens: dict[str, int] = {}
    bytes: dict[str, int] = {}
    records: int = 0
    bad_lines: int = 0
    bad_samples: list[str] = []
    filtered: dict[str, int] = {}
    duplicates: int = 0
    cut: dict[str, int] = {}
    packing_efficiency: dict[str, float] = {}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found
