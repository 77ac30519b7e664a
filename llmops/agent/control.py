"""The control directory, from the supervisor's side: node-local files that ranks poll and write."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shutil
import tempfile
import time
from typing import Any

_FILE = re.compile(r"(heartbeat|stopped)\.([0-9]{1,9})")


class ControlDir:
    """One attempt's control directory on one node."""

    def __init__(self, run_id: str, attempt: int, node: int) -> None:
        self.path = tempfile.mkdtemp(prefix=f"llmops-{run_id}-{attempt:04d}-{node}-")

    def request_stop(self, cause: str, deadline: float) -> None:
        """Write the stop request. ``deadline`` is in epoch seconds; a second request changes nothing."""
        target = os.path.join(self.path, "stop")
        if os.path.exists(target):
            return
        aside = target + ".tmp"
        with open(aside, "w", encoding="utf-8") as file:
            json.dump({"cause": cause, "deadline": deadline}, file)
        os.replace(aside, target)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            with open(os.path.join(self.path, name), encoding="utf-8") as file:
                value = json.load(file)
        except (FileNotFoundError, ValueError):
            # A program that takes part in a few lines of shell may be caught in the middle of a write: no news.
            return None
        return value if isinstance(value, dict) else None

    def heartbeat(self, rank: int) -> dict[str, Any] | None:
        """The newest heartbeat of ``rank``: step, first_step, phase, time. None before the first."""
        return self._read(f"heartbeat.{rank}")

    def heartbeat_age(self, rank: int) -> float | None:
        """Seconds since ``rank`` last wrote its heartbeat, or None before the first."""
        try:
            return time.time() - os.stat(os.path.join(self.path, f"heartbeat.{rank}")).st_mtime
        except FileNotFoundError:
            return None

    def stopped(self, rank: int) -> dict[str, Any] | None:
        """The marker with which ``rank`` says that its state is saved, or None."""
        return self._read(f"stopped.{rank}")

    def committed(self) -> dict[str, Any] | None:
        """What rank 0 last told of its commits: step and path. None before the first."""
        return self._read("committed.0")

    def version(self, name: str) -> tuple[int, int] | None:
        """Changes whenever the file ``name`` does; None while there is none."""
        try:
            status = os.stat(os.path.join(self.path, name))
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino

    def speakers(self) -> list[int]:
        """The ranks that take part, by the names of their files."""
        found = {match[2] for name in os.listdir(self.path) if (match := _FILE.fullmatch(name))}
        return sorted(int(rank) for rank in found)

    def offer_preempt(self) -> str:
        """Put ``llmops.preempt`` into a folder for PYTHONPATH, and return that.

        Without an ``__init__.py`` it is a portion of a namespace package: wherever llmops is installed, that is found
        instead, however late it comes on the path.
        """
        source = pkgutil.get_data("llmops", "preempt.py")
        assert source is not None
        root = os.path.join(self.path, "python")
        os.makedirs(os.path.join(root, "llmops"))
        with open(os.path.join(root, "llmops", "preempt.py"), "wb") as file:
            file.write(source)
        return root

    def rescuer(self, rank: int) -> tuple[int, float] | None:
        """(process, seconds) that still has work to do when ``rank`` has died, or None."""
        record = self._read(f"rescuer.{rank}")
        if record is None or not isinstance(record.get("pid"), int):
            return None
        return record["pid"], float(record.get("limit_s", 0))

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.path, ignore_errors=True)
