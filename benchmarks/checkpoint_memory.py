"""Peak memory of process trees: the proportional set size, so that what processes share counts once.

Pages of files are left out: what they count for depends on who else runs the same programs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoint_store import SPAWN

EVERY_S = 0.02


def tree(pid: int) -> Iterator[int]:
    """A process and all that it has started."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from tree(int(child))


def memory(pid: int) -> int:
    """Bytes of a process and all that it has started."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += int(line.split()[1]) << 10
    return total


class Peak:
    """The most that each of ``pids`` and its helpers has in use, while the context lasts."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.peaks: list[int] = []
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_sample, args=(list(pids), theirs), daemon=True)

    def __enter__(self) -> Peak:
        self._process.start()
        self._pipe.recv()  # it has begun
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self.peaks = self._pipe.recv()
        self._process.join()


def _sample(pids: list[int], pipe: Any) -> None:
    peaks = [0] * len(pids)
    pipe.send(None)
    while not pipe.poll():
        peaks = [max(peak, memory(pid)) for peak, pid in zip(peaks, pids, strict=True)]
        time.sleep(EVERY_S)
    pipe.send(peaks)
