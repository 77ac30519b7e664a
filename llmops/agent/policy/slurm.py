"""What comes next on SLURM. Each row was seen on a real cluster; a requeue that ignores them resurrects cancelled jobs.

=============================  =========  ==========================================  =========================
JobState                       Restarts   means                                       do
=============================  =========  ==========================================  =========================
any                            one more   requeued by preemption, an administrator,   cut the requeue wait
                                          or a lost node
RUNNING, stopped on request    same       preemption with GraceTime, or a warning     requeue, cut the wait
                                          before the time limit
COMPLETING, Reason=TimeLimit   same       the limit was hit                           requeue still rescues it
preempted, requeue refused     same       PreemptMode=CANCEL, JobRequeue=0            successor job
COMPLETING or CANCELLED        same       scancel                                     nothing
RUNNING, not stopped           same       done, or crashed                            exit, or bounded retries
=============================  =========  ==========================================  =========================
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from llmops.agent.attempts import History
from llmops.agent.policy.common import Decision, Outcome, after_failure


@dataclass(frozen=True)
class JobFacts:
    """What ``scontrol show job`` says of the job, as far as the decision needs it."""

    state: str  # UNKNOWN when the controller did not answer
    restarts: int
    reason: str
    preempted: bool  # since it started
    end_time: float | None  # epoch seconds; the time limit while it runs


def decide(
    outcome: Outcome,
    job: JobFacts,
    my_restarts: int,
    cancelled: bool,
    history: History,
    retry: dict[str, Any],
    now: float,
    warning_s: float,
) -> Decision:
    """Decide after an attempt inside a SLURM job whose ``SLURM_RESTART_COUNT`` is ``my_restarts``.

    ``warning_s``: how long before its time limit the job is warned, in seconds.
    """
    if outcome.kind == "finished":
        return Decision("exit", "finished")
    if cancelled:
        return Decision("exit", "cancelled")
    if job.restarts > my_restarts:
        reason = "node_failure" if job.reason == "NodeDown" or outcome.kind == "lost" else "preempted"
        return Decision("kick", reason, detail="SLURM requeued the job")
    if job.reason == "TimeLimit":
        return Decision("requeue", "timeout", detail="the time limit was hit")
    if job.state in ("COMPLETING", "CANCELLED") and not job.preempted:
        return Decision("exit", "cancelled", detail=f"scancel (JobState={job.state}, Reason={job.reason})")
    if job.preempted:
        return Decision("requeue", "preempted", detail=f"preempted (JobState={job.state})")
    if outcome.kind == "stopped":
        if job.end_time is not None and now > job.end_time - warning_s - 90:
            return Decision("requeue", "timeout", detail="stopped before the time limit")
        return Decision("requeue", "preempted", detail=f"stopped by {(outcome.stop or {}).get('cause')}")
    return after_failure(outcome, history, retry)


def stop_deadline(job: JobFacts, kill_wait_s: float, grace_s: float, asked: bool, save_s: float, now: float) -> float:
    """Until when the ranks may save, in epoch seconds, after a signal.

    ``kill_wait_s``: SLURM's KillWait; ``grace_s``: the partition's GraceTime; ``asked``: the signal was a warning
    (USR1) and no
    TERM, so that nothing kills the job before its time limit. Five seconds are kept for the way out.
    """
    margin = 5.0
    if job.state == "RUNNING" and job.preempted:
        return now + grace_s + kill_wait_s - margin
    if job.state == "RUNNING" and asked:
        # Preemption may have sent the warning and kill at once, so never more than was planned for a save.
        limit = job.end_time - margin if job.end_time else now + save_s
        return max(min(limit, now + max(save_s, kill_wait_s)), now + kill_wait_s - margin)
    return now + kill_wait_s - margin


def parse_job(fields: dict[str, str]) -> JobFacts:
    """Facts from the fields of ``scontrol -o show job``. A job that is not there has no fields."""
    preempted, started = _epoch(fields.get("PreemptTime", "None")), _epoch(fields.get("StartTime", "None"))
    state = fields.get("JobState", "UNKNOWN")
    return JobFacts(
        # What the state is called while a signal is on its way to a running job, which is when we are asked to stop.
        state="RUNNING" if state == "SIGNALING" else state,
        restarts=int(fields.get("Restarts", "0")),
        reason=fields.get("Reason", "None"),
        # The time of an earlier preemption stays in the record after the job was requeued.
        preempted=preempted is not None and (started is None or preempted >= started),
        end_time=_epoch(fields.get("EndTime", "Unknown")),
    )


def _epoch(text: str) -> float | None:
    if text in ("Unknown", "None", "N/A", ""):
        return None
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
