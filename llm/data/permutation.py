"""A seeded order of range(n) in constant memory: any position of a shuffled epoch is computed, never stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
ROUNDS = 6


def permute(indices: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Positions of ``indices`` (any shape) in a pseudo-random permutation of range(n) that ``key`` selects.

    A Feistel network permutes the next power of four; a result outside range(n) is fed back until it falls inside,
    which takes at most four tries on average and keeps the map one to one.
    """
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise IndexError(f"{indices} is not inside range({n})")
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(mix(key + number)) for number in range(ROUNDS)]
    result = np.array(indices, np.uint64).ravel()
    outside = np.arange(result.size)
    while outside.size:
        values = result[outside]
        left, right = values >> half, values & mask
        for each in keys:
            left, right = right, left ^ (mix_all(right + each) & mask)
        values = left << half | right
        result[outside] = values
        outside = outside[values >= n]
    return result.reshape(indices.shape).astype(np.int64)


def mix(value: int) -> int:
    """Spread 64 bits over 64 bits (the finalizer of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def mix_all(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """:func:`mix` of each."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
