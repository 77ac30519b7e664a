"""Many streams of lines to one, by time."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter

from llmops.monitor.log_streams import LogLine

_STAMP = attrgetter("stamp")


class _Feed:
    """One stream: what was read and has not been passed on."""

    def __init__(self, blocks: Iterable[list[LogLine]]) -> None:
        self._blocks = iter(blocks)
        self._enough = 1
        self.lines: list[LogLine] = []
        self.ended = False

    def fill(self) -> None:
        """Have lines of half a block at least, unless there are no more."""
        while not self.ended and len(self.lines) < self._enough:
            block = next(self._blocks, None)
            if block is None:
                self.ended = True
            elif block:
                self.lines += block
                self._enough = len(block) // 2 + 1

    def take(self, count: int) -> list[LogLine]:
        """The next so many."""
        taken, self.lines = self.lines[:count], self.lines[count:]
        return taken


def merge(streams: Sequence[Iterable[list[LogLine]]]) -> Iterator[LogLine]:
    """Lines of all streams, which come in blocks, by time; where that is the same, in the order of the streams.

    The stamps of one stream must not go back. Holds about two blocks of each stream. Not line by line: what is sure to
    come before all that was not read yet is sorted at once, which takes a fraction of the time.
    """
    if len(streams) == 1:
        yield from chain.from_iterable(streams[0])
        return
    feeds = [_Feed(stream) for stream in streams]
    while feeds:
        for feed in feeds:
            feed.fill()
        feeds = [feed for feed in feeds if feed.lines]
        horizon = min((feed.lines[-1].stamp for feed in feeds if not feed.ended), default=None)
        batch: list[LogLine] = []
        for feed in feeds:
            if horizon is None:
                batch += feed.take(len(feed.lines))
            elif feed.lines[0].stamp < horizon:
                batch += feed.take(bisect_left(feed.lines, horizon, key=_STAMP))
        if not batch and horizon is not None:
            yield from _of_one_moment(next(feed for feed in feeds if feed.lines[0].stamp == horizon), horizon)
        batch.sort(key=_STAMP)
        yield from batch


def _of_one_moment(feed: _Feed, moment: str) -> Iterator[LogLine]:
    """All that a stream has at one time, however much: of a file without times, everything."""
    while feed.lines and feed.lines[0].stamp == moment:
        yield from feed.take(bisect_right(feed.lines, moment, key=_STAMP))
        feed.fill()
