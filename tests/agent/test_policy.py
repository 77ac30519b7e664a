"""One case for each row of what SLURM was seen to do, and for each way a failure budget runs out."""

from __future__ import annotations

import pytest

from llmops.agent.attempts import History
from llmops.agent.policy import local, slurm
from llmops.agent.policy.common import Outcome, after_failure
from llmops.agent.policy.slurm import JobFacts, parse_job, stop_deadline
from llmops.agent.scontrol import job_ref, parse_fields

NOW = 1_000_000.0
RETRY = {"max_no_progress": 3, "max_failures": 20, "backoff_s": 2.0, "backoff_max_s": 60.0}
STOPPED = Outcome("stopped", stop={"cause": "SIGTERM"})
FINISHED = Outcome("finished")
FAILED = Outcome("failed", error="boom")
LOST = Outcome("lost")


def job(state: str, restarts: int = 0, reason: str = "None", preempted: bool = False, left: float = 3600) -> JobFacts:
    return JobFacts(state, restarts, reason, preempted, NOW + left)


SLURM_TABLE = [
    # what happened, outcome, what scontrol shows, cancelled by us -> action, reason
    ("preempted, GraceTime=0: SLURM requeues", STOPPED, job("COMPLETING", 1), False, "kick", "preempted"),
    ("scontrol requeue by an administrator", STOPPED, job("COMPLETING", 1), False, "kick", "preempted"),
    ("a node went down: SLURM requeues", LOST, job("COMPLETING", 1, "NodeDown"), False, "kick", "node_failure"),
    ("ranks killed by the requeue itself", FAILED, job("COMPLETING", 1), False, "kick", "preempted"),
    ("preempted with GraceTime", STOPPED, job("RUNNING", preempted=True), False, "requeue", "preempted"),
    ("warned before the time limit", STOPPED, job("RUNNING", left=100), False, "requeue", "timeout"),
    ("hit the time limit", STOPPED, job("COMPLETING", reason="TimeLimit"), False, "requeue", "timeout"),
    ("killed at the time limit", FAILED, job("COMPLETING", reason="TimeLimit"), False, "requeue", "timeout"),
    ("TERM to the step alone", STOPPED, job("RUNNING"), False, "requeue", "preempted"),
    ("scancel", STOPPED, job("COMPLETING"), False, "exit", "cancelled"),
    ("scancel, ranks killed", FAILED, job("COMPLETING"), False, "exit", "cancelled"),
    ("scancel, seen late", STOPPED, job("CANCELLED"), False, "exit", "cancelled"),
    ("preempted where PreemptMode=CANCEL", STOPPED, job("COMPLETING", preempted=True), False, "requeue", "preempted"),
    ("done", FINISHED, job("RUNNING"), False, "exit", "finished"),
    ("done in the moment of a preemption", FINISHED, job("COMPLETING", 1), False, "exit", "finished"),
    ("crashed", FAILED, job("RUNNING"), False, "again", "failed"),
    ("a node agent died", LOST, job("RUNNING"), False, "again", "node_failure"),
    ("hung", Outcome("hung"), job("RUNNING"), False, "again", "hung"),
    ("llmops cancel, plain", STOPPED, job("COMPLETING"), True, "exit", "cancelled"),
    ("llmops cancel --graceful", STOPPED, job("RUNNING"), True, "exit", "cancelled"),
    ("cancelled while SLURM requeues it", STOPPED, job("COMPLETING", 1), True, "exit", "cancelled"),
    ("finished before the cancel was seen", FINISHED, job("RUNNING"), True, "exit", "finished"),
    ("the controller does not answer after a stop", STOPPED, job("UNKNOWN"), False, "requeue", "preempted"),
]


@pytest.mark.parametrize(
    ("outcome", "facts", "cancelled", "action", "reason"),
    [row[1:] for row in SLURM_TABLE],
    ids=[row[0] for row in SLURM_TABLE],
)
def test_slurm_table(outcome, facts, cancelled, action, reason):
    decision = slurm.decide(outcome, facts, 0, cancelled, History(1, 1), RETRY, NOW, 110)
    assert (decision.action, decision.reason) == (action, reason)


def test_a_restart_that_we_are_ourselves_is_no_requeue():
    decision = slurm.decide(FAILED, job("RUNNING", 2), 2, False, History(1, 1), RETRY, NOW, 110)
    assert decision.action == "again"


LOCAL_TABLE = [
    (FINISHED, False, "exit", "finished", 0),
    (FINISHED, True, "exit", "finished", 0),
    (STOPPED, False, "again", "preempted", 0),
    (STOPPED, True, "exit", "cancelled", 0),
    (FAILED, True, "exit", "cancelled", 0),
    (FAILED, False, "again", "failed", 0),
]


@pytest.mark.parametrize(("outcome", "cancelled", "action", "reason", "code"), LOCAL_TABLE)
def test_local_table(outcome, cancelled, action, reason, code):
    decision = local.decide(outcome, cancelled, History(1, 1), RETRY)
    assert (decision.action, decision.reason, decision.exit_code) == (action, reason, code)


@pytest.mark.parametrize(
    ("failures", "without", "action", "delay"),
    [
        (1, 0, "again", 2),
        (1, 1, "again", 2),
        (2, 2, "again", 4),
        (3, 3, "exit", 0),
        (20, 1, "again", 2),
        (21, 0, "exit", 0),
    ],
)
def test_failures_are_bounded_and_back_off(failures, without, action, delay):
    decision = after_failure(FAILED, History(failures, without), RETRY)
    assert (decision.action, decision.delay_s) == (action, delay)
    assert decision.exit_code == (1 if action == "exit" else 0)
    assert bool(decision.detail) == (action == "exit")


def test_back_off_has_a_ceiling():
    retry = {**RETRY, "max_no_progress": 100, "max_failures": 100}
    assert after_failure(FAILED, History(50, 50), retry).delay_s == 60


@pytest.mark.parametrize(
    ("facts", "asked", "seconds"),
    [
        (job("COMPLETING", 1), False, 25),  # GraceTime=0: KillWait, less the way out
        (job("RUNNING", preempted=True), False, 55),  # GraceTime=30 comes first
        (job("RUNNING", left=100), True, 30),  # warned: as long as a save needs, and never less than KillWait gives
        (job("RUNNING", left=10), True, 25),
        (job("UNKNOWN"), False, 25),
    ],
)
def test_deadline_of_a_stop(facts, asked, seconds):
    assert stop_deadline(facts, 30, 30 if facts.preempted else 0, asked, 20, NOW) == NOW + seconds


def test_an_earlier_preemption_does_not_count():
    shown = "JobState=RUNNING Restarts=1 Reason=None PreemptTime={} StartTime=2026-01-01T10:00:00 EndTime=Unknown"
    earlier = parse_job(parse_fields(shown.format("2026-01-01T09:00:00")))
    now = parse_job(parse_fields(shown.format("2026-01-01T10:30:00")))
    never = parse_job(parse_fields(shown.format("None")))
    assert (earlier.preempted, now.preempted, never.preempted) == (False, True, False)
    assert now.restarts == 1
    assert now.end_time is None


def test_a_job_that_is_just_being_signalled_is_running():
    shown = "JobState=SIGNALING Restarts=0 PreemptTime=2026-01-01T10:30:00 StartTime=2026-01-01T10:00:00"
    told = parse_job(parse_fields(shown))
    assert (told.state, told.preempted) == ("RUNNING", True)


def test_array_elements_are_asked_for_by_their_own_name():
    last = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_ref(last) == "7_3"
    assert job_ref({"SLURM_JOB_ID": "8"}) == "8"
