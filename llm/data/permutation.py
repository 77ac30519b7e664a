"""A seeded order of range(n) in constant memory: any position of a shuffled epoch is computed, never stored."""

from __future__ import annotations

MASK = (1 << 64) - 1
ROUNDS = 6


def permute(index: int, n: int, key: int) -> int:
    """Position of ``index`` in a pseudo-random permutation of range(n) that ``key`` selects.

    A Feistel network permutes the next power of four; a result outside range(n) is fed back until it falls inside,
    which takes at most four tries on average and keeps the map one to one.
    """
    if not 0 <= index < n:
        raise IndexError(f"{index} is outside range({n})")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(ROUNDS):
            left, right = right, left ^ (mix(right + mix(key + round_)) & mask)
        index = left << half | right
        if index < n:
            return index


def mix(value: int) -> int:
    """Spread 64 bits over 64 bits (the finalizer of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
