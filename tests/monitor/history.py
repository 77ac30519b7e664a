"""A run with a scripted history, written as its launcher, supervisors and rank 0 would have written it."""

from __future__ import annotations

import json
from typing import Any

from tests.conftest import MadeRun, RunMaker

T0 = 1_770_000_000.0


class History:
    """Moments are seconds after the submission."""

    def __init__(self, make_run: RunMaker, **changes: Any) -> None:
        self.made: MadeRun = make_run(**{"created": T0, **changes})
        self.made.submission()
        self._lines: list[tuple[float, str]] = []
        self._number = -1

    def attempt(self, at: float, resume: str | None = None, **changes: Any) -> None:
        """A new attempt; what follows is of it."""
        self._number += 1
        self.made.start(self._number, resume, time=T0 + at, **changes)
        self._lines = []

    def phase(self, at: float, phase: str, **values: Any) -> None:
        self._line({"kind": "phase", "phase": phase, **values, "time": T0 + at})

    def started(self, imported: float, connected: float, loaded: float, step: int = 0) -> None:
        self.phase(imported - 1, "started")
        self.phase(imported, "imported")
        self.phase(connected, "distributed")
        self.phase(loaded, "loaded", step=step)

    def steps(self, first: int, last: int, at: float, each: float) -> None:
        """Steps ``first`` to ``last``, the first of which is over at ``at``."""
        for number, step in enumerate(range(first, last + 1)):
            line = {
                "kind": "step",
                "step": step,
                "loss": 10 / step,
                "tokens_per_s": 1000.0,
                "time": T0 + at + number * each,
            }
            self._line(line)

    def saved(self, step: int, staged: float, told: float, seconds: float, stall_s: float) -> None:
        self.phase(staged, "staged", step=step, seconds=seconds, waited_s=0.0, stall_s=stall_s)
        self.phase(told, "saved", step=step, seconds=told - staged, bytes=100, stall_s=stall_s)

    def end(self, at: float, reason: str, then: str = "requeue", **changes: Any) -> None:
        self.made.end(self._number, reason, then, time=T0 + at, **changes)

    def _line(self, record: dict[str, Any]) -> None:
        self._lines.append((record["time"], json.dumps(record) + "\n"))
        text = "".join(line for _, line in sorted(self._lines, key=lambda each: each[0])).encode()
        self.made.store.put(f"metrics/{self._number:04d}/000000.jsonl", text)


def preempted_and_crashed(make_run: RunMaker) -> History:
    """An hour of two nodes: queued, preempted, requeued, crashed, tried again, finished. See the known answers."""
    history = History(make_run, max_steps=250)
    history.attempt(100)  # queued for 100 s
    history.started(110, 130, 160)  # import 10, rendezvous 20, load 30
    history.steps(1, 100, 170, 10)  # to 1160; the first save blocked for 4 s
    history.saved(50, 664, 680, 4.0, 4.0)
    history.saved(100, 1166, 1180, 6.0, 10.0)  # training until 1160, saved at 1180
    history.phase(1181, "stopped", step=100)
    history.end(1200, "preempted", saved=True, last_step=100, first_step=1)  # 20 s until it was gone
    history.attempt(1500, "checkpoints/step_00000100/0000-0000")  # 300 s in the queue again
    history.started(1510, 1530, 1560, 100)
    history.steps(101, 180, 1570, 10)  # to 2360
    history.saved(150, 2065, 2070, 5.0, 5.0)  # training until 2060
    history.end(2400, "failed", "retry", last_step=180, first_step=101)  # 2060 to 2400 is lost
    history.attempt(2410, "checkpoints/step_00000150/0001-0000")  # a pause of 10 s
    history.started(2420, 2430, 2460, 150)
    history.steps(151, 250, 2470, 10)  # to 3460
    history.saved(250, 3480, 3490, 20.0, 20.0)
    history.phase(3500, "finished", step=250)
    history.end(3600, "finished", "end", last_step=250, first_step=151)
    return history


# Seconds of each kind in the history above.
KNOWN = {
    "committed": (1160 - 160 - 10) + (2060 - 1560 - 5) + (3500 - 2460 - 20),
    "checkpoint": 10 + 20 + 5 + 20,
    "lost": 2400 - 2060,
    "import": 10 + 10 + 10,
    "rendezvous": 20 + 20 + 10,
    "load": 30 + 30 + 30,
    "idle": 20 + 10 + 100,
    "queue": 100 + 300,
    "hang": 0,
    "uncommitted": 0,
}
