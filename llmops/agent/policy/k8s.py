"""What comes next on Kubernetes. Pods are kept as long as they may stay: only what ends them becomes an exit code.

======================  ======================  ==========================================================
The attempt             This pod                do
======================  ======================  ==========================================================
finished                                        0, which every controller reads as done
ended by a cancellation                         give up: no controller starts the pods again
was asked to stop       is being deleted        stopped: a controller makes a new pod, and nobody counts it
was asked to stop       stays                   wait for the pods that were deleted, then another attempt
failed                                          another attempt here, a bounded number of times, or give up
======================  ======================  ==========================================================

The codes are what the real controllers were seen to do with them: a Job and a JobSet can be told by rules what 75 and
77 mean; to a PyTorchJob codes from 1 to 127 are fatal, and those from 128 on make a new pod without any limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmops.agent.attempts import History
from llmops.agent.policy.common import Decision, Outcome, after_failure


@dataclass(frozen=True)
class Codes:
    """Exit codes of a pod that has not finished: told to leave and to come back; and for good."""

    stopped: int
    give_up: int


def codes(workload: str) -> Codes:
    """The codes of one kind of workload."""
    return Codes(143, 1) if workload == "pytorchjob" else Codes(75, 77)


def decide(
    outcome: Outcome, leaving: bool, cancelled: bool, history: History, retry: dict[str, Any], exits: Codes
) -> Decision:
    """Decide after an attempt. ``leaving``: the pod of node 0, in which this is asked, was told to go."""
    if outcome.kind == "finished":
        return Decision("exit", "finished")
    if cancelled:
        return Decision("exit", "cancelled", exits.give_up)
    detail = f"stopped by {(outcome.stop or {}).get('cause')}"
    if outcome.kind == "stopped":
        return Decision("requeue" if leaving else "again", "preempted", exits.stopped if leaving else 0, detail=detail)
    decision = after_failure(outcome, history, retry)
    if decision.action == "exit":
        return Decision("exit", decision.reason, exits.give_up, detail=decision.detail)
    return Decision("requeue", decision.reason, exits.stopped, detail="its pod has to go") if leaving else decision
