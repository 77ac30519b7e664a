"""The control directory: how the supervisor on this node and its ranks talk. Standard library alone.

    stop                the supervisor wants the run to save and leave; ranks look for it once a step
    heartbeat.<rank>    what this rank is doing, replaced at each step
    stopped.<rank>      the state is saved, after which step and where
    metrics.<rank>      the port at which this rank serves its metrics
    rescuer.<rank>      the process that commits the last snapshot if this rank dies

Without LLMOPS_CONTROL_DIR nobody watches: nothing is written, and SIGTERM takes the place of the stop file.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, state saved
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_signalled = False


def settle_signals() -> None:
    """Outlive signals that some process trackers send to every process of a job. Call it before any slow import.

    Under a supervisor the stop file is what counts, so they are ignored. Alone, SIGTERM asks for a stop.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if "LLMOPS_CONTROL_DIR" not in os.environ:
        signal.signal(signal.SIGTERM, _remember)


def _remember(_number: int, _frame: FrameType | None) -> None:
    global _signalled
    _signalled = True


class Control:
    """One rank's side of the control directory."""

    def __init__(self, rank: int, directory: str | None = None) -> None:
        self.rank = rank
        self.directory = Path(directory) if directory else None
        self.step: int | None = None
        self.first_step: int | None = None
        self._rescuer: tuple[int, float] | None = None

    def stop_requested(self) -> bool:
        """Has someone asked this rank to save and leave? A stat: microseconds."""
        return _signalled or (self.directory is not None and (self.directory / "stop").exists())

    def heartbeat(self, phase: str, step: int | None = None) -> None:
        """Tell the supervisor what this rank is doing. ``step`` is a step that this attempt has just finished."""
        if step is not None:
            self.step = step
            if self.first_step is None:
                self.first_step = step
        record = {"step": self.step, "first_step": self.first_step, "phase": phase, "time": time.time()}
        self._replace(f"heartbeat.{self.rank}", record)

    def stopped(self, step: int, commit: str) -> None:
        """Tell the supervisor that the state after ``step`` is saved in ``commit``."""
        self._replace(f"stopped.{self.rank}", {"step": step, "commit": commit, "time": time.time()})

    def serving(self, port: int) -> None:
        """Tell the supervisor where this rank serves its metrics."""
        self._replace(f"metrics.{self.rank}", {"port": port})

    def rescuer(self, pid: int, limit_s: float) -> None:
        """Tell the supervisor which process still has work when this rank has died, and for how many seconds."""
        if (pid, limit_s) != self._rescuer:
            self._rescuer = pid, limit_s
            self._replace(f"rescuer.{self.rank}", {"pid": pid, "limit_s": limit_s})

    def _replace(self, name: str, record: Mapping[str, object]) -> None:
        if self.directory is None:
            return
        aside = self.directory / f".{name}.{os.getpid()}"
        aside.write_text(json.dumps(record))
        aside.replace(self.directory / name)
