"""The words that every backend's policy speaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmops.agent.attempts import History


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, as seen by its supervisor alone.

    kind: ``finished`` (every rank returned 0), ``stopped`` (after a stop request), ``failed``, ``hung``, or ``lost``
    (a node agent
    vanished or never came).
    """

    kind: str
    exit_codes: dict[str, int] = field(default_factory=dict)
    first_step: int | None = None
    last_step: int | None = None
    saved: bool = False
    error: str | None = None
    failed_rank: int | None = None
    failed_host: str | None = None
    stop: dict[str, Any] | None = None  # cause, requested, deadline


@dataclass(frozen=True)
class Decision:
    """What to do next.

    action: ``exit`` (leave with ``exit_code``), ``again`` (a new attempt in this job after ``delay_s``), ``requeue``
    (ask the scheduler to run the job again, soon), ``kick`` (it does so by itself: only cut the wait).
    """

    action: str
    reason: str  # of the attempt's end: finished preempted timeout failed hung node_failure cancelled
    exit_code: int = 0
    delay_s: float = 0.0
    detail: str = ""

    @property
    def next(self) -> str:
        """What the attempt's record says of what follows."""
        return {"exit": "end", "again": "retry", "requeue": "requeue", "kick": "requeue"}[self.action]


FAILURE_REASONS = {"failed": "failed", "hung": "hung", "lost": "node_failure"}


def after_failure(outcome: Outcome, history: History, retry: dict[str, Any]) -> Decision:
    """Try a failure again only while it makes progress, and not for ever.

    ``history`` counts the attempts before this one and this one.
    """
    reason = FAILURE_REASONS[outcome.kind]
    if history.without_progress >= retry["max_no_progress"]:
        detail = (
            f"{history.without_progress} attempts in a row failed without a new committed step "
            f"(retry.max_no_progress={retry['max_no_progress']})"
        )
        return Decision("exit", reason, exit_code=1, detail=detail)
    if history.failures > retry["max_failures"]:
        detail = f"{history.failures} attempts failed (retry.max_failures={retry['max_failures']})"
        return Decision("exit", reason, exit_code=1, detail=detail)
    # Only failures in a row back off: after progress the next one is tried at once again.
    delay = min(retry["backoff_s"] * 2 ** max(history.without_progress - 1, 0), retry["backoff_max_s"])
    return Decision("again", reason, delay_s=delay)
