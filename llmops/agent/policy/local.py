"""What comes next where no scheduler decides: this machine."""

from __future__ import annotations

from typing import Any

from llmops.agent.attempts import History
from llmops.agent.policy.common import Decision, Outcome, after_failure


def decide(outcome: Outcome, cancelled: bool, history: History, retry: dict[str, Any]) -> Decision:
    """Decide after an attempt on this machine.

    A stop request without a durable intent to end is a preemption: the supervisor itself runs the next attempt.
    Whoever wants the run to end says so with ``llmops cancel``, or kills the supervisor.
    """
    if outcome.kind == "finished":
        return Decision("exit", "finished")
    if cancelled:
        return Decision("exit", "cancelled")
    if outcome.kind == "stopped":
        return Decision("again", "preempted", detail=f"stopped by {(outcome.stop or {}).get('cause')}")
    return after_failure(outcome, history, retry)
