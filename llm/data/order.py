"""Which sample of which source each place in the training stream holds. Free of torch and of files.

A position is a few integers: how many places of the stream the run has gone past, and how many of them each source
had. What comes next follows from it, the seed, the weights and the sizes of the sources; never from the number of
ranks, threads or sequences in a batch. Counting what each source gave lets weights change in the middle of a run
without any sample being seen twice in an epoch of its source, or left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llm.data.permutation import mix, mix_all, permute

STRATUM = 1024  # places over which the shares of sources are exact
CHUNK = 1 << 20  # places that are counted at a time
WINDOW = 1 << 12  # samples of an epoch whose order is computed at once: one by one takes a thousand times as long
NOTHING = -1  # the ordinal of a row that fills up the last batch


@dataclass(frozen=True)
class Position:
    """``samples``: places gone past; ``counts``: of these, by source."""

    samples: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Picks:
    """The rows of a global batch: their sources (G), as indices into :attr:`Order.names`, and how many samples each
    source had given before (G; -1: a row that counts for nothing). ``over``: the stream ends with it."""

    sources: NDArray[np.int64]
    ordinals: NDArray[np.int64]
    after: Position
    over: bool


class Order:
    """The order of a stream.

    ``sizes`` has the number of samples of each source; ``weights`` the shares of each, as (first place, share) in
    order: from there on. Shares need not add up to one. The stream ends before any source begins its epoch
    ``epochs`` + 1 (None: it does not end).
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, Sequence[tuple[int, float]]],
        seed: int,
        epochs: int | None = None,
    ) -> None:
        self.names = sorted(sizes)
        self.sizes = np.array([sizes[name] for name in self.names], np.int64)
        self.epochs = epochs
        self._seed = seed
        self._last = -1, np.empty(0)  # a stratum and its heights: the next places are in it, too
        self._window = lru_cache(2 * len(sizes) + 2)(self._permuted)  # threads may be at the next one already
        self._keys = [mix(mix(seed) + zlib.crc32(name.encode())) for name in self.names]
        self._changes = np.array(sorted({first for each in weights.values() for first, _ in each}), np.int64)
        shares = np.array([[_at(weights[name], int(first)) for name in self.names] for first in self._changes])
        self._bounds = np.cumsum(shares, 1)[:, :-1] / shares.sum(1, keepdims=True)  # (changes, sources - 1)

    def take(self, position: Position, ranges: Iterable[tuple[int, int]]) -> Picks:
        """The places in ``ranges`` [first, last), which lie at ``position`` or after it, in order. What lies between
        them counts as gone past."""
        counts = np.array([position.counts.get(name, 0) for name in self.names], np.int64)
        at, sources, ordinals = position.samples, [], []
        for first, last in ranges:
            if first > at:
                counts += np.bincount(self.sources(at, first), minlength=len(counts))
            chosen = self.sources(first, last)
            numbers = np.empty_like(chosen)
            for source, own in enumerate(_places(chosen, len(counts))):
                numbers[own] = counts[source] + np.arange(own.size)
                counts[source] += own.size
            sources.append(chosen)
            ordinals.append(numbers)
            at = last
        chosen, numbers = np.concatenate(sources), np.concatenate(ordinals)
        after = Position(at, dict(zip(self.names, counts.tolist(), strict=True)))
        if self.epochs is None:
            return Picks(chosen, numbers, after, False)
        beyond = np.flatnonzero(numbers >= self.sizes[chosen] * self.epochs)
        if beyond.size:
            numbers[beyond[0] :] = NOTHING
        return Picks(chosen, numbers, after, bool(beyond.size) or self.over(after))

    def over(self, position: Position) -> bool:
        """Is there nothing more at ``position``?"""
        if self.epochs is None:
            return False
        following = int(self.sources(position.samples, position.samples + 1)[0])
        return position.counts.get(self.names[following], 0) >= int(self.sizes[following]) * self.epochs

    def end(self, most: int) -> int:
        """How many places the stream has, ``most`` if there are more, or if it does not end."""
        if self.epochs is None:
            return most
        if len(self.names) == 1:
            return min(most, int(self.sizes[0]) * self.epochs)
        left = self.sizes * self.epochs
        for first in range(0, most, CHUNK):
            chosen = self.sources(first, min(first + CHUNK, most))
            ends = [
                own[left[number]] for number, own in enumerate(_places(chosen, len(left))) if own.size > left[number]
            ]
            if ends:
                return first + int(min(ends))
            left = left - np.bincount(chosen, minlength=len(left))
        return most

    def position(self, samples: int) -> Position:
        """The one after the first ``samples`` places, had the weights always been what they are."""
        counts = np.zeros(len(self.names), np.int64)
        for first in range(0, samples, CHUNK):
            counts += np.bincount(self.sources(first, min(first + CHUNK, samples)), minlength=len(counts))
        return Position(samples, dict(zip(self.names, counts.tolist(), strict=True)))

    def indices(self, source: int, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which samples of ``source`` these are: every epoch has an order of its own."""
        size = int(self.sizes[source])
        found = np.empty_like(ordinals)
        epochs = ordinals // size
        within = ordinals - epochs * size
        windows = epochs * (1 + size // WINDOW) + within // WINDOW
        for window in set(windows.tolist()):
            own = windows == window
            epoch, number = divmod(window, 1 + size // WINDOW)
            found[own] = self._window(source, epoch, number)[within[own] - number * WINDOW]
        return found

    def _permuted(self, source: int, epoch: int, window: int) -> NDArray[np.int64]:
        """Samples ``window`` * WINDOW to (``window`` + 1) * WINDOW of an epoch of ``source``."""
        size = int(self.sizes[source])
        places = np.arange(window * WINDOW, min((window + 1) * WINDOW, size))
        return permute(places, size, mix(self._keys[source] + epoch))

    def sources(self, first: int, last: int) -> NDArray[np.int64]:
        """The sources of places ``first`` to ``last``. Each stratum has every source as often as its weight says."""
        if len(self.names) == 1 or first == last:
            return np.zeros(last - first, np.int64)
        begin = first // STRATUM
        strata = [self._heights(number) for number in range(begin, -(-last // STRATUM))]
        height = np.concatenate(strata)[first - begin * STRATUM : last - begin * STRATUM]
        change = np.searchsorted(self._changes, np.arange(first, last), side="right") - 1
        chosen: NDArray[np.int64] = np.count_nonzero(height[:, None] >= self._bounds[change], axis=1)
        return chosen

    def _heights(self, stratum: int) -> NDArray[np.float64]:
        """Numbers spread evenly over (0, 1), in an order that the stratum draws."""
        if self._last[0] != stratum:
            places = np.arange(stratum * STRATUM, (stratum + 1) * STRATUM, dtype=np.uint64)
            drawn = mix_all(places ^ np.uint64(mix(self._seed ^ 0x5EED)))
            ranks = np.empty(STRATUM)
            ranks[np.argsort(drawn, kind="stable")] = np.arange(STRATUM)
            self._last = stratum, (ranks + 0.5) / STRATUM
        return self._last[1]


def _places(chosen: NDArray[np.int64], sources: int) -> list[NDArray[np.int64]]:
    """Where each source was chosen."""
    return [np.flatnonzero(chosen == number) for number in range(sources)]


def _at(weights: Sequence[tuple[int, float]], place: int) -> float:
    """The share at ``place``: that of the last change at or before it, 0 before the first."""
    return next((share for first, share in reversed(weights) if first <= place), 0.0)
