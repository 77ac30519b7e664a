"""``llmops logs`` of a thousand ranks, beside ``cat`` and ``sort -m`` of the same files: seconds to the first line and
to the last, and the peak of the memory; medians.

    .venv/bin/python benchmarks/logs.py [--ranks 1000] [--lines 2000] [--rounds 3] [--folder DIR] [--json FILE]

The commands take turns, and write to a pipe that is read as fast as it can be. The files are read once before, so that
all of them come from the page cache. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from llmops.agent.output import stamp

LLMOPS = str(Path(sys.executable).parent / "llmops")
T0 = 1_770_000_000.0
ERROR = (
    "Traceback (most recent call last):",
    '  File "/code/train.py", line 412, in <module>',
    "    main()",
    '  File "/code/train.py", line 380, in main',
    "    loss.backward()",
)
# Started anew for each command: the peak of the memory is that of its one child.
MEASURE = """
import json, os, resource, subprocess, sys, time
began = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
count = len(os.read(child.stdout.fileno(), 1 << 20))
first = time.perf_counter() - began
while data := os.read(child.stdout.fileno(), 1 << 20):
    count += len(data)
code = child.wait()
took = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({"code": code, "first_s": first, "s": took, "MB": count / 1e6, "peak_MiB": peak}))
"""


def main() -> None:
    """Make the run, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--lines", type=int, default=2000, help="of each rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="a file system to measure; default: that of temporary files")
    parser.add_argument("--json", type=Path, help="write the medians here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmops-logs-", dir=arguments.folder) as folder:
        files = make_run(Path(folder), arguments.ranks, arguments.lines)
        report(measure(Path(folder), files, arguments.rounds), files, arguments)


def make_run(root: Path, ranks: int, lines: int) -> list[Path]:
    """A run whose rank 417, or last one, failed first; its files of output."""
    folder = root / "20260202-024000-bench-aaaa"
    record: dict[str, Any] = {"id": folder.name, "name": "bench", "owner": "ada", "host": "login1", "created": T0}
    record |= {"backend": "slurm", "kind": "llm", "command": [], "nodes": max(ranks // 8, 1), "ranks_per_node": 8}
    end = {"time": T0 + lines + 60, "reason": "failed", "next": "end", "failed_rank": 3, "failed_host": "n0"}
    codes = {"exit_codes": {str(rank): 1 for rank in range(ranks)}}
    objects = {
        "run.json": record,
        "attempts/0000/start.json": {"number": 0, "submission": 0, "job_id": "1", "hosts": ["n0"], "time": T0},
        "attempts/0000/end.json": {**end, **codes},
    }
    for name, value in objects.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    files = []
    for rank in track(range(ranks), "ranks"):
        path = folder / f"logs/0000/n{rank // 8}/rank{rank}.000000.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = T0 + rank / ranks
        with path.open("wb") as file:
            for step in range(lines):
                line = (
                    f"step {step} loss={10 / (step + 1):.4f} lr=3.0e-04 grad_norm=1.234 tokens/s=123456 rank {rank}\n"
                )
                file.write(stamp(begin + step) + line.encode())
            first = rank == min(417, ranks - 1)
            last = "ValueError: bad sample 17" if first else "torch.distributed.DistBackendError: remote process exited"
            now = stamp(T0 + lines + 1 + (not first))
            file.write(b"".join(now + line.encode() + b"\n" for line in (*ERROR, last)))
        files.append(path)
    return files


def measure(root: Path, files: list[Path], rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each command took, round by round."""
    names = root / "names"
    names.write_bytes(b"\0".join(str(path).encode() for path in files))
    logs = [LLMOPS, "logs", "bench"]
    last_minute = stamp(T0 + files[0].read_bytes().count(b"step ") - 60).decode().strip()
    commands = {
        "cat": ["xargs", "-0", "-n", "100000", "-a", str(names), "cat"],
        "sort -m": ["sort", "-m", "-s", "-k1,1", f"--files0-from={names}"],
        "llmops logs": logs,
        "llmops logs --tail 10": [*logs, "--tail", "10"],
        "llmops logs --since, the last minute": [*logs, "--since", last_minute],
        "llmops logs --grep": [*logs, "--grep", "rank 17$"],
        "llmops logs --errors": [*logs, "--errors"],
    }
    env = {**os.environ, "LLMOPS_RUNS_URL": str(root), "LC_ALL": "C"}
    found: dict[str, list[dict[str, float]]] = {}
    for _ in track(range(rounds), "rounds"):
        for name, command in commands.items():
            measuring = [sys.executable, "-c", MEASURE, *command]
            done = subprocess.run(measuring, env=env, capture_output=True, text=True, check=True)
            value = json.loads(done.stdout)
            if value.pop("code") != ("--errors" in command):
                sys.exit(f"{name} failed: {done.stderr}")
            found.setdefault(name, []).append(value)
    return found


def report(found: dict[str, list[dict[str, float]]], files: list[Path], arguments: argparse.Namespace) -> None:
    """The table, and the ratios to ``sort -m``."""
    medians = {
        name: {key: statistics.median(value[key] for value in values) for key in values[0]}
        for name, values in found.items()
    }
    size = sum(path.stat().st_size for path in files) / 1e6
    peer = medians["sort -m"]
    table = Table("command", "first output s", "all s", "of sort -m", "MB/s of files", "peak MiB")
    for name, value in medians.items():
        speed = f"{size / value['s']:,.0f}"
        row = (f"{value['first_s']:.2f}", f"{value['s']:.2f}", f"{value['s'] / peer['s']:.2f}", speed)
        table.add_row(name, *row, f"{value['peak_MiB']:.0f}")
    console = Console()
    console.print(
        f"{len(files):,} ranks, {arguments.lines:,} lines each, {size:,.0f} MB; medians of {arguments.rounds}"
    )
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"MB": size, "load": os.getloadavg()[0], **medians}, indent=1))


if __name__ == "__main__":
    main()
