"""What programs say that they have saved, put into the run directory: the next attempt goes on from there.

    commits/0002/1764349552123-00000100.json      attempt, when it was recorded in milliseconds, step

Found by its name alone: the last of an attempt is its newest, also where the program went back to an earlier step.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Any, NamedTuple

from llmops.agent.control import ControlDir
from llmops.agent.rundir import RunDir

PATIENCE_S = 3.0  # of a store, while there are ranks to look after
LAST_PATIENCE_S = 60.0
AGAIN_S = 20.0  # how often a store that is out of reach is asked
MAX_STEP, MAX_PATH = 1 << 62, 4096
_NAME = re.compile(r"([0-9]{13,18})-([0-9]{8,19})\.json")


class Told(NamedTuple):
    """The name of a commit that a program told of, without its suffix, its step, and when it was recorded."""

    name: str
    step: int
    time: float  # epoch seconds


def folder(attempt: int) -> str:
    """Where an attempt's are."""
    return f"commits/{attempt:04d}"


def parse(names: list[str], attempt: int) -> list[Told]:
    """Those of one attempt, in order, from the names in its folder."""
    found = [(int(match[1]), int(match[2]), name) for name in names if (match := _NAME.fullmatch(name))]
    return [Told(f"{folder(attempt)}/{name[:-5]}", step, number / 1000) for number, step, name in sorted(found)]


class Commits:
    """Those of one attempt, on the node whose rank 0 tells of them."""

    def __init__(self, rundir: RunDir, control: ControlDir, attempt: int) -> None:
        self.rundir, self.control, self.attempt = rundir, control, attempt
        self._number = 0  # of the last name
        self._seen: tuple[int, int] | None = None  # the state of the file that is dealt with
        self._again = 0.0  # on the monotonic clock

    def tend(self, patience_s: float = PATIENCE_S) -> None:
        """Record what is new. To be called now and then, and with more patience when the ranks have ended."""
        version = self.control.version("committed.0")
        if version in (None, self._seen) or (patience_s <= PATIENCE_S and time.monotonic() < self._again):
            return
        record = self.control.committed()
        if record is None:  # it is being written
            return
        if (value := _checked(record)) is None:
            _say(f"committed.0 says {str(record)[:200]}: not a step and a path, and not counted")
        elif not self._put(value, patience_s):
            return
        self._seen = version

    def _put(self, value: dict[str, Any], patience_s: float) -> bool:
        try:
            while True:  # until a name is free: rank 0 may have moved here from another node
                self._number = max(self._number + 1, int(value["time"] * 1000))
                name = f"{folder(self.attempt)}/{self._number:013d}-{value['step']:08d}.json"
                if self.rundir.create(name, value, patience_s):
                    return True
        except OSError as error:
            self._again = time.monotonic() + AGAIN_S
            _say(f"the commit of step {value['step']} is not recorded yet: {error}")
            return False


def _checked(record: dict[str, Any]) -> dict[str, Any] | None:
    step, path = record.get("step"), record.get("path", ".")
    if type(step) is not int or not 0 <= step < MAX_STEP or not isinstance(path, str) or not 0 < len(path) < MAX_PATH:
        return None
    return {"step": step, "path": path, "time": time.time()}


def _say(text: str) -> None:
    print(f"llmops: {text}", file=sys.stderr, flush=True)
