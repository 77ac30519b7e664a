"""Losses drawn in characters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

CURVE_WIDTH, PIPED_CURVE_WIDTH = 100, 80
BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as at most ``width`` bars, each the mean of its share; values that are not finite are left out."""
    means = [mean for _, mean in thin(enumerate(values), width)]
    if not means:
        return ""
    low, high = min(means), max(means)
    if high == low:
        return BARS[len(BARS) // 2] * len(means)
    return "".join(BARS[min(int((mean - low) / (high - low) * len(BARS)), len(BARS) - 1)] for mean in means)


def thin(points: Iterable[tuple[int, float]], count: int) -> list[tuple[float, float]]:
    """At most ``count`` points, the means of equal shares of the finite ones, in order."""
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) <= count:
        return [(float(x), y) for x, y in finite]
    edges = [index * len(finite) // count for index in range(count + 1)]
    shares = [finite[start:end] for start, end in pairwise(edges)]
    return [(sum(x for x, _ in share) / len(share), sum(y for _, y in share) / len(share)) for share in shares]


def loss_curve(points: Iterable[tuple[int, float]], width: int, height: int, title: str = "loss by step") -> str:
    """A curve of ``(step, loss)`` in ``width`` x ``height`` cells, without colours; empty for fewer than two points."""
    shown = thin(points, 2 * width)  # two dots of a braille cell side by side
    if len(shown) < 2:
        return ""
    figure, finish = drawing(width, height)
    steps, losses = zip(*shown, strict=True)
    curve = figure.signal(list(steps), list(losses), marker="braille")
    curve.lines()
    figure.draw(curve)
    ticks = _ticks(steps[0], steps[-1], max(2, width // 16))
    figure.ruler("x").ticks(ticks, [f"{tick:,}" for tick in ticks])
    figure.title(title)
    if min(losses) == max(losses):
        figure.ruler("y").lim(losses[0] - 0.5, losses[0] + 0.5)
    return finish()


def drawing(width: int, height: int) -> tuple[Any, Callable[[], str]]:
    """A figure of plotext's in ``width`` x ``height`` cells, and what makes lines of it, without colours."""
    import plotext

    library: Any = plotext  # has no types
    figure = library.figure
    figure.clear()
    library.terminal.limit(False, False)  # the caller knows the width; it may not be a terminal's
    figure.theme("colorless")
    figure.plot_size(max(width, 20), max(height, 6))

    def finish() -> str:
        drawn: str = library.uncolorize(figure.build())
        return "\n".join(line.rstrip() for line in drawn.splitlines() if line.strip())

    return figure, finish


def curve_width(console: Console) -> int:
    """Columns of a curve there: not all of a wide terminal."""
    return min(console.width, CURVE_WIDTH) if console.is_terminal else PIPED_CURVE_WIDTH


def _ticks(low: float, high: float, count: int) -> list[int]:
    """Round steps from ``low`` to ``high``."""
    span = max(high - low, 1)
    power = 10 ** math.floor(math.log10(span / count)) if span > count else 1
    step = int(next((power * factor for factor in (1, 2, 5) if span / (power * factor) <= count), power * 10))
    return list(range(math.ceil(low / step) * step, math.floor(high) + 1, step)) or [int(low)]
