"""Runs on the real SLURM from a machine that is not on the cluster: through a real sshd, as from a laptop."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launcher.harness import TINY, Launcher
from tests.slurm import cluster

PYTHON = f"cluster.python={sys.executable}"


@pytest.fixture
def laptop(slurm, sshd, tmp_path):
    """A launcher on a machine without SLURM's commands."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ssh", "git", "sh", "bash"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    launcher = Launcher(tmp_path / "runs", "slurm", PATH=str(programs), XDG_STATE_HOME=str(tmp_path / "state"))
    launcher.env["LLMOPS_RUNS_URL"] = f"ssh://{sshd.name}{launcher.url}"
    yield launcher
    cluster.cancel_all()


def test_a_run_is_submitted_watched_cancelled_and_resumed_from_elsewhere(laptop, undisturbed):
    assert Path("/usr/bin/sbatch").exists()
    assert "/usr/bin" not in laptop.env["PATH"]
    run_id = laptop.submit(*TINY, PYTHON)
    laptop.wait_step(run_id, 12)
    assert run_id in laptop.ok("status", "--state", "running")
    laptop.ok("cancel", "--graceful", run_id)
    laptop.wait(run_id, "cancelled")
    laptop.ok("resume", run_id)
    followed = laptop.ok("logs", "-f", run_id)
    assert "[0/0] step" in followed
    assert "[1/0] step" in followed
    value = laptop.wait(run_id, "finished")
    assert value["url"] == f"{laptop.env['LLMOPS_RUNS_URL']}/{run_id}"
    assert laptop.losses(run_id) == undisturbed
