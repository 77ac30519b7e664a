"""``llmops status`` of ten thousand runs, beside the scheduler's own queries for the same jobs: wall seconds, medians.

    .venv/bin/python benchmarks/status.py [--runs 10000] [--live 200] [--gone 20] [--rounds 5] [--json FILE]

Needs a SLURM (slurm/dev-cluster.sh up). 9,000 held elements of arrays are the queue that any query has to read; the
first ``--live`` of them belong to runs that are not over, ``--gone`` runs have jobs that have left the queue. The
commands take turns. Run it on a quiet machine. All jobs are cancelled at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

BIN = Path(sys.executable).parent
DEADLINE_S = 120.0
ARRAYS, ELEMENTS = 9, 1000  # what a cluster takes as it comes: MaxArraySize 1001, MaxJobCount 10,000
LINE = '{"kind": "step", "step": %d, "loss": %.4f, "tokens_per_s": 1000.0, "time": %f}\n'


def main() -> None:
    """Make the runs and the queue, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--live", type=int, default=200)
    parser.add_argument("--gone", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the medians here")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llmops-status-"))
    jobs: list[str] = []
    try:
        jobs += [submit(folder, "--hold", f"--array=0-{ELEMENTS - 1}") for _ in range(ARRAYS)]
        queued = [f"{job}_{index}" for job in jobs for index in range(ELEMENTS)]
        gone = [submit(folder) for _ in track(range(arguments.gone), "short jobs")]
        jobs += gone
        wait_gone(gone)
        live = queued[: arguments.live]
        make_runs(folder / "runs", arguments.runs, live, gone)
        report(measure(folder, live, gone, arguments.rounds), arguments)
    finally:
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)
        shutil.rmtree(folder)


def submit(folder: Path, *options: str) -> str:
    """A job that would do nothing."""
    command = ["sbatch", "--parsable", "-o", "/dev/null", "-D", str(folder), *options, "--wrap", "true"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wait_gone(jobs: list[str]) -> None:
    """Until all of them have left the queue."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        states = subprocess.run(
            ["sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", "state"], capture_output=True, text=True, check=True
        ).stdout.split()
        queued = subprocess.run(["squeue", "-h", "-o", "%A"], capture_output=True, text=True, check=True).stdout.split()
        if states.count("COMPLETED") == len(jobs) and not set(jobs) & set(queued):
            return
        if time.monotonic() > deadline:
            sys.exit(f"waited {DEADLINE_S:.0f} s for short jobs to end: {states}")
        time.sleep(1)


def make_runs(root: Path, count: int, live: list[str], gone: list[str]) -> None:
    """Directories as launchers, supervisors and trainers would have left them."""
    begin = time.time() - 30 * 86400
    for number in track(range(count), "runs"):
        created = begin + number
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(created))
        run_id = f"{stamp}-bench-aaaa"
        at = count - 1 - number
        job = live[at] if at < len(live) else gone[at - len(live)] if at < len(live) + len(gone) else f"1{number:06d}"
        record: dict[str, Any] = {"id": run_id, "name": f"bench-{number}", "owner": "ada", "host": "login1"}
        record |= {
            "created": created,
            "backend": "slurm",
            "kind": "llm",
            "command": [],
            "nodes": 2,
            "ranks_per_node": 8,
        }
        files = {
            "run.json": {**record, "max_steps": 1000},
            "job/0000/submission.json": {"number": 0, "tag": run_id, "backend": "slurm", "created": created},
            "job/0000/job.json": {"job_id": job, "by": "job", "time": created},
        }
        over = at >= len(live) + len(gone)
        if over or at % 2:  # half of those that wait have run before
            start = {"number": 0, "submission": 0, "job_id": job, "hosts": ["n1", "n2"], "time": created + 10}
            end = {"time": created + 900, "reason": "finished" if over else "preempted"}
            files["attempts/0000/start.json"] = start
            files["attempts/0000/end.json"] = {**end, "next": "end" if over else "requeue", "last_step": 200}
        for name, value in files.items():
            path = root / run_id / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value))
        (root / run_id / "config.yaml").write_text("name: bench\n")
        if "attempts/0000/start.json" in files:
            metrics = root / run_id / "metrics" / "0000"
            metrics.mkdir(parents=True)
            lines = [LINE % (step, 10 / step, created + 20 + step) for step in range(1, 201)]
            (metrics / "000000.jsonl").write_text("".join(lines))


def measure(folder: Path, live: list[str], gone: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each command, round by round; of the first status of all, once."""
    env = {**os.environ, "LLMOPS_RUNS_URL": str(folder / "runs"), "LLMOPS_CACHE_DIR": str(folder / "cache")}
    status = [str(BIN / "llmops"), "status"]
    commands = {
        "squeue": ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%S|%j|%r"],
        "sacct": ["sacct", "-X", "-n", "-P", "-j", ",".join(gone), "-o", "jobid,state,start,jobname"],
        "llmops status": status,
        "llmops status --json": [*status, "--json"],
    }
    found: dict[str, list[float]] = {"llmops status, the first time": [timed(status, env)]}
    for _ in track(range(rounds), "rounds"):
        for name, command in commands.items():
            found.setdefault(name, []).append(timed(command, env))
    return found


def timed(command: list[str], env: dict[str, str]) -> float:
    """Wall seconds of a new process that must succeed."""
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{command[0]} returned {done.returncode}: {done.stderr}")
    return took


def report(found: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    """The table, and the ratio that counts."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    queries = medians["squeue"] + medians["sacct"]
    table = Table("command", "wall s", "of the queries")
    for name, value in medians.items():
        table.add_row(name, f"{value:.3f}", f"{value / queries:.2f}")
    console = Console()
    console.print(f"{arguments.runs:,} runs, {arguments.live} not over, {arguments.gone} gone from the queue")
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({**medians, "ratio": medians["llmops status"] / queries}, indent=1))


if __name__ == "__main__":
    main()
