"""One line per situation: what the directory says, what the scheduler says, what the user is told."""

from __future__ import annotations

from typing import Any

import pytest

from llmops.job import JobState, JobView
from llmops.runs.records import write_failed, write_intent
from llmops.runs.state import derive_state, describe_end, needs_second_look

# Each letter writes something: s = submitted with job 100, n = submitted, no job recorded, S = a second submission,
# f = refused, i = intent end, 0/1 = attempt starts, and a word after it = its end ("preempted>requeue").
TABLE: list[tuple[str, JobState | None, str, str, str]] = [
    # written               job           told            state        reason contains
    ("", None, "", "unknown", "launcher died"),
    ("n", None, "", "unknown", "submission was interrupted"),
    ("n", "pending", "Priority", "pending", "Priority"),  # the caller found it by its tag
    ("n", "running", "RUNNING", "running", "starting"),
    ("n i", None, "", "cancelled", "cancelled by ada"),
    ("n f", None, "", "failed", "slurm refused it: sbatch: error: invalid partition"),
    ("s", None, "", "unknown", "was not asked"),
    ("s", "pending", "Resources", "pending", "Resources"),
    ("s", "running", "RUNNING", "running", "starting"),
    ("s", "gone", "SLURM knows no such job", "failed", "before the first attempt: slurm says SLURM knows no such job"),
    ("s", "failed", "NODE_FAIL", "failed", "before the first attempt: slurm says NODE_FAIL"),
    ("s", "cancelled", "CANCELLED", "cancelled", "slurm says CANCELLED"),
    (
        "s",
        "unreachable",
        "squeue: timed out",
        "unknown",
        "slurm did not answer (squeue: timed out); last known: no attempt",
    ),
    ("s i", "pending", "", "pending", "stopping: cancelled by ada"),
    ("s i", "gone", "", "cancelled", "cancelled by ada"),
    ("s i", "cancelled", "", "cancelled", "cancelled by ada"),
    # an attempt without an end
    ("s 0", "running", "RUNNING", "running", ""),
    ("s 0", "completing", "COMPLETING", "running", "completing"),
    ("s 0", "pending", "BeginTime", "preempted", "BeginTime; attempt 0 was running"),
    ("s 0", "failed", "NODE_FAIL", "failed", "attempt 0 died with its job: slurm says NODE_FAIL"),
    ("s 0", "failed", "OUT_OF_MEMORY", "failed", "OUT_OF_MEMORY"),
    ("s 0", "finished", "COMPLETED", "failed", "attempt 0 died with its job: slurm says COMPLETED"),
    ("s 0", "gone", "", "failed", "slurm says gone"),
    ("s 0", "cancelled", "CANCELLED", "cancelled", "slurm says CANCELLED"),
    ("s 0", "unreachable", "x", "unknown", "last known: attempt 0 was running"),
    ("s 0 i", "running", "", "running", "stopping: cancelled by ada"),
    ("s 0 i", "gone", "", "cancelled", "cancelled by ada"),
    ("s 0", None, "", "unknown", "attempt 0 was running"),
    # an attempt after which more follows
    ("s 0 preempted>requeue", "pending", "BeginTime", "preempted", "BeginTime; attempt 0 was preempted"),
    ("s 0 timeout>requeue", "pending", "", "preempted", "attempt 0 reached its time limit"),
    ("s 0 node_failure>requeue", "pending", "", "preempted", "attempt 0 lost a node"),
    ("s 0 failed>retry", "pending", "", "pending", "attempt 0 failed"),
    ("s 0 failed>retry", "running", "", "running", "starting again: attempt 0 failed"),
    ("s 0 hung>retry", "running", "", "running", "starting again: attempt 0 hung"),
    ("s 0 preempted>requeue", "completing", "", "preempted", "next: requeue"),
    ("s 0 preempted>requeue", "running", "", "running", "starting again: attempt 0 was preempted"),
    ("s 0 preempted>requeue", "gone", "", "failed", "attempt 0 was preempted and was not started again"),
    ("s 0 preempted>requeue", "cancelled", "CANCELLED", "cancelled", "slurm says CANCELLED"),
    ("s 0 preempted>requeue", "unreachable", "x", "unknown", "attempt 0 was preempted"),
    ("s 0 preempted>requeue i", "gone", "", "cancelled", "cancelled by ada"),
    ("s 0 preempted>requeue 1", "running", "", "running", ""),
    # an attempt after which nothing follows: the scheduler has nothing to add
    ("s 0 finished>end", None, "", "finished", ""),
    ("s 0 finished>end", "unreachable", "", "finished", ""),
    ("s 0 finished>end i", "gone", "", "finished", ""),
    ("s 0 failed>end", "failed", "FAILED", "failed", "failed: rank 3 on n2, exit code 1"),
    ("s 0 failed>end i", "gone", "", "failed", "failed: rank 3"),
    ("s 0 hung>end", "running", "", "failed", "hung"),
    ("s 0 cancelled>end", "cancelled", "", "cancelled", ""),
    ("s 0 cancelled>end i", "cancelled", "", "cancelled", "cancelled by ada"),
    ("s 0 preempted>end i", "gone", "", "cancelled", "cancelled by ada"),
    ("s 0 timeout>end", "gone", "", "preempted", "not started again"),
    # a second submission does not inherit the end of the first
    ("s 0 failed>end S", "pending", "Priority", "pending", "Priority"),
    ("s 0 preempted>end S", "running", "", "running", "starting"),
    ("s 0 finished>end S", "gone", "", "failed", "before the first attempt"),
]


def write(made: Any, what: str) -> None:
    submission = attempt = 0
    for word in what.split():
        if word in "snS":
            submission = 1 if word == "S" else 0
            made.submission(submission, None if word == "n" else f"10{submission}")
        elif word == "f":
            write_failed(made.store, submission, "sbatch: error:\n  invalid partition")
        elif word == "i":
            write_intent(made.store, submission, graceful=True, by="ada")
        elif word.isdigit():
            attempt = int(word)
            made.start(attempt, submission=submission)
        else:
            reason, then = word.split(">")
            where = {"failed_rank": 3, "failed_host": "n2", "exit_codes": {"3": 1}} if reason == "failed" else {}
            made.end(attempt, reason, then, **where)


@pytest.mark.parametrize(("written", "job", "told", "state", "reason"), TABLE)
def test_state(make_run: Any, written: str, job: JobState | None, told: str, state: str, reason: str) -> None:
    made = make_run()
    write(made, written)
    found, why = derive_state(made.load(), JobView("100", job, told) if job else None)
    assert found == state
    assert reason in why
    assert "\n" not in why
    if not reason:
        assert why == ""


def test_a_directory_that_is_no_run(make_run: Any) -> None:
    made = make_run()
    (made.store.local_path / "run.json").unlink()
    assert derive_state(made.load(), None)[0] == "unknown"
    assert "run.json is missing" in derive_state(made.load(), None)[1]


@pytest.mark.parametrize(
    ("written", "job", "again"),
    [
        ("s 0", "gone", True),
        ("s 0", "finished", True),
        ("s", "gone", True),
        ("s 0", "running", False),
        ("s 0", "unreachable", False),
        ("s 0", None, False),
        ("s 0 finished>end", "gone", False),
        ("", "gone", False),
    ],
)
def test_second_look(make_run: Any, written: str, job: JobState | None, again: bool) -> None:
    made = make_run()
    write(made, written)
    assert needs_second_look(made.load(), JobView("100", job) if job else None) is again


def test_ends_in_words(make_run: Any) -> None:
    made = make_run()
    made.start(0)
    for changes, words in [
        ({}, "failed"),
        ({"failed_rank": 3, "failed_host": "n2", "exit_codes": {"3": -9}}, "failed: rank 3 on n2, signal 9"),
        ({"failed_host": "n2"}, "failed: n2"),
        ({"failed_rank": 1, "exit_codes": {}}, "failed: rank 1"),
    ]:
        made.end(0, "failed", **changes)
        newest = made.load().newest
        assert newest is not None
        assert newest.end is not None
        assert describe_end(newest.end) == words
