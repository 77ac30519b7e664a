"""Start-up and submission, side by side with the peers in one run: CPU seconds and wall seconds, medians, ratios.

    .venv/bin/python benchmarks/launcher.py [--rounds 11]

Needs a SLURM to submit to (slurm/dev-cluster.sh up) and, for the peers, `pip install -e .[train,bench]`. Every
command is a new process; the commands take turns, so that what else the machine does falls on all of them alike. Run
it on a quiet machine. Jobs are submitted held and cancelled at the end.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from llmops.resources import conf_dir

PYTHON = sys.executable
BIN = Path(sys.executable).parent
COMPOSE = f"""
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
with initialize_config_dir({str(conf_dir())!r}, version_base="1.3"):
    OmegaConf.to_container(compose("config", ["cluster=slurm", "recipe=tiny"]), resolve=True)
"""
SUBMITIT = """
import sys, submitit
executor = submitit.AutoExecutor(folder=sys.argv[1], cluster="slurm")
executor.update_parameters(slurm_additional_parameters={"hold": True}, timeout_min=5)
executor.submit(print, "hello")
"""

# What is measured against what, and the most that it may be.
BARS = [
    ("llmops --help", "python -c pass", 3.0),
    ("llmops submit, composed before", "hydra compose", 1.5),
    ("llmops submit, composed anew", "hydra compose", 1.5),
    ("llmops submit, composed anew", "torchx run -s slurm", 1.0),
]


def commands(folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name -> (argv, extra environment) of all that take part."""
    script = folder / "job.sh"
    script.write_text("#!/bin/bash\ntrue\n")
    submit = [str(BIN / "llmops"), "submit", "--backend", "slurm", "recipe=tiny", 'cluster.extra=["--hold"]']
    warm = {"LLMOPS_RUNS_URL": str(folder / "runs"), "LLMOPS_CACHE_DIR": str(folder / "cache")}
    found = {
        "python -c pass": ([PYTHON, "-c", "pass"], {}),
        "llmops --help": ([str(BIN / "llmops"), "--help"], {}),
        "hydra compose": ([PYTHON, "-c", COMPOSE], {}),
        "llmops submit, composed before": (submit, warm),
        # A cache that is always empty: the folder cannot be made below a file.
        "llmops submit, composed anew": (submit, {**warm, "LLMOPS_CACHE_DIR": str(folder / "cold")}),
        "raw sbatch": (["sbatch", "--hold", "-o", "/dev/null", str(script)], {}),
        "submitit": ([PYTHON, "-c", SUBMITIT, str(folder / "submitit")], {}),
    }
    if (BIN / "torchx").exists():
        torchx = [
            str(BIN / "torchx"),
            "run",
            "-s",
            "slurm",
            "-cfg",
            f"partition=low,job_dir={folder}/torchx",
            "utils.echo",
        ]
        found["torchx run -s slurm"] = (torchx, {"SBATCH_HOLD": "1"})
    return found


def measure(argv: list[str], env: dict[str, str], folder: Path) -> tuple[float, float]:
    """CPU and wall seconds of one process and its children."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(argv, env={**os.environ, **env}, cwd=folder, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{argv} returned {done.returncode}: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> int:
    """Measure, print the table, and return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # users have their .pyc files
    with tempfile.TemporaryDirectory(prefix="llmops-bench-") as name:
        folder = Path(name)
        subprocess.run(["git", "init", "-q", name], check=True)  # a small project to snapshot
        todo = commands(folder)
        times: dict[str, list[tuple[float, float]]] = {each: [] for each in todo}
        for turn in track(range(rounds + 1), "rounds"):
            for each, (argv, env) in todo.items():
                shutil.rmtree(folder / "cold", ignore_errors=True)
                shutil.rmtree(folder / "torchx", ignore_errors=True)
                taken = measure(argv, env, folder)
                if turn:  # the first round warms the page cache
                    times[each].append(taken)
        subprocess.run(["scancel", "--me"], check=True)
    table = Table("command", "CPU s", "wall s", title=f"medians of {rounds} rounds")
    cpu = {each: statistics.median(value[0] for value in taken) for each, taken in times.items()}
    wall = {each: statistics.median(value[1] for value in taken) for each, taken in times.items()}
    for each in times:
        table.add_row(each, f"{cpu[each]:.3f}", f"{wall[each]:.3f}")
    bars = Table("ratio", "CPU", "wall", "bar", "")
    missed = 0
    for ours, theirs, most in BARS:
        if theirs not in times:
            bars.add_row(f"{ours} / {theirs}", "-", "-", f"≤ {most}", "the peer is not installed")
            continue
        ratios = cpu[ours] / cpu[theirs], wall[ours] / wall[theirs]
        kept = max(ratios) <= most
        missed += not kept
        bars.add_row(
            f"{ours} / {theirs}", *(f"{ratio:.2f}" for ratio in ratios), f"≤ {most}", "kept" if kept else "MISSED"
        )
    console = Console()
    console.print(table, bars)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
