"""When to save a checkpoint."""

from __future__ import annotations

import json
import math
import time

from llm.checkpoint.retention import Retention
from llm.utils.config import CheckpointConfig
from llm.utils.storage import Storage

SHORTEST_S, LONGEST_S = 30.0, 3600.0  # bounds of an interval that is worked out
PRIOR_S = 6 * 3600.0  # before anything is known, a run is taken to be interrupted once in this time
NOTICEABLE_S = 0.05  # a save that costs less than this is not worth saving on


def young_daly(cost_s: float, between_failures_s: float) -> float:
    """The interval that loses least: sqrt(2 x cost of a save x mean time between interruptions), bounded.

    Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974); Daly, FGCS 22 (2006).
    """
    return min(max(math.sqrt(2 * max(cost_s, NOTICEABLE_S) * between_failures_s), SHORTEST_S), LONGEST_S)


def between_failures(storage: Storage) -> float:
    """Mean seconds from one interruption of this run to the next, from its attempts' records; PRIOR_S counts as one."""
    trained, interruptions = PRIOR_S, 1
    for name in storage.list("attempts"):
        try:
            start, end = (json.loads(storage.read(f"attempts/{name}/{part}.json")) for part in ("start", "end"))
            trained += max(end["time"] - start["time"], 0.0)
        except FileNotFoundError:  # it runs, or its supervisor died before it could say so
            continue
        except (ValueError, KeyError, TypeError):  # a record that cannot be read says nothing about failures
            continue
        interruptions += end.get("reason") != "finished"
    return trained / interruptions


class SaveSchedule:
    """Steps are counted alike on every rank. What depends on a clock rank 0 decides, and the step tells the others."""

    def __init__(self, config: CheckpointConfig, storage: Storage, rank: int) -> None:
        self.every_steps, self.snapshot_steps = config.every_steps, config.snapshot_steps
        self.every_s = 0.0 if config.every_minutes == "auto" else 60 * config.every_minutes
        self.between_s = 0.0
        if config.every_minutes == "auto" and rank == 0:
            self.between_s = between_failures(storage)
            self.every_s = young_daly(0.0, self.between_s)
        self.rank = rank
        self.last = time.monotonic()

    def due_by_clock(self) -> bool:
        """Rank 0: has enough time passed since the last save?"""
        return self.rank == 0 and self.every_s > 0 and time.monotonic() - self.last >= self.every_s

    def due_by_step(self, step: int) -> bool:
        """Is a checkpoint wanted after ``step``?"""
        return self.every_steps > 0 and step % self.every_steps == 0

    def snapshot_due(self, step: int) -> bool:
        """Is a snapshot wanted after ``step``?"""
        return self.snapshot_steps > 0 and step % self.snapshot_steps == 0

    def saved(self, cost_s: float) -> None:
        """A save has cost the training ``cost_s`` seconds."""
        self.last = time.monotonic()
        if self.between_s:
            self.every_s = young_daly(cost_s, self.between_s)


def retention(config: CheckpointConfig) -> Retention:
    """What is kept of the commits of a run."""
    return Retention(
        keep_last=config.keep_last, keep_every=config.keep_every or None, keep_best=config.keep_best or None
    )
