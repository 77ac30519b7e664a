"""Functions that tests have called in jobs, by reference: their jobs run in this tree."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


class Odd(Exception):
    """Pickles, but cannot be loaded again."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"odd {first + second}")


def add(a: int, b: int = 1) -> int:
    print(f"adding on rank {os.environ['RANK']}", flush=True)
    return a + b


def inverse(x: int) -> float:
    return 1 / x


def odd() -> None:
    raise Odd(1, 2)


def lock() -> Any:
    return threading.Lock()


def leave() -> None:
    sys.exit(3)


def rank() -> tuple[int, int, int]:
    import submitit

    job = submitit.JobEnvironment()
    return job.global_rank, job.num_tasks, int(os.environ["RANK"])


def sleep_until(path: str) -> str:
    """Until there is a file; killed before, it is called again."""
    while not Path(path).exists():
        time.sleep(0.05)
    return Path(path).read_text()


class Counter:
    """Counts to ``upto`` in a folder that shows how far it has come, and at which count each attempt began."""

    def __init__(self) -> None:
        self.count = 0
        self.began: list[int] = []

    def __call__(self, upto: int, folder: str) -> tuple[int, list[int]]:
        self.began.append(self.count)
        while self.count < upto:
            self.count += 1
            Path(folder, "count").write_text(str(self.count))
            time.sleep(0.05)
        return self.count, self.began

    def checkpoint(self, upto: int, folder: str) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, upto, folder)
