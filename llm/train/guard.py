"""What to do with a step whose loss or gradient cannot be right, decided before the weights change.

Every rank sees the same reduced numbers and comes to the same verdict. What was decided is part of a checkpoint: a run
that resumes knows which data it went past, and how often.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Literal

from llm.utils.config import TrainConfig

Verdict = Literal["go", "skip", "rollback", "stop"]
WINDOW = 128  # steps whose mean and deviation a spike is measured against
FEWEST = 32  # of them, before anything counts as a spike


class Guard:
    """The verdict on each step.

    A loss or norm that is no number gets ``on_nonfinite``; one that is ``skip_spikes`` standard deviations above those
    of the last 128 steps is skipped (as OLMo 2's skip-step optimizer does: OLMo et al., "2 OLMo 2 Furious", 2024). A
    skipped step counts, and its data is consumed, but nothing is updated. A rollback goes back to the last commit, and
    the batch is left out when its turn comes again. After ``max_skips`` of these with no good step in between, or
    where a batch is left out and the same place fails again as often, the run stops.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0  # skips and rollbacks since the last good step
        self.total = 0
        self.left_out: list[tuple[int, int]] = []  # samples [first, last) that a rollback leaves out, in order
        self.reached = 0  # the furthest good step

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """What to do with ``step``, whose mean loss and gradient norm these are."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        verdict: Verdict = "go"
        if not finite:
            verdict = self.config.on_nonfinite
        elif self.config.skip_spikes and (self._spikes(loss, self.losses) or self._spikes(norm, self.norms)):
            verdict = "skip"
        if verdict == "go":
            self.losses.append(loss)
            self.norms.append(norm)
            if step > self.reached:
                self.reached, self.in_a_row = step, 0
            return "go"
        self.in_a_row += 1
        self.total += 1
        return "stop" if self.in_a_row > self.config.max_skips else verdict

    def leave_out(self, ranges: list[tuple[int, int]]) -> None:
        """Samples that are not to be trained on when their turn comes."""
        self.left_out = merged([*self.left_out, *ranges])

    def after_rollback(self, state: dict[str, Any]) -> None:
        """Go on from the ``state`` of a commit, without forgetting what has been learnt since."""
        in_a_row, total, left_out, reached = self.in_a_row, self.total, self.left_out, self.reached
        self.restore(state)
        self.in_a_row, self.total, self.reached = in_a_row, total, reached
        self.leave_out(left_out)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, as JSON."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "in_a_row": self.in_a_row,
            "total": self.total,
            "left_out": [list(each) for each in self.left_out],
            "reached": self.reached,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.losses, self.norms = deque(state["losses"], WINDOW), deque(state["norms"], WINDOW)
        self.in_a_row, self.total, self.reached = state["in_a_row"], state["total"], state["reached"]
        self.left_out = [(first, last) for first, last in state["left_out"]]

    def _spikes(self, value: float, before: deque[float]) -> bool:
        if len(before) < FEWEST:
            return False
        mean = math.fsum(before) / len(before)
        deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in before) / len(before))
        return value - mean > self.config.skip_spikes * deviation


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same samples as ranges [first, last) that are in order and apart."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


def take(position: int, count: int, left_out: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The next ``count`` samples from ``position`` on that are not ``left_out``, as ranges [first, last)."""
    found = []
    for first, last in [*left_out, (position + count + sum(b - a for a, b in left_out), 0)]:
        if count and position < first:
            end = min(first, position + count)
            found.append((position, end))
            count -= end - position
            position = end
        if count:
            position = max(position, last)
    return found
