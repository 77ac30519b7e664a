"""Contenders of a benchmark as processes that stay and take turns, so that other load on the machine meets all alike.

A script that uses this answers ``--serve NAME`` by calling :func:`serve`: it works once for every line that comes, and
tells what it found as one line of JSON with at least ``wall`` and ``cpu``, in seconds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TREE = Path(__file__).parents[1]


def serve(work: Callable[[], dict[str, Any]]) -> None:
    """Be a contender: do ``work`` for every line on standard input, timed."""
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        answer = work()
        answer |= {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        print(json.dumps(answer), flush=True)


class Contender:
    """A process that waits for its turn."""

    def __init__(self, script: str, name: str, warm_up: int) -> None:
        self.script, self.name, self.warm_up = script, name, warm_up
        self.answers: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [sys.executable, script, "--serve", name],
            cwd=TREE,
            env={**os.environ, "PYTHONPATH": f"{TREE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self) -> None:
        """Have it work once."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for text in self.process.stdout:  # what libraries print is left out
            if text.startswith("{"):
                self.answers.append(json.loads(text))
                return
        raise SystemExit(f"{self.name} ended; what it needs: see the head of {Path(self.script).name}")

    def times(self, clock: str) -> list[float]:
        """Seconds of its timed turns."""
        return [answer[clock] for answer in self.answers[self.warm_up :]]


def take_turns(script: str, names: list[str], rounds: int, warm_up: int) -> list[Contender]:
    """Run them all: ``warm_up`` turns each, one contender after the other, as compilers would disturb each other; then
    ``rounds`` rounds of one turn each, in an order that rotates."""
    contenders = [Contender(script, name, warm_up) for name in names]
    try:
        for contender in contenders:
            for _ in range(warm_up):
                contender.turn()
        for number in range(rounds):
            at = number % len(contenders)
            for contender in contenders[at:] + contenders[:at]:
                contender.turn()
    finally:
        for contender in contenders:
            contender.process.kill()
            contender.process.wait()
    return contenders


def ratio(base: Contender, other: Contender, clock: str) -> float:
    """How many times as fast ``other`` is: the median over rounds of the quotient of two times of the same round."""
    return statistics.median(b / o for b, o in zip(base.times(clock), other.times(clock), strict=True))
