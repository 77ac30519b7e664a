"""A served model on a real SLURM: preempted, it comes back by itself."""

from __future__ import annotations

from tests.inference.server_process import make_run
from tests.launcher.harness import Launcher
from tests.launcher.test_serving import address, complete
from tests.slurm import cluster


def test_a_preempted_server_serves_again(slurm, tmp_path):
    trained = make_run(tmp_path / "hamlet")
    launcher = Launcher(tmp_path / "runs", "slurm")
    try:
        run_id = launcher.submit("task=serve", f"run={trained}", "serve.name=hamlet", "cluster.nodes=1")
        text = complete(address(launcher, run_id, "0"))
        assert "ssh -N -L" in launcher.ok("status", run_id)
        cluster.preempt()
        assert complete(address(launcher, run_id, "1")) == text
        launcher.ok("cancel", "--graceful", run_id)
        value = launcher.wait(run_id, "cancelled")
        assert [each["state"] for each in value["attempts"]] == ["preempted", "cancelled"]
    finally:
        cluster.cancel_all()
