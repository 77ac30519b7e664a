"""Hydra's own multirun through submitit, on the real SLURM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmops.agent import scontrol
from tests.launcher.harness import TREE
from tests.slurm import cluster

SMALL = (
    "recipe=tiny",
    "train.seq_len=64",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.warmup_steps=2",
    "checkpoint.every_steps=0",
    "eval.batches=1",
    "eval.sample_prompts=[]",
)


def multirun(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """``python -m llm.train --multirun`` with its jobs in ``folder``."""
    log = (folder / "launcher.log").open("w")
    command = [sys.executable, "-m", "llm.train", "--multirun", f"hydra.sweep.dir={folder}/sweep", *SMALL, *overrides]
    return subprocess.Popen(command, cwd=TREE, stdout=log, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], folder: Path, timeout: float) -> None:
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    logs = [folder / "launcher.log", *folder.glob("sweep/.submitit/*/*.out"), *folder.glob("sweep/.submitit/*/*.err")]
    assert code == 0, "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in logs)


def steps(run: Path, attempt: int) -> list[int]:
    """Steps in an attempt's metrics, in order."""
    lines = [
        line for part in sorted(run.glob(f"metrics/{attempt:04d}/*.jsonl")) for line in part.read_text().splitlines()
    ]
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "step"]


def test_three_points(slurm, tmp_path):
    points = ("train.lr=1e-4,3e-4,1e-3", "train.max_steps=5", "hydra/launcher=submitit_slurm")
    finish(multirun(tmp_path, *points, "hydra.launcher.timeout_min=5"), tmp_path, 180)
    for number in range(3):
        run = tmp_path / "sweep" / str(number)
        assert steps(run, 0) == [1, 2, 3, 4, 5]
        assert (run / "checkpoints" / "step_00000005").is_dir()


@pytest.mark.soak  # SLURM counts time limits in minutes
def test_a_time_out_saves_and_goes_on(slurm, tmp_path):
    """Two tasks; nothing but the signal before the time limit makes them save."""
    launcher = ("hydra/launcher=slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.cpus_per_task=1")
    process = multirun(tmp_path, "train.max_steps=300", *launcher, "hydra.launcher.timeout_min=5")
    run = tmp_path / "sweep" / "0"
    job = ""
    try:
        cluster.wait_for(lambda: len(steps(run, 0)) > 20 or process.poll() is not None, 120, "the first steps")
        assert process.poll() is None, (tmp_path / "launcher.log").read_text()
        job = next(iter((tmp_path / "sweep" / ".submitit").glob("[0-9]*"))).name
        cluster.run(["scancel", "--signal=USR2", job])
        cluster.wait_for(lambda: (run / "checkpoints").exists() and any((run / "checkpoints").iterdir()), 60, "a save")
        assert scontrol.cut_wait(job, 3, patience_s=60)
        finish(process, tmp_path, 240)
    finally:
        process.kill()
        if job:
            cluster.run(["scancel", job], check=False)
    first, second = steps(run, 0), steps(run, 1)
    assert 20 < len(first) < 300
    assert first + second == list(range(1, 301))
