"""Where time went: scripted histories with known answers."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmops.job import JobView
from llmops.monitor import goodput
from llmops.monitor.describe import describe, describe_run
from llmops.monitor.timeline import KINDS, Span, timeline
from llmops.runs.state import derive_state
from tests.conftest import RunMaker
from tests.monitor.history import KNOWN, T0, History, preempted_and_crashed

RUNNING = JobView("100", "running")


def test_the_history_has_the_known_answers(make_run: RunMaker) -> None:
    run = preempted_and_crashed(make_run).made.load()
    assert sum(KNOWN.values()) == 3600
    spans = timeline(run, T0 + 99999, alive=False)
    account = goodput.account(spans, nodes=2, ranks_per_node=4)
    assert {name: round(value / 2, 6) for name, value in account.node_s.items()} == KNOWN
    assert account.total_s == pytest.approx(7200)
    assert account.held_rank_s == pytest.approx((3600 - 400) * 8)
    assert sum(account.shares().values()) == pytest.approx(1, abs=1e-12)
    assert account.goodput == pytest.approx(KNOWN["committed"] / 3600)
    (described,) = describe([run], {}, T0 + 5000)
    assert described["goodput"] == account.goodput
    assert described["restarts"] == {"preempted": 1, "failed": 1}
    assert described["last_commit"] == {"step": 250, "time": T0 + 3490}
    assert described["ended"] == T0 + 3600


def test_a_period_takes_its_part(make_run: RunMaker) -> None:
    spans = timeline(preempted_and_crashed(make_run).made.load(), T0 + 99999, alive=False)
    halves = [goodput.account(spans, since=T0, until=T0 + 1800), goodput.account(spans, since=T0 + 1800)]
    both, whole = goodput.total(halves), goodput.account(spans)
    assert {name: round(value, 6) for name, value in both.node_s.items()} == {
        name: round(value, 6) for name, value in whole.node_s.items()
    }
    assert [each.total_s for each in halves] == [pytest.approx(1800), pytest.approx(1800)]
    assert goodput.account(spans, until=T0 - 1).goodput is None


def test_a_run_that_goes_on(make_run: RunMaker) -> None:
    history = History(make_run)
    history.attempt(10)
    history.started(20, 21, 22)
    history.steps(1, 50, 30, 2)  # to 128
    history.saved(40, 111, 115, 1.0, 1.0)  # training until 110
    described, spans = describe_run(history.made.load(), RUNNING, T0 + 140)
    assert [(each.kind, each.start - T0, each.end - T0) for each in spans] == [
        ("queue", 0, 10),
        ("import", 10, 20),
        ("rendezvous", 20, 21),
        ("load", 21, 22),
        ("train", 22, 110),
        ("uncommitted", 110, 140),
    ]
    assert described["goodput"] == pytest.approx((110 - 22 - 1) / 140)
    assert described["last_commit"] == {"step": 40, "time": T0 + 115}
    assert (described["phase"], described["stalled_s"]) == ("training", None)
    assert described["eta_s"] == pytest.approx(2 * 50)
    assert described["tokens_per_s"] == 1000


def test_a_run_that_gives_no_sign_of_life(make_run: RunMaker) -> None:
    history = History(make_run)
    history.attempt(10)
    history.started(20, 21, 22)
    history.steps(1, 50, 30, 2)  # to 128
    described, spans = describe_run(history.made.load(), RUNNING, T0 + 428)
    assert described["stalled_s"] == pytest.approx(300)
    assert [(each.kind, each.start - T0) for each in spans[-2:]] == [("uncommitted", 22), ("hang", 128)]
    # The clock of who looks may be behind that of the node.
    early, spans = describe_run(history.made.load(), RUNNING, T0 + 100)
    assert early["stalled_s"] is None
    assert all(each.end > each.start for each in spans)


def test_a_hang_costs_from_the_last_step_on(make_run: RunMaker) -> None:
    history = History(make_run)
    history.attempt(0)
    history.started(10, 11, 12)
    history.steps(1, 10, 20, 1)  # to 29
    history.end(1829, "hung", "end")
    account = goodput.account(timeline(history.made.load(), T0 + 9999, alive=False))
    assert (account.node_s["lost"], account.node_s["hang"]) == (29 - 12, 1800)
    assert account.goodput == 0


def test_a_node_that_vanished_is_counted_to_its_last_word(make_run: RunMaker) -> None:
    history = History(make_run)
    history.attempt(0)
    history.started(10, 11, 12)
    history.steps(1, 10, 20, 1)  # to 29, never saved
    history.attempt(500)
    run = history.made.load()
    spans = timeline(run, T0 + 510, alive=True)
    assert [(each.kind, each.start - T0, each.end - T0, each.attempt) for each in spans] == [
        ("import", 0, 10, 0),
        ("rendezvous", 10, 11, 0),
        ("load", 11, 12, 0),
        ("lost", 12, 29, 0),
        ("queue", 29, 500, None),
        ("import", 500, 510, 1),
    ]


def test_nobody_pays_for_the_time_before_a_resume(make_run: RunMaker) -> None:
    history = History(make_run)
    history.attempt(0)
    history.started(10, 11, 12)
    history.steps(1, 10, 20, 1)
    history.saved(10, 30, 31, 1.0, 1.0)
    history.end(40, "failed", "end")
    made = history.made
    made.put("job/0001/submission.json", {"number": 1, "tag": "t", "backend": "slurm", "created": T0 + 5000})
    spans = timeline(made.load(), T0 + 5100, alive=False)
    assert [(each.kind, each.start - T0, each.end - T0) for each in spans[-2:]] == [
        ("idle", 31, 40),
        ("queue", 5000, 5100),
    ]


@pytest.mark.parametrize(
    ("reason", "saved", "kind"),
    [
        ("finished", False, "train"),
        ("preempted", True, "train"),
        ("preempted", False, "lost"),
        ("failed", False, "lost"),
    ],
)
def test_a_program_without_metrics(make_run: RunMaker, reason: str, saved: bool, kind: str) -> None:
    history = History(make_run, kind="command")
    history.attempt(5)
    history.end(65, reason, "end", saved=saved)
    spans = timeline(history.made.load(), T0 + 100, alive=False)
    assert [(each.kind, each.seconds) for each in spans] == [("queue", 5), (kind, 60)]


def test_one_that_died_in_its_imports(make_run: RunMaker) -> None:
    history = History(make_run)
    history.attempt(5)
    history.end(65, "failed", "end")
    spans = timeline(history.made.load(), T0 + 100, alive=False)
    assert [(each.kind, each.seconds) for each in spans] == [("queue", 5), ("import", 60)]


def test_lines_that_are_foreign_or_half_written(make_run: RunMaker) -> None:
    history = preempted_and_crashed(make_run)
    path = "metrics/0002/000000.jsonl"
    before = history.made.store.get(path)
    history.made.store.put(path, b'\xff\xfe{"phase": 3}\n[1]\n' + before + b'{"kind": "phase", "phase": "sa')
    run = history.made.load()
    spans = timeline(run, T0 + 99999, alive=False)
    account = goodput.account(spans)
    assert {name: round(value, 6) for name, value in account.node_s.items()} == KNOWN
    assert derive_state(run, None)[0] == "finished"


def test_only_the_ends_of_long_metrics_are_read(make_run: RunMaker) -> None:
    history = History(make_run)
    history.attempt(0)
    history.started(10, 11, 12)
    store = history.made.store
    line = b'{"kind": "step", "step": %d, "loss": 1.0, "time": %f}\n'
    head = store.get("metrics/0000/000000.jsonl")
    body = b"".join(line % (step, T0 + 12 + step) for step in range(1, 400_001))
    tail = b'{"kind": "phase", "phase": "staged", "step": 400000, "seconds": 1.0, "stall_s": 9.0, "time": %f}\n' % (
        T0 + 400_100
    ) + b'{"kind": "phase", "phase": "saved", "step": 400000, "time": %f}\n' % (T0 + 400_200)
    store.put("metrics/0000/000000.jsonl", head + body + tail)
    run = history.made.load()
    began = time.process_time()
    spans = timeline(run, T0 + 400_300, alive=True)
    took = time.process_time() - began
    assert [each.kind for each in spans] == ["import", "rendezvous", "load", "train", "uncommitted"]
    assert spans[-2].stall_s == 9
    assert took < 0.5, took  # reading all of the 25 MB takes seconds


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.floats(0.001, 1e6), st.floats(0, 1)), min_size=1, max_size=20),
    st.integers(1, 1000),
)
def test_shares_sum_to_one(drawn: list[tuple[str, float, float]], nodes: int) -> None:
    at, spans = T0, []
    for kind, seconds, stall in drawn:
        spans.append(Span(kind, at, at + seconds, 0, stall * seconds if kind == "train" else 0.0))  # type: ignore[arg-type]
        at = spans[-1].end
    account = goodput.account(spans, nodes)
    assert sum(account.shares().values()) == pytest.approx(1, abs=1e-9)
    assert account.total_s == pytest.approx(nodes * (at - T0), rel=1e-6, abs=1e-3)


def test_weeks_are_those_of_the_calendar() -> None:
    spans = [Span("train", T0, T0 + 20 * 86400)]
    weeks = goodput.weeks_of(spans)
    assert [name for name, _, _ in weeks] == ["2026-W06", "2026-W07", "2026-W08"]
    assert all(first < following for _, first, following in weeks)
    assert all(weeks[at][2] == weeks[at + 1][1] for at in range(len(weeks) - 1))
