"""Between the engine's thread and the clients: what each has not been sent yet, merged and bounded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from llm.inference.batching import Request, Update
from llm.inference.openai_answers import Piece
from llm.inference.serving_metrics import ServingMetrics


class Reader:
    """A client that waits for some requests' texts; on the event loop alone.

    ``max_behind`` is how many tokens may lie here unsent; with more the client is ``lost``. None: it wants all at once.
    """

    def __init__(self, requests: Sequence[Request], max_behind: int | None) -> None:
        self.numbers = {request: number for number, request in enumerate(requests)}
        self.open = set(requests)
        self.lost = False
        self.changed = asyncio.Event()
        self._max, self._behind = max_behind, 0
        self._pieces: dict[int, Piece] = {}

    def push(self, update: Update) -> None:
        """One more update."""
        self._behind += 1
        self.lost = self.lost or (self._max is not None and self._behind > self._max)
        if not self.lost:
            self._pieces.setdefault(self.numbers[update.request], Piece()).add(update)
        if update.finish:
            self.open.discard(update.request)
        if update.finish or self._max is not None:
            self.changed.set()

    def take(self) -> dict[int, Piece]:
        """What there is, by choice."""
        pieces, self._pieces, self._behind = self._pieces, {}, 0
        self.changed.clear()
        return pieces


class Readers:
    """Who waits for what."""

    def __init__(self, metrics: ServingMetrics) -> None:
        self.metrics = metrics
        self._by_request: dict[Request, Reader] = {}
        self._told: dict[Request, float] = {}  # when its last token came
        self.request_s = 1.0  # how long one takes, of late

    def __len__(self) -> int:
        return len(set(self._by_request.values()))

    def add(self, reader: Reader) -> None:
        """Tell this one what happens to its requests."""
        self._by_request.update(dict.fromkeys(reader.numbers, reader))

    def remove(self, reader: Reader) -> None:
        """Tell it nothing any more."""
        for request in reader.numbers:
            self._by_request.pop(request, None)

    def spread(self, updates: Sequence[Update]) -> None:
        """Give each its updates."""
        now = time.monotonic()
        for update in updates:
            request = update.request
            if update.chosen is not None:
                before = self._told.get(request)
                self.metrics.token(now - (request.created if before is None else before), first=before is None)
                self._told[request] = now
            if update.finish:
                self._told.pop(request, None)
                self.request_s += 0.1 * (now - (request.started or request.created) - self.request_s)
                self.metrics.finished(request, update.finish)
            reader = self._by_request.get(request)
            if reader is not None:
                reader.push(update)
