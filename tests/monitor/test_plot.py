"""Curves of any length, in the width they are given."""

from __future__ import annotations

import math

import pytest

from llmops.monitor.plot import BARS, loss_curve, sparkline, thin


def test_sparkline() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == BARS[::-1]
    assert sparkline([1, math.nan, 2, math.inf], 8) == "▁█"
    assert sparkline([3, 3], 8) == "▅▅"
    assert sparkline([], 8) == ""
    assert len(sparkline(range(1000), 8)) == 8


def test_thin_keeps_means() -> None:
    assert thin(enumerate([1.0, 2.0, math.nan]), 5) == [(0.0, 1.0), (1.0, 2.0)]
    assert thin([(step, float(step)) for step in range(10)], 2) == [(2.0, 2.0), (7.0, 7.0)]


@pytest.mark.parametrize("width", [30, 80, 200])
def test_the_curve_fits(width: int) -> None:
    lines = loss_curve([(step, 10 / step) for step in range(1, 50_000)], width, 14).splitlines()
    assert len(lines) <= 14
    assert max(map(len, lines)) <= width
    assert "loss by step" in lines[0]
    assert "\x1b" not in "".join(lines)
    assert ("20,000" in lines[-1]) == (width > 30)


def test_curves_of_odd_data() -> None:
    assert loss_curve([], 80, 14) == ""
    assert loss_curve([(1, 2.0), (2, math.nan)], 80, 14) == ""
    assert "1.50" in loss_curve([(1, 2.0), (2, 2.0)], 80, 14)
    assert loss_curve([(99, 3e-5), (1_000_000, 2e-5)], 60, 8)
