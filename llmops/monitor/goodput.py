"""Goodput: the share of a run's node-hours that became committed progress, and where the rest went.

After Google's ML Productivity Goodput (2023): scheduling, runtime and program losses, here told apart further. The
shares of an account sum to one.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmops.monitor.timeline import Span

# In the order in which people look at them. What a span of training is, beside its stalls, is "committed".
SHARES = ("committed", "uncommitted", "checkpoint", "lost", "hang", "import", "rendezvous", "load", "idle", "queue")
WORDS = {
    "committed": "training that a commit holds",
    "uncommitted": "training since the last commit, of runs that go on",
    "checkpoint": "training held up by saves",
    "lost": "work that was done again, or given up, after failures",
    "hang": "ranks that gave no sign of life",
    "import": "start-up: processes and imports",
    "rendezvous": "start-up: ranks find each other",
    "load": "start-up: model, data and checkpoint",
    "idle": "nodes held, and nothing run on them",
    "queue": "waiting for nodes",
}


@dataclass(frozen=True)
class Account:
    """Node-seconds by :data:`SHARES`, and rank-seconds during which ranks had their nodes."""

    node_s: Mapping[str, float]
    held_rank_s: float = 0.0
    runs: int = 0

    @property
    def total_s(self) -> float:
        return sum(self.node_s.values())

    @property
    def goodput(self) -> float | None:
        """None where no time has passed."""
        total = self.total_s
        return self.node_s.get("committed", 0.0) / total if total > 0 else None

    def shares(self) -> dict[str, float]:
        """Of the whole, in order; they sum to one, or are all zero where no time has passed."""
        total = self.total_s
        return {name: self.node_s.get(name, 0.0) / total if total > 0 else 0.0 for name in SHARES}


def account(
    spans: Iterable[Span],
    nodes: int = 1,
    ranks_per_node: int = 1,
    since: float = 0.0,
    until: float = float("inf"),
) -> Account:
    """What lies between ``since`` and ``until``, in epoch seconds, of one run's timeline."""
    seconds = dict.fromkeys(SHARES, 0.0)
    for span in spans:
        start, end = max(span.start, since), min(span.end, until)
        if end <= start:
            continue
        if span.kind == "train":
            stall = span.stall_s * (end - start) / span.seconds
            seconds["checkpoint"] += stall
            seconds["committed"] += end - start - stall
        else:
            seconds[span.kind] += end - start
    held = sum(value for name, value in seconds.items() if name != "queue")
    counted = int(any(seconds.values()))
    return Account({name: value * nodes for name, value in seconds.items()}, held * nodes * ranks_per_node, counted)


def total(accounts: Iterable[Account]) -> Account:
    """All together."""
    seconds, held, runs = dict.fromkeys(SHARES, 0.0), 0.0, 0
    for each in accounts:
        for name, value in each.node_s.items():
            seconds[name] += value
        held, runs = held + each.held_rank_s, runs + each.runs
    return Account(seconds, held, runs)


def week(epoch: float) -> tuple[str, float, float]:
    """The ISO week of a moment, as ``2026-W47``, with its first second and that of the next one, in local time."""
    day = datetime.datetime.fromtimestamp(epoch).astimezone()
    monday = datetime.datetime.combine(day.date() - datetime.timedelta(days=day.weekday()), datetime.time())
    year, number, _ = monday.isocalendar()
    following = monday + datetime.timedelta(days=7)  # not 604,800 s where clocks are put forward or back
    return f"{year}-W{number:02d}", monday.timestamp(), following.timestamp()


def weeks_of(spans: Sequence[Span]) -> list[tuple[str, float, float]]:
    """The weeks that a timeline touches, as :func:`week` has them."""
    found: list[tuple[str, float, float]] = []
    at = spans[0].start if spans else 0.0
    while spans and at < spans[-1].end:
        found.append(week(at))
        at = found[-1][2]
    return found
