"""Learning rates and batch sizes: what each step gets, and that a longer run goes on where a shorter one ended."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.train.rates import as_long_as_data, global_batch, last_step, learning_rate, samples_after
from llm.utils.config import ConfigError, TrainConfig


def config(**changes: object) -> TrainConfig:
    values = {"max_steps": 100, "seq_len": 8, "global_batch_size": 16, "micro_batch_size": 1, "lr": 0.01}
    return TrainConfig(**{**values, "warmup_steps": 10, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("cosine", 0.0055, 0.001), ("linear", 0.0055, 0.001), ("constant", 0.01, 0.01), ("wsd", 0.01, 0.001)],
)
def test_rates_rise_and_fall(schedule: str, middle: float, last: float) -> None:
    settings = config(schedule=schedule, decay_steps=20 if schedule == "wsd" else 0)
    rates = [learning_rate(step, settings) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[9] == 0.01 == max(rates)
    assert rates[54] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(last)
    assert sorted(rates[9:], reverse=True) == rates[9:]


def test_wsd_falls_in_a_line_at_the_end_alone() -> None:
    settings = config(schedule="wsd", decay_steps=20)
    assert {learning_rate(step, settings) for step in range(10, 81)} == {0.01}
    assert learning_rate(90, settings) == pytest.approx(0.0055)


def test_no_warmup_and_nothing_but_warmup() -> None:
    assert learning_rate(1, config(warmup_steps=0)) < 0.01
    assert learning_rate(100, config(warmup_steps=100)) == 0.01


def test_a_run_with_more_steps_has_the_rates_of_one_that_always_had_them() -> None:
    short, long = config(schedule="wsd", decay_steps=20), config(schedule="wsd", decay_steps=20, max_steps=300)
    stable = [learning_rate(step, short) for step in range(1, 81)]
    assert [learning_rate(step, long) for step in range(1, 81)] == stable
    assert learning_rate(280, long) == 0.01


@given(first=st.integers(1, 8), times=st.integers(1, 12), warmup=st.integers(1, 60), step=st.integers(1, 100))
def test_batches_grow_evenly_and_are_counted(first: int, times: int, warmup: int, step: int) -> None:
    settings = config(first_batch_size=first, global_batch_size=first * times, batch_warmup_steps=warmup)
    sizes = [global_batch(each, settings) for each in range(1, 101)]
    assert sizes[0] == first
    assert set(sizes[warmup:]) == {first * times}
    assert sorted(sizes) == sizes
    assert all(size % first == 0 for size in sizes)
    growth = [later - earlier for earlier, later in itertools.pairwise(sizes)]
    assert max(growth) <= first * math.ceil((times - 1) / warmup)
    assert samples_after(step, settings) == sum(sizes[:step])


@given(st.integers(1, 30_000), st.booleans())
def test_the_last_step_is_the_first_with_enough_tokens(tokens: int, grows: bool) -> None:
    settings = config(max_tokens=tokens, **({"first_batch_size": 4, "batch_warmup_steps": 30} if grows else {}))
    end = last_step(settings)
    enough = samples_after(end, settings) * 8 >= tokens
    assert enough or end == 100
    assert end == 1 or samples_after(end - 1, settings) * 8 < tokens
    assert learning_rate(end, settings) == pytest.approx(0.001 if end > 10 else 0.01 * end / 10)


def test_without_a_budget_of_tokens_the_steps_decide() -> None:
    assert last_step(msgspec.structs.replace(config(), max_tokens=None)) == 100


def test_a_run_that_its_data_ends_has_its_schedule_end_there() -> None:
    settings = config(max_steps=100, warmup_steps=5, global_batch_size=8)
    assert as_long_as_data(settings, 800) is settings
    shorter = as_long_as_data(settings, 161)
    assert shorter.max_steps == last_step(shorter) == 21
    assert learning_rate(21, shorter) == pytest.approx(shorter.lr * shorter.min_lr_ratio)
    with pytest.raises(ConfigError, match=r"20 samples, which are 3 steps, fewer than train\.warmup_steps"):
        as_long_as_data(settings, 20)
