"""What a run is doing, from what its directory and its scheduler say. Pure: asks nobody."""

from __future__ import annotations

from typing import Literal

from llmops.job import JobView
from llmops.runs.model import Attempt, AttemptEnd, Run, Submission

State = Literal["pending", "running", "preempted", "finished", "failed", "cancelled", "unknown"]
DONE: tuple[State, ...] = ("finished", "failed", "cancelled")

_LIVE = ("pending", "running", "completing")
_INTERRUPTIONS = ("preempted", "timeout", "node_failure")
_WORDS = {
    "finished": "finished",
    "preempted": "was preempted",
    "timeout": "reached its time limit",
    "failed": "failed",
    "hung": "hung",
    "node_failure": "lost a node",
    "cancelled": "was cancelled",
}


def derive_state(run: Run, job: JobView | None) -> tuple[State, str]:
    """State of the run, and why, in words (may be empty).

    ``job``: the view of the newest submission's job; None when it was not asked for, or there is none. Where the
    submission records no job, look its tag up first: a job may have started before the launcher could record it.
    """
    if not run.submissions:
        return "unknown", run.problems[0] if run.problems else "its launcher died before it was submitted"
    submission = run.submissions[-1]
    attempt = _newest(run, submission)
    ended = attempt.end if attempt else None
    if ended and (ended.next == "end" or ended.reason == "finished"):
        return _ended(ended, submission)
    if submission.failed:
        return "failed", f"{submission.backend} refused it: {_line(submission.failed.error)}"
    if job is None:
        return _without_view(submission, attempt)
    if job.state == "unreachable":
        return "unknown", f"{submission.backend} did not answer ({_line(job.reason)}); last known: {_known(attempt)}"
    if job.state in _LIVE:
        return _live(submission, attempt, job)
    return _over(submission, attempt, job)


def needs_second_look(run: Run, job: JobView | None) -> bool:
    """The job is over, yet its attempt has no end. The run was read before the job was asked: read it again."""
    if job is None or job.state in _LIVE or job.state == "unreachable" or not run.submissions:
        return False
    attempt = _newest(run, run.submissions[-1])
    return attempt is None or attempt.end is None


def describe_end(end: AttemptEnd) -> str:
    """Why an attempt ended, in a few words: ``failed: rank 3 on n2, exit code 1``."""
    rank = f"rank {end.failed_rank}" if end.failed_rank is not None else ""
    text = f"{rank} on {end.failed_host}" if rank and end.failed_host else rank or end.failed_host or ""
    code = end.exit_codes.get(str(end.failed_rank))
    if code is not None:
        text += f", exit code {code}" if code >= 0 else f", signal {-code}"
    return f"{end.reason}: {text}" if text else end.reason


def _newest(run: Run, submission: Submission) -> Attempt | None:
    """The newest attempt, if it belongs to this submission."""
    attempt = run.newest
    return attempt if attempt and attempt.start.submission == submission.number else None


def _ended(end: AttemptEnd, submission: Submission) -> tuple[State, str]:
    """The supervisor decided that nothing follows."""
    if end.reason == "finished":
        return "finished", ""
    if end.reason == "cancelled" or (submission.intent and end.reason in _INTERRUPTIONS):
        return "cancelled", _cancelled(submission) or _line(end.detail or "")
    if end.reason in ("preempted", "timeout"):
        return "preempted", _join("not started again", _line(end.detail or ""))
    return "failed", _join(describe_end(end), _line(end.detail or ""))


def _without_view(submission: Submission, attempt: Attempt | None) -> tuple[State, str]:
    if submission.job_id:
        return "unknown", f"{submission.backend} was not asked; last known: {_known(attempt)}"
    if submission.intent:
        return "cancelled", _cancelled(submission)
    return "unknown", f"submission was interrupted; {submission.backend} knows no job tagged {submission.tag}"


def _live(submission: Submission, attempt: Attempt | None, job: JobView) -> tuple[State, str]:
    """The scheduler has the job, waiting or running."""
    told = _line(job.reason)
    stopping = f"stopping: {_cancelled(submission)}" if submission.intent else ""
    if job.state == "pending":
        if attempt is None:
            return "pending", stopping or told
        state: State = "preempted" if attempt.end is None or attempt.end.reason in _INTERRUPTIONS else "pending"
        return state, stopping or _join(told, _known(attempt))
    if attempt is None:
        return "running", stopping or "starting"
    if attempt.end is None:
        return "running", stopping or ("completing" if job.state == "completing" else "")
    if job.state == "completing":
        state = "preempted" if attempt.end.reason in _INTERRUPTIONS else "running"
        return state, stopping or f"{_known(attempt)}; next: {attempt.end.next}"
    return "running", stopping or f"starting again: {_known(attempt)}"


def _over(submission: Submission, attempt: Attempt | None, job: JobView) -> tuple[State, str]:
    """The scheduler is done with the job, and no supervisor decided that nothing follows."""
    if submission.intent:
        return "cancelled", _cancelled(submission)
    told = f"{submission.backend} says {_line(job.reason) or job.state}"
    if job.state == "cancelled":
        return "cancelled", told
    if attempt is None:
        return "failed", f"its job ended before the first attempt: {told}"
    if attempt.end is None:
        return "failed", f"attempt {attempt.number} died with its job: {told}"
    return "failed", f"{_known(attempt)} and was not started again: {told}"


def _known(attempt: Attempt | None) -> str:
    """What the store says of the newest attempt."""
    if attempt is None:
        return "no attempt yet"
    if attempt.end is None:
        return f"attempt {attempt.number} was running"
    return f"attempt {attempt.number} {_WORDS[attempt.end.reason]}"


def _cancelled(submission: Submission) -> str:
    intent = submission.intent
    if intent is None:
        return ""
    return f"{intent.outcome}: {_line(intent.reason)}" if intent.outcome else f"cancelled by {intent.by}"


def _join(*texts: str) -> str:
    return "; ".join(text for text in texts if text)


def _line(text: str) -> str:
    return " ".join(text.split())
