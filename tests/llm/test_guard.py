"""Verdicts on steps, and which data is left out after a rollback."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.train.guard import FEWEST, Guard, merged, take
from llm.utils.config import TrainConfig


def guard(**changes: object) -> Guard:
    values = {"max_steps": 1000, "seq_len": 8, "global_batch_size": 16, "micro_batch_size": 1, "lr": 0.01}
    return Guard(TrainConfig(**{**values, **changes}))  # type: ignore[arg-type]


def settled(**changes: object) -> Guard:
    """After 40 steps with losses around 2 and norms around 1."""
    made = guard(**changes)
    for step in range(1, 41):
        assert made.judge(step, 2.0 + 0.1 * math.sin(step), 1.0 + 0.1 * math.cos(step)) == "go"
    return made


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("choice", ["stop", "skip", "rollback"])
def test_what_is_no_number_gets_what_was_chosen(choice: str, loss: float) -> None:
    assert guard(on_nonfinite=choice).judge(1, loss, 1.0) == choice
    assert guard(on_nonfinite=choice).judge(1, 1.0, loss) == choice


def test_spikes_of_either_are_skipped_when_asked_for() -> None:
    assert settled().judge(41, 50.0, 50.0) == "go"
    assert settled(skip_spikes=6.0).judge(41, 50.0, 1.0) == "skip"
    assert settled(skip_spikes=6.0).judge(41, 2.0, 50.0) == "skip"
    assert settled(skip_spikes=6.0).judge(41, 0.1, 0.1) == "go"  # a fall is no spike


def test_the_first_steps_have_nothing_to_be_measured_against() -> None:
    made = guard(skip_spikes=1.0)
    assert [made.judge(step, 10.0**step, 1.0) for step in range(1, FEWEST + 1)] == ["go"] * FEWEST


def test_a_spike_does_not_move_what_spikes_are_measured_against() -> None:
    made = settled(skip_spikes=6.0)
    before = list(made.losses)
    made.judge(41, 50.0, 1.0)
    assert list(made.losses) == before


@pytest.mark.parametrize("choice", ["skip", "rollback"])
def test_too_many_in_a_row_stop_the_run(choice: str) -> None:
    made = guard(on_nonfinite=choice, max_skips=3)
    assert [made.judge(step, math.nan, 1.0) for step in range(1, 5)] == [choice] * 3 + ["stop"]


def test_a_good_step_begins_the_count_anew_but_not_one_that_was_made_before() -> None:
    made = guard(on_nonfinite="rollback", max_skips=2)
    assert made.judge(5, 1.0, 1.0) == "go"
    assert made.judge(6, math.nan, 1.0) == "rollback"
    assert made.judge(5, 1.0, 1.0) == "go"  # again, after the rollback
    assert made.judge(6, math.nan, 1.0) == "rollback"
    assert made.judge(6, math.nan, 1.0) == "stop"
    fresh = guard(on_nonfinite="skip", max_skips=1)
    assert [fresh.judge(step, loss, 1.0) for step, loss in enumerate([math.nan, 1.0, math.nan, 1.0], 1)] == [
        "skip", "go", "skip", "go",
    ]  # fmt: skip


def test_a_checkpoint_holds_all_of_it() -> None:
    made = settled(skip_spikes=6.0, on_nonfinite="rollback")
    made.judge(41, math.nan, 1.0)
    made.leave_out([(656, 672)])
    again = guard(skip_spikes=6.0, on_nonfinite="rollback")
    again.restore(json.loads(json.dumps(made.state())))
    assert again.state() == made.state()
    assert again.judge(42, 50.0, 1.0) == made.judge(42, 50.0, 1.0) == "skip"


def test_a_rollback_forgets_the_losses_but_not_what_was_learnt() -> None:
    made = settled(on_nonfinite="rollback")
    state = made.state()
    made.judge(41, 3.0, 1.0)
    made.judge(42, math.nan, 1.0)
    made.leave_out([(656, 672)])
    made.after_rollback(state)
    assert list(made.losses) == state["losses"]
    assert (made.in_a_row, made.total, made.reached, made.left_out) == (1, 1, 41, [(656, 672)])


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda each: (each[0], sum(each))), max_size=6)


@given(st.integers(0, 70), st.integers(1, 20), RANGES)
def test_the_next_samples_are_those_that_are_not_left_out(
    position: int, count: int, ranges: list[tuple[int, int]]
) -> None:
    left_out = merged(ranges)
    out = {sample for first, last in ranges for sample in range(first, last)}
    assert {sample for first, last in left_out for sample in range(first, last)} == out
    taken = [sample for first, last in take(position, count, left_out) for sample in range(first, last)]
    assert taken == [sample for sample in range(position, 200) if sample not in out][:count]
