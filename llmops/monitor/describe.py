"""A run as a plain object: what ``llmops status --json``, the tables and the dashboards all show."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from llmops.errors import ClusterError, UserError
from llmops.job import JobView
from llmops.monitor import goodput
from llmops.monitor.timeline import Facts, Span, read_facts, timeline
from llmops.runs.lineage import attempt_steps, recent_metrics, segments
from llmops.runs.model import Attempt, Run
from llmops.runs.state import DONE, State, derive_state, describe_end

RECENT_STEPS = 64  # whose losses the table's spark line shows
RATE_STEPS = 16  # whose speed counts as the speed of now
ERROR_LINES = 20
SILENT_S, SILENT_STEPS = 60.0, 10  # a run is stalled after so long, and so many of its steps, without a line
SILENT_STARTING_S = 900.0  # before the first step
_ATTEMPT_STATES = {
    "finished": "finished",
    "preempted": "preempted",
    "timeout": "preempted",
    "failed": "failed",
    "hung": "failed",
    "node_failure": "lost",
    "cancelled": "cancelled",
}
_PHASES = {
    "started": "importing",
    "imported": "connecting",
    "distributed": "loading",
    "loaded": "training",
    "first_step": "training",
    "staged": "training",
    "saved": "training",
    "save_failed": "training",
    "stopped": "stopping",
    "finished": "stopping",
}

Described = dict[str, Any]
EMPTY: Described = {
    "id": "",
    "name": "",
    "kind": None,
    "owner": None,
    "parent": None,
    "cloned_from": None,
    "backend": "",
    "job_ids": [],
    "state": "unknown",
    "reason": "",
    "phase": None,
    "step": 0,
    "max_steps": None,
    "loss": None,
    "recent_losses": [],
    "tokens_per_s": None,
    "mfu": None,
    "goodput": None,
    "eta_s": None,
    "stalled_s": None,
    "last_commit": None,
    "restarts": {},
    "nodes": None,
    "ranks_per_node": None,
    "created": None,
    "ended": None,
    "url": "",
    "error": None,
    "problems": [],
    "attempts": [],
}
StepRecord = dict[str, Any]


def describe(runs: Sequence[Run], jobs: Mapping[str, JobView], now: float | None = None) -> list[Described]:
    """The stable JSON objects of ``llmops status --json``, one a run. Keys are added over time, never renamed.

    ``jobs``: by job id; the one of each run's newest submission is looked at. Times are epoch seconds. A number that is
    not finite is null. Strings are as they were written: escape them before they reach a terminal.
    """
    at = time.time() if now is None else now
    return [describe_run(run, jobs.get(run.job_id) if run.job_id else None, at)[0] for run in runs]


def describe_run(run: Run, job: JobView | None, now: float) -> tuple[Described, list[Span]]:
    """One run's object, and how it has spent its time."""
    state, reason = derive_state(run, job)
    record = run.record
    problems = list(run.problems)
    alive = state == "running"
    recent: list[StepRecord] = []
    facts, spans, stalled = Facts(), list[Span](), None
    try:
        recent = recent_metrics(run, RECENT_STEPS)
        if run.newest:
            facts = read_facts(run, run.newest.number)
        stalled = _stalled(run, recent, facts, now) if alive else None
        spans = timeline(run, now if state not in DONE else _ended(run) or now, alive, stalled, facts)
        attempts = [_attempt(run, attempt, state, attempt_steps(run, attempt.number)) for attempt in run.attempts]
        committed = _last_commit(run, facts)
    except (UserError, ClusterError, OSError) as error:
        # Metrics that cannot be read take nothing away from the rest of this run, nor from other runs.
        problems.append(str(error))
        attempts, committed = [_attempt(run, attempt, state, (None, None)) for attempt in run.attempts], None
    rate = _rate(recent, run) if alive else None
    silent = record is not None and record.kind == "command" and facts.last is None  # a program without metrics
    step, most = _step(run, recent, facts), record.max_steps if record else None
    described: Described = {
        **EMPTY,
        "id": run.id,
        "name": run.name,
        "kind": record.kind if record else None,
        "owner": record.owner if record else None,
        "parent": record.parent if record else None,
        "cloned_from": record.cloned_from if record else None,
        "backend": run.backend,
        "job_ids": run.job_ids,
        "state": state,
        "reason": reason,
        "phase": None if silent or not alive else _phase(run, facts, recent),
        "step": step,
        "max_steps": most,
        "loss": finite(recent[-1]["loss"]) if recent else None,
        "recent_losses": [finite(each["loss"]) for each in recent],
        "tokens_per_s": _middle(recent, "tokens_per_s"),
        "mfu": _middle(recent, "mfu"),
        "goodput": None if silent and alive and facts.commit is None else goodput.account(spans).goodput,
        "eta_s": rate * max(most - step, 0) if rate is not None and most else None,
        "stalled_s": stalled,
        "last_commit": committed,
        "restarts": dict(Counter(each.end.reason for each in run.attempts[:-1] if each.end)),
        "nodes": record.nodes if record else None,
        "ranks_per_node": record.ranks_per_node if record else None,
        "created": record.created if record else None,
        "ended": _ended(run) if state in DONE else None,
        "url": run.url,
        "error": _error(run),
        "problems": problems,
        "attempts": attempts,
    }
    return described, spans


def _attempt(run: Run, attempt: Attempt, state: State, steps: tuple[int | None, int | None]) -> Described:
    first, last = steps
    end = attempt.end
    return {
        "number": attempt.number,
        "submission": attempt.start.submission,
        "job_id": attempt.start.job_id,
        "state": _ATTEMPT_STATES[end.reason] if end else _open_attempt(run, attempt, state),
        "reason": end.reason if end else "",
        "why": describe_end(end) if end else "",
        "detail": (end.detail or "") if end else "",
        "next": end.next if end else None,
        "hosts": attempt.start.hosts,
        "resume_step": attempt.start.resume_step,
        "first_step": first,
        "last_step": last,
        "started": attempt.start.time,
        "ended": end.time if end else None,
    }


def _open_attempt(run: Run, attempt: Attempt, state: State) -> str:
    """An attempt without an end runs only if it is the newest, and its job is not known to be over."""
    newest = attempt is run.newest and run.submissions and attempt.start.submission == run.submissions[-1].number
    if newest and state in ("running", "unknown"):
        return "running"
    return "cancelled" if newest and state == "cancelled" else "lost"


def _step(run: Run, recent: Sequence[Mapping[str, Any]], facts: Facts) -> int:
    """The last step that is known to count; metrics may be written every few steps only."""
    known = [each["step"] for each in recent[-1:]]
    if facts.commit is not None:
        known.append(facts.commit.step)
    if run.newest:
        known.append(run.newest.start.resume_step)
        if run.newest.end and run.newest.end.last_step is not None:
            known.append(run.newest.end.last_step)
    return max(known, default=0)


def _error(run: Run) -> str | None:
    """Why the newest submission was refused, else the last lines of the newest attempt that failed."""
    if run.submissions and run.submissions[-1].failed:
        return run.submissions[-1].failed.error
    for attempt in reversed(run.attempts):
        if attempt.end and attempt.end.error:
            return "\n".join(attempt.end.error.rstrip("\n").split("\n")[-ERROR_LINES:])
    return None


def finite(value: Any) -> float | None:
    """A number that JSON has; None for everything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _rate(recent: Sequence[StepRecord], run: Run) -> float | None:
    """Seconds a step takes at present, with what lies between steps; None where too little is known."""
    times = [
        (each["step"], each["time"])
        for each in recent[-RATE_STEPS:]
        if isinstance(each.get("time"), int | float) and run.newest and each["step"] > run.newest.start.resume_step
    ]
    if len(times) < 2 or times[-1][0] <= times[0][0]:
        return None
    return float(max((times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0]), 0.0))


def _middle(recent: Sequence[StepRecord], key: str) -> float | None:
    values = [value for each in recent[-RATE_STEPS:] if (value := finite(each.get(key))) is not None]
    return median(values) if values else None


def _phase(run: Run, facts: Facts, recent: Sequence[StepRecord]) -> str:
    """What the newest attempt is doing, as far as its metrics tell."""
    if run.newest and recent and recent[-1]["step"] > run.newest.start.resume_step and facts.over is None:
        return "training"
    if facts.phase is None:
        return "starting"
    return _PHASES.get(facts.phase, facts.phase)


def _stalled(run: Run, recent: Sequence[StepRecord], facts: Facts, now: float) -> float | None:
    """For how long a run has written nothing, if that is suspicious. Programs that write no metrics never are."""
    if facts.last is None or run.newest is None or run.newest.end is not None:
        return None
    silent = now - facts.last
    rate = _rate(recent, run)
    bound = SILENT_STARTING_S if rate is None else max(SILENT_S, SILENT_STEPS * rate)
    return silent if silent > bound else None


def _last_commit(run: Run, facts: Facts) -> dict[str, Any] | None:
    """The newest commit that counts: of the newest attempt, else the one that it went on from."""
    if facts.commit is not None:
        return {"step": facts.commit.step, "time": facts.commit.told}
    for segment in reversed(segments(run)[:-1]):
        if segment.last_step is not None:
            mark = read_facts(run, segment.attempt, segment.last_step).commit
            return {"step": segment.last_step, "time": mark.told if mark else None}
    return None


def _ended(run: Run) -> float | None:
    """When a run that is over was over, as far as its directory tells."""
    submission = run.submissions[-1] if run.submissions else None
    newest = run.newest if run.newest and submission and run.newest.start.submission == submission.number else None
    if newest and newest.end:
        return newest.end.time
    if submission is None:
        return None
    if submission.failed:
        return submission.failed.time
    return submission.intent.time if submission.intent else None
