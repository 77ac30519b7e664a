"""The objective's values that count, and how trials ended."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmops.config.schema import SweepConfig
from llmops.runs.records import write_failed, write_intent
from llmops.runs.store import Store, open_store
from llmops.sweep import objective
from tests.conftest import MadeRun, RunMaker

EVAL = SweepConfig()
STEP = SweepConfig(objective="step/loss")


def lines(store: Store, attempt: int, *records: dict[str, Any], part: int = 0) -> None:
    data = "".join(json.dumps(record) + "\n" for record in records)
    store.put(f"metrics/{attempt:04d}/{part:06d}.jsonl", data.encode())


def evals(made: MadeRun, attempt: int, values: dict[int, float]) -> None:
    lines(made.store, attempt, *({"kind": "eval", "step": step, "loss": value} for step, value in values.items()))


@pytest.mark.parametrize(
    "text",
    ["eval/loss", "step/grad_norm", "val/acc.top1", r"log:loss=(?P<value>\S+)", r"log:(?P<step>\d+) (?P<value>.+)"],
)
def test_objectives(text: str) -> None:
    objective.check(text)


@pytest.mark.parametrize("text", ["", "loss", "eval/", "/loss", "eval/a b", "log:", "log:loss=(.*)", "log:(?P<value>"])
def test_what_is_no_objective(text: str) -> None:
    with pytest.raises(ValueError, match=r"value|objective|<kind>|regular"):
        objective.check(text)


def test_kinds_and_fields(make_run: RunMaker) -> None:
    made = make_run()
    made.start(1)
    lines(
        made.store, 1,
        {"kind": "eval", "step": 0, "loss": 9.0},
        {"kind": "step", "step": 1, "loss": 3.0, "lr": 0.1},
        {"kind": "phase", "phase": "staged", "step": 1},
        {"step": 2, "loss": math.nan},
        {"kind": "eval", "step": 2, "loss": 2.5, "note": "text"},
        {"kind": "step", "step": 3, "loss": math.inf, "ok": True},
    )  # fmt: skip
    made.store.put("metrics/0001/000001.jsonl", b'{"kind": "step", "step": 4, "loss": 1.0}\n{"kind": "st')
    run = made.load()
    assert objective.series(run, EVAL) == [(0, 9.0), (2, 2.5)]
    found = objective.series(run, STEP)
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert math.isnan(found[1][1])
    assert found[2][1] == math.inf
    assert objective.series(run, SweepConfig(objective="step/lr")) == [(1, 0.1)]
    for none in ("eval/note", "step/ok", "phase/step_", "other/loss"):
        assert objective.series(run, SweepConfig(objective=none)) == []


def test_what_was_abandoned_does_not_count(make_run: RunMaker) -> None:
    made = make_run()
    made.start(1)
    evals(made, 1, {10: 1.0, 20: 0.9, 30: 0.8, 40: 0.7})
    made.start(2, resume="checkpoints/step_00000020/0001-0")
    evals(made, 2, {30: 0.5})
    made.start(3, resume="checkpoints/step_00000020/0001-0")
    assert objective.series(made.load(), EVAL) == [(10, 1.0), (20, 0.9)]
    evals(made, 3, {30: 0.4})
    assert objective.series(made.load(), EVAL) == [(10, 1.0), (20, 0.9), (30, 0.4)]


def test_a_rollback_inside_an_attempt(make_run: RunMaker) -> None:
    made = make_run()
    made.start(1)
    steps = [{"kind": "step", "step": step, "loss": 1.0} for step in (19, 20)]
    lines(
        made.store, 1, *steps, {"kind": "eval", "step": 20, "loss": 0.5}, {"kind": "step", "step": 21, "loss": 1.0},
        {"kind": "step", "step": 18, "loss": 1.0},
    )  # fmt: skip
    assert objective.series(made.load(), EVAL) == []
    assert objective.series(made.load(), STEP) == [(18, 1.0)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.booleans()), min_size=1, max_size=6))
def test_the_newest_lineage_counts(make_run: RunMaker, attempts: list[tuple[int, int, bool]]) -> None:
    """Against a model: who resumes takes over what its commit holds, and adds its own steps; step by step, too."""
    made = make_run()
    held: dict[int, tuple[int, dict[int, float]]] = {}  # of each attempt: where it began, and what counts for it
    reader = objective.Reader(made.store, "step/loss")
    for number, (length, fork, scratch) in enumerate(attempts, 1):
        parent = number - 1 if number > 1 and not scratch and held[number - 1][1] else None
        begin, known = 0, {}
        if parent:
            first = held[parent][0]
            begin = min(first + fork, max(held[parent][1]))
            known = {step: value for step, value in held[parent][1].items() if step <= begin}
        made.start(number, resume=f"checkpoints/step_{begin:08d}/{parent:04d}-0" if parent else None)
        mine = {step: float(number) for step in range(begin + 1, begin + length + 1)}
        lines(made.store, number, *({"kind": "step", "step": step, "loss": value} for step, value in mine.items()))
        held[number] = (begin, {**known, **mine})
        run = made.load()
        assert objective.series(run, STEP) == sorted(held[number][1].items()) == reader.points(run)


def test_growing_streams_are_read_on(make_run: RunMaker) -> None:
    made = make_run()
    made.start(1)
    reader = objective.Reader(made.store, "step/loss")
    whole, run = b"", made.load()
    for step in range(1, 60):
        line = json.dumps({"kind": "step", "step": step, "loss": step / 2}).encode() + b"\n"
        made.store.put("metrics/0001/000000.jsonl", whole + line[:9])
        assert [found for found, _ in reader.points(run)] == list(range(1, step))
        whole += line
        made.store.put("metrics/0001/000000.jsonl", whole)
        assert reader.points(run)[-1] == (step, step / 2)


def test_output_of_a_command(make_run: RunMaker) -> None:
    made = make_run()
    made.start(1)
    made.log(1, 0, "epoch 1 acc=0.5\nacc=nonsense\nepoch 2 acc=0.75\r")
    made.log(1, 0, "epoch 3 acc=0.8 epoch 4 acc=0.9\nepoch 5 acc=na", part=1)
    made.log(1, 1, "epoch 9 acc=0.1\n")
    stepped = SweepConfig(objective=r"log:epoch (?P<step>\d+) acc=(?P<value>\S+)")
    assert objective.series(made.load(), stepped) == [(1, 0.5), (2, 0.75), (3, 0.8), (4, 0.9)]
    counted = SweepConfig(objective=r"log:acc=(?P<value>\S+)")
    assert objective.series(made.load(), counted) == [(1, 0.5), (2, 0.75), (3, 0.8), (4, 0.9)]
    made.log(1, 0, "epoch 3 acc=0.8 epoch 4 acc=0.9\nepoch 5 acc=nan", part=1)
    made.end(1, "finished")  # what was not ended by a newline is whole now
    assert math.isnan(objective.series(made.load(), stepped)[-1][1])


@pytest.mark.parametrize(
    ("sweep", "values", "expected"),
    [
        (SweepConfig(), [3.0, 1.0, 2.0], 2.0),
        (SweepConfig(reduce="best"), [3.0, 1.0, 2.0], 1.0),
        (SweepConfig(reduce="best", direction="maximize"), [3.0, math.nan, 2.0], 3.0),
        (SweepConfig(reduce="mean", mean_of=2), [3.0, 1.0, 2.0], 1.5),
        (SweepConfig(reduce="mean", mean_of=9), [3.0, 1.0, 2.0], 2.0),
    ],
)
def test_one_value_of_many(sweep: SweepConfig, values: list[float], expected: float) -> None:
    points = [(10 * number, value) for number, value in enumerate(values, 1)]
    assert objective.final(points, sweep) == (expected, 30)


def test_the_value_of_nothing_and_of_nan() -> None:
    assert objective.final([], EVAL) == (None, None)
    for reduce in ("last", "best", "mean"):
        value, step = objective.final([(4, math.nan)], SweepConfig(reduce=reduce))
        assert step == 4
        assert value is not None
        assert math.isnan(value)


def outcome(made: MadeRun, sweep: SweepConfig = EVAL) -> tuple[str, float | None] | None:
    found = objective.result_of(made.load(), 3, sweep, {"a": 1})
    return (found.outcome, found.value) if found else None


def test_how_a_trial_ends(make_run: RunMaker) -> None:
    made = make_run()
    assert outcome(made) is None
    made.submission()
    assert outcome(made) is None
    made.start(1)
    evals(made, 1, {10: 0.5})
    assert outcome(made) is None
    made.end(1, "preempted", then="requeue")
    assert outcome(made) is None
    made.start(2, resume="checkpoints/step_00000010/0001-0")
    assert outcome(made) is None
    made.end(2, "finished")
    found = objective.result_of(made.load(), 3, EVAL, {"a": 1})
    assert found is not None
    assert (found.trial, found.outcome, found.value, found.step) == (3, "complete", 0.5, 10)
    assert (found.attempts, found.seconds, found.submission, found.params) == (2, 1000.0, 0, {"a": 1})
    assert found == objective.result_of(made.load(), 3, EVAL, {"a": 1})
    made.submission(1)  # resumed: not over any more
    assert outcome(made) is None
    made.start(3, submission=1)
    made.end(3, "failed", failed_rank=1, failed_host="n2", exit_codes={"1": 7})
    found = objective.result_of(made.load(), 3, EVAL, {})
    assert found is not None
    assert (found.outcome, found.submission) == ("failed", 1)
    assert "rank 1 on n2, exit code 7" in found.reason


@pytest.mark.parametrize("wanted", ["pruned", "nan", "timeout"])
def test_what_its_study_stopped(make_run: RunMaker, wanted: str) -> None:
    made = make_run()
    made.submission()
    made.start(1)
    evals(made, 1, {10: 0.5})
    write_intent(made.store, 0, False, "sweep", wanted, "in words")
    assert outcome(made) is None
    made.end(1, "cancelled")
    found = objective.result_of(made.load(), 3, EVAL, {})
    assert found is not None
    assert (found.outcome, found.value, found.reason) == (wanted, None if wanted == "nan" else 0.5, "in words")


def test_finishing_in_spite_of_an_intent(make_run: RunMaker) -> None:
    made = make_run()
    made.submission()
    made.start(1)
    evals(made, 1, {10: 0.5})
    write_intent(made.store, 0, False, "sweep", "pruned", "too late")
    made.end(1, "finished")
    assert outcome(made) == ("complete", 0.5)


def test_finishing_without_a_number(make_run: RunMaker) -> None:
    made = make_run()
    made.submission()
    made.start(1)
    made.end(1, "finished")
    found = objective.result_of(made.load(), 3, EVAL, {})
    assert found is not None
    assert (found.outcome, found.reason) == ("nan", "eval/loss has no value")
    evals(made, 1, {10: math.inf})
    assert outcome(made) == ("nan", None)


def test_cancelled_and_refused_before_any_attempt(make_run: RunMaker) -> None:
    made = make_run()
    made.submission()
    write_intent(made.store, 0, True, "ada")
    assert outcome(made) == ("cancelled", None)
    made.submission(1)
    write_failed(made.store, 1, "no such\npartition")
    found = objective.result_of(made.load(), 3, EVAL, {})
    assert found is not None
    assert (found.outcome, found.reason) == ("failed", "slurm refused it: no such partition")


def test_cancelled_by_a_person(make_run: RunMaker) -> None:
    made = make_run()
    made.submission()
    made.start(1)
    evals(made, 1, {10: 0.5})
    write_intent(made.store, 0, True, "ada")
    made.end(1, "cancelled")
    assert outcome(made) == ("cancelled", 0.5)


def test_on_an_object_store(s3_url: str) -> None:
    made = RunMaker(s3_url)()
    made.submission()
    made.start(1)
    reader = objective.Reader(open_store(made.store.url), "eval/loss")
    for part in range(3):
        lines(made.store, 1, {"kind": "eval", "step": part + 1, "loss": part / 2}, part=part)
        assert len(reader.points(made.load())) == part + 1
    made.end(1, "finished")
    assert outcome(made) == ("complete", 1.0)


def test_a_program_with_checkpoints_of_its_own_goes_on_where_its_output_does(make_run: RunMaker) -> None:
    """No attempt begins at a commit of ours, and yet the second has not begun anew."""
    made = make_run()
    sweep = SweepConfig(objective=r"log:step=(?P<step>\d+) loss=(?P<value>\S+)")
    for attempt, first, last in ((1, 1, 7), (2, 6, 9), (3, 9, 9)):
        made.start(attempt)
        text = "".join(f"step={step} loss={attempt}.{step}\n" for step in range(first, last + 1))
        made.store.put(f"logs/{attempt:04d}/n1/rank0.000000.log", text.encode())
    found = objective.series(made.load(), sweep)
    assert found == [*((step, float(f"1.{step}")) for step in range(1, 6)), (6, 2.6), (7, 2.7), (8, 2.8), (9, 3.9)]


def test_a_study_that_compares_nothing(make_run: RunMaker) -> None:
    sweep = SweepConfig(objective="none")
    objective.check("none")
    made = make_run()
    made.submission()
    made.start(0)
    made.end(0, "finished", "end")
    result = objective.result_of(made.load(), 3, sweep, {})
    assert result is not None
    assert (result.outcome, result.value) == ("complete", None)
