"""Runs on the real SLURM from a machine that is not on the cluster: through a real sshd, as from a laptop."""

from __future__ import annotations

import sys

import pytest

from tests.launcher.harness import TINY, Launcher
from tests.slurm import cluster

PYTHON = f"cluster.python={sys.executable}"


@pytest.fixture
def laptop(slurm, sshd, tmp_path):
    """A launcher that finds no SLURM on its own PATH."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("ssh", "git", "sh", "bash"):
        (bin_folder / name).symlink_to(f"/usr/bin/{name}")
    launcher = Launcher(tmp_path / "runs", "slurm", PATH=str(bin_folder), XDG_STATE_HOME=str(tmp_path / "state"))
    launcher.env["LLMOPS_RUNS_URL"] = f"ssh://{sshd.name}{launcher.url}"
    yield launcher
    cluster.cancel_all()


def test_a_run_is_submitted_watched_and_cancelled_from_elsewhere(laptop, undisturbed):
    run_id = laptop.submit(*TINY, PYTHON)
    value = laptop.wait(run_id, "finished")
    assert value["url"] == f"{laptop.env['LLMOPS_RUNS_URL']}/{run_id}"
    assert laptop.losses(run_id) == undisturbed
    assert "step" in laptop.ok("logs", run_id)
    assert run_id in laptop.ok("status")
