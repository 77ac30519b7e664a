"""An evaluation beside a training on a real SLURM."""

from __future__ import annotations

from pathlib import Path

from tests.eval.conftest import scores
from tests.launcher.harness import TINY, Launcher
from tests.slurm import cluster


def test_a_training_is_followed_by_a_job_of_its_own(slurm, tmp_path):
    launcher = Launcher(tmp_path / "runs", "slurm")
    try:
        run_id = launcher.submit(
            *TINY, "train.max_steps=30", "cluster.nodes=1", "eval.every=commit", "eval.limit=1", "--name", "lear"
        )
        launcher.wait("lear-eval", "finished", timeout=400)
        assert launcher.wait(run_id, "finished")["step"] == 30
        found = scores(Path(launcher.url, run_id))
        assert "local_choice@30" in found
        assert {result["step"] for result in found.values()} <= {10, 20, 30}
    finally:
        cluster.cancel_all()
