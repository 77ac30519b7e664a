"""Which point a trial is at: numbers and the seed alone decide."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops.config.schema import SweepConfig
from llmops.errors import UserError
from llmops.sweep.model import Axis
from llmops.sweep.points import corners, point, total

A = Axis(key="a", kind="choice", values=[1, 2, 3])
B = Axis(key="b", kind="choice", values=["x", "y"])
LR = Axis(key="lr", kind="interval", low=1e-5, high=1e-1, log=True)
N = Axis(key="n", kind="interval", low=1, high=4, integer=True)


def test_a_grid_is_a_nested_loop() -> None:
    sweep = SweepConfig()
    assert total([A, B], sweep) == 6
    found = [point([A, B], sweep, trial) for trial in range(6)]
    assert found == [{"a": a, "b": b} for a, b in itertools.product([1, 2, 3], ["x", "y"])]


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10))
@settings(max_examples=60)
def test_random_points_of_a_finite_space_never_repeat(a: int, b: int, c: int, seed: int) -> None:
    axes = [Axis(key=key, kind="choice", values=list(range(n))) for key, n in (("a", a), ("b", b), ("c", c))]
    sweep = SweepConfig(sampler="random", trials=a * b * c, seed=seed)
    assert len({str(point(axes, sweep, trial)) for trial in range(total(axes, sweep))}) == a * b * c


def test_random_points_do_not_depend_on_how_many_there_are() -> None:
    few, many = SweepConfig(sampler="random", trials=3), SweepConfig(sampler="random", trials=1000)
    for trial in range(3):
        assert point([LR, A], few, trial) == point([LR, A], many, trial)
        assert point([LR, A], few, trial) != point([LR, A], SweepConfig(sampler="random", trials=3, seed=1), trial)


def test_a_later_release_draws_the_same_points() -> None:
    """A study is resumed by whichever release is installed: these are on record."""
    sweep = SweepConfig(sampler="random", trials=9, seed=7)
    found = point([LR, N, A], sweep, 5)
    assert found is not None
    assert found["lr"] == pytest.approx(0.002838269279362491)
    assert (found["n"], found["a"]) == (3, 1)
    assert point([A, B], sweep, 4) == {"a": 3, "b": "y"}


def test_draws_are_even() -> None:
    sweep = SweepConfig(sampler="random", trials=4000)
    found = [point([LR, N], sweep, trial) or {} for trial in range(4000)]
    middle = sum(each["lr"] < 1e-3 for each in found) / 4000  # half of the decades
    assert abs(middle - 0.5) < 0.03
    for value in (1, 2, 3, 4):
        assert abs(sum(each["n"] == value for each in found) / 4000 - 0.25) < 0.03
    assert all(1e-5 <= each["lr"] <= 1e-1 and isinstance(each["n"], int) for each in found)


def test_samplers_that_learn_have_no_points_of_their_own() -> None:
    assert point([LR], SweepConfig(sampler="tpe", trials=3), 0) is None


def test_corners_show_each_value_once() -> None:
    found = corners([A, B, LR])
    assert {each["a"] for each in found} == {1, 2, 3}
    assert {each["b"] for each in found} == {"x", "y"}
    assert {each["lr"] for each in found} == {1e-5, 1e-1}
    assert len(found) == 1 + 2 + 1 + 1


@pytest.mark.parametrize(
    ("axes", "sweep", "words"),
    [
        ([], SweepConfig(), "nothing is swept"),
        ([LR], SweepConfig(), "lr: an interval has no grid"),
        ([A], SweepConfig(trials=2), "the grid has 3 points"),
        ([A], SweepConfig(sampler="random"), "sweep.trials has no value"),
        ([A, B], SweepConfig(sampler="random", trials=7), "only 6 points"),
        ([LR], SweepConfig(sampler="tpe", trials=100_001), "100,001 trials"),
        ([Axis(key=k, kind="range", values=list(range(400))) for k in "ab"], SweepConfig(), "160,000 trials"),
    ],
)
def test_refusals(axes: list[Axis], sweep: SweepConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        total(axes, sweep)


def test_integers_on_a_logarithmic_scale() -> None:
    axis = Axis(key="n", kind="interval", low=1, high=1000, log=True, integer=True)
    sweep = SweepConfig(sampler="random", trials=1000)
    found = [(point([axis], sweep, trial) or {})["n"] for trial in range(1000)]
    assert min(found) >= 1
    assert max(found) <= 1000
    assert abs(sum(math.log10(each) < 1.5 for each in found) / 1000 - 0.5) < 0.1
