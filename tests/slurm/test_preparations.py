"""A preparation as arrays of jobs, on the real SLURM."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.data.preparing import contents, jsonl, shakespeare
from tests.launcher.harness import TREE
from tests.slurm import cluster


def prepare(folder, out: str, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "llm.tools.prepare_data", "--input", str(folder / "a.jsonl"),
        "--output", str(folder / out), "--unit-mb", "0.004", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=TREE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], code: int) -> str:
    try:
        shown, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, shown
    return shown


def element(job: str, number: int) -> int:
    """Pid of the Python that an element runs: all nodes are on this machine. submitit outlives scancel's SIGTERM."""
    mine = {f"SLURM_ARRAY_JOB_ID={job}".encode(), f"SLURM_ARRAY_TASK_ID={number}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            python = b"python" in words[0] and b"submitit.core._submit" in words
            if python and mine <= set((folder / "environ").read_bytes().split(b"\0")):
                return int(folder.name)
    raise AssertionError(f"no process of {job}_{number}")


def test_an_array_whose_element_is_killed_goes_on(slurm, tmp_path):
    """One element is killed in the middle: the command says so, and run again it does what is missing."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(shakespeare() * 4))
    units = int(finish(prepare(tmp_path, "plain", "--workers", "2"), 0).partition("prepared ")[2].split()[0])
    options = ("--slurm", "--jobs", "2", "--slurm-partition", "low", "--slurm-minutes", "5")
    options += ("--slurm-logs", str(tmp_path / "logs"))
    records = tmp_path / "out" / "parts" / "units"
    process = prepare(tmp_path, "out", *options)
    try:
        cluster.wait_for(lambda: len(list(records.glob("*.json"))) > 2 or process.poll() is not None, 120, "units")
        assert process.poll() is None, process.communicate()[0]
        (job,) = {path.name.split("_")[0] for path in (tmp_path / "logs").glob("*_submitted.pkl")}
        os.kill(element(job, 1), signal.SIGKILL)
        shown = finish(process, 1)
    finally:
        process.kill()
        process.wait()
        cluster.cancel_all()
    assert "items of units are missing and all jobs are over" in shown
    kept = len(list(records.glob("*.json")))
    assert 2 < kept < units
    shown = finish(prepare(tmp_path, "out", *options), 0)
    assert f"prepared {units - kept} units; {kept} had been prepared before" in shown
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
