"""Seconds from a preemption to the first new step, split by phase, on a real SLURM.

    .venv/bin/python benchmarks/preemption.py [--rounds 5]

Needs slurm/dev-cluster.sh up. A run of the tiny model on two nodes is preempted by a job of a more important
partition that takes two seconds; what happened when is read from the run directory alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmops import api

PHASES = [
    ("signal → stop request", "submitted", "requested"),
    ("save, exit, decision", "requested", "ended"),
    ("requeue wait", "ended", "claimed"),
    ("agents, ranks start", "claimed", "started"),
    ("import", "started", "imported"),
    ("rendezvous", "imported", "distributed"),
    ("build and load", "distributed", "loaded"),
    ("first step", "loaded", "first_step"),
]
TOTAL = ("preemption → first new step", "submitted", "first_step")
OVERRIDES = ["recipe=tiny", "train.max_steps=4000"]


def wait(condition, what: str, timeout: float = 180):
    """Poll until ``condition()`` is true; its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            sys.exit(f"waited {timeout} s for {what}")
        time.sleep(0.2)
    return value


def steps(run_dir: Path, attempt: int) -> list[dict]:
    """Metric lines of one attempt."""
    parts = sorted(run_dir.glob(f"metrics/{attempt:04d}/*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines() if line.endswith("}")]


def one_round(runs_url: str) -> dict[str, float]:
    """Moments of one preemption, in epoch seconds."""
    run = api.submit(api.prepare(OVERRIDES, backend="slurm", name="preempt-me", runs_url=runs_url))
    run_dir = Path(run.url)
    wait(lambda: any(line.get("step", 0) >= 20 for line in steps(run_dir, 0)), "step 20")
    moments = {"submitted": time.time()}
    script = ["--wrap", "sleep 2", "-o", "/dev/null"]
    subprocess.run(["sbatch", "-p", "high", "-N4", "--exclusive", "-t", "1", *script], check=True, capture_output=True)
    wait(lambda: any(line.get("phase") == "first_step" for line in steps(run_dir, 1)), "the first new step")
    end = json.loads((run_dir / "attempts/0000/end.json").read_text())
    moments.update(requested=end["stop"]["requested"], ended=end["time"])
    moments["claimed"] = json.loads((run_dir / "attempts/0001/start.json").read_text())["time"]
    for line in steps(run_dir, 1):
        if line["kind"] == "phase":
            moments.setdefault(line["phase"], line["time"])
    api.cancel(run)
    return moments


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="llmops-bench-") as folder:
        found = [one_round(folder) for _ in range(rounds)]
    table = Table("phase", "median s", "worst s", title=f"{rounds} preemptions (GraceTime=0), tiny model, 2 nodes")
    for name, first, last in [*PHASES, TOTAL]:
        taken = [moments[last] - moments[first] for moments in found]
        table.add_row(name, f"{statistics.median(taken):.1f}", f"{max(taken):.1f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
