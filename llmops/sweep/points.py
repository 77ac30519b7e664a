"""Which point a trial is at, where its number and the study's seed alone decide."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any

from llmops.config.schema import SweepConfig
from llmops.errors import UserError
from llmops.sweep.model import Axis
from llmops.sweep.space import size

MAX_TRIALS = 100_000  # of a study
_ROUNDS = 4


def total(axes: Sequence[Axis], sweep: SweepConfig) -> int:
    """Number of trials of a study. Raises :class:`UserError` where space, sampler and number do not go together."""
    if not axes:
        raise UserError("nothing is swept: give at least one key several values, as in train.lr=1e-4,3e-4")
    points = size(axes)
    if sweep.sampler == "grid":
        endless = next((axis.key for axis in axes if axis.kind == "interval"), None)
        if endless is not None or points is None:
            raise UserError(f"{endless}: an interval has no grid; add sweep=random or sweep=tpe, and sweep.trials=N")
        if sweep.trials not in (None, points):
            raise UserError(
                f"sweep.trials={sweep.trials}: the grid has {points} points; leave it out, or add sweep=random"
            )
        count = points
    elif sweep.trials is None:
        raise UserError(f"sweep.trials has no value: say how many trials sweep.sampler={sweep.sampler} makes")
    else:
        count = sweep.trials
    if sweep.sampler == "random" and points is not None and count > points:
        raise UserError(f"sweep.trials={count}: the space has only {points} points; leave sweep=random out for all")
    if count > MAX_TRIALS:
        raise UserError(f"this would make {count:,} trials; {MAX_TRIALS:,} is the most: sweep fewer values")
    return count


def point(axes: Sequence[Axis], sweep: SweepConfig, trial: int) -> dict[str, Any] | None:
    """The value of each axis by its key; None where the sampler learns from other trials.

    Grid: in the order of a nested loop, the last axis fastest. Random: independent draws, or where the space is finite
    its points in an order of the seed's, none twice.
    """
    if sweep.sampler in ("tpe", "cmaes"):
        return None
    points = size(axes)
    if points is None:
        return {axis.key: _draw(axis, _stream(sweep.seed, trial, axis.key)) for axis in axes}
    index = trial if sweep.sampler == "grid" else _permuted(trial % points, points, sweep.seed)
    values: dict[str, Any] = {}
    for axis in reversed(axes):
        index, digit = divmod(index, len(axis.values))
        values[axis.key] = axis.values[digit]
    return {axis.key: values[axis.key] for axis in axes}


def corners(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Points at which each value, or end of an interval, is seen once, beside the first value of all others."""
    first = {axis.key: (axis.low if axis.kind == "interval" else axis.values[0]) for axis in axes}
    found = [first]
    for axis in axes:
        others = [axis.high] if axis.kind == "interval" else axis.values[1:]
        found += [{**first, axis.key: value} for value in others]
    return found


def _stream(seed: int, trial: int, key: str) -> random.Random:
    """Python promises the same numbers for the same text seed, on every machine and in later versions."""
    return random.Random(f"{seed}/{trial}/{key}")  # noqa: S311 - a draw, not a secret


def _draw(axis: Axis, stream: random.Random) -> Any:
    if axis.kind != "interval":
        return axis.values[int(stream.random() * len(axis.values))]
    assert axis.low is not None
    assert axis.high is not None
    low, high = axis.low, axis.high
    if axis.integer:  # each whole number has the width of one
        low, high = low - 0.5, high + 0.5
    share = stream.random()
    value = (
        math.exp(math.log(low) + share * (math.log(high) - math.log(low))) if axis.log else low + share * (high - low)
    )
    value = min(max(value, axis.low), axis.high)
    return round(value) if axis.integer else value


def _permuted(index: int, count: int, seed: int) -> int:
    """Where a fixed permutation of ``range(count)`` takes ``index``: a Feistel network, walked until it is inside.

    J. Black, P. Rogaway: Ciphers with Arbitrary Finite Domains (CT-RSA 2002), sections 3 and 5.
    """
    half = max((count - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            digest = hashlib.sha256(f"{seed}/{count}/{number}/{right}".encode()).digest()
            left, right = right, left ^ (int.from_bytes(digest[:8], "big") & mask)
        index = (left << half) | right
        if index < count:
            return index
