"""Runs on the real SLURM that share no folder: the store is a real S3 server, the supervisor is in the script."""

from __future__ import annotations

import pytest

from tests.launcher.harness import TINY, Launcher
from tests.slurm import cluster


@pytest.fixture
def remote(slurm, s3_url, tmp_path):
    """A run store on the S3 server; SLURM's own output in a folder of the test."""
    yield Launcher(s3_url, "slurm", XDG_DATA_HOME=str(tmp_path / "data"))
    cluster.cancel_all()


@pytest.mark.parametrize("requeue", [True, pytest.param(False, marks=pytest.mark.long)])
def test_preempted_on_two_nodes_it_resumes_bit_by_bit(remote, undisturbed, tmp_path, requeue):
    run_id = remote.submit(*TINY, f"cluster.log_dir={tmp_path}")
    remote.wait_step(run_id, 12)
    if not requeue:
        cluster.run(["scontrol", "update", f"jobid={remote.status(run_id)['job_ids'][0]}", "requeue=0"])
    cluster.preempt()
    value = remote.wait(run_id, "finished", timeout=200)
    assert [attempt["reason"] for attempt in value["attempts"]] == ["preempted", "finished"]
    first, second = value["attempts"]
    assert second["first_step"] == first["last_step"] + 1
    assert len(value["job_ids"]) == (1 if requeue else 2)
    assert remote.losses(run_id) == undisturbed
    output = "".join(path.read_text() for path in tmp_path.glob(f"{run_id}.*.out"))
    assert "attempt 1 ended: finished" in output
    assert "[0/0] step" in remote.ok("logs", run_id)
    assert "[1/0] step" in remote.ok("logs", run_id)
    remote.wait_for(lambda: remote.alive(run_id) == [], 60, "all processes to be gone", run_id)


def test_a_log_folder_that_is_not_there_is_refused(remote):
    done = remote.call("submit", "--backend", "slurm", "cluster.log_dir=/no/such", "--", "true")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cluster.log_dir=/no/such" in done.stderr


def test_the_script_is_readable_and_carries_the_supervisor(remote):
    script = remote.ok("render", "--backend", "slurm", *TINY)
    assert f"--run {remote.url}/" in script
    assert "<<'AGENT'" in script


def test_a_run_moves_from_slurm_to_this_machine_and_goes_on_bit_by_bit(remote, undisturbed, tmp_path):
    run_id = remote.submit(*TINY, f"cluster.log_dir={tmp_path}")
    remote.wait_step(run_id, 12)
    remote.ok("cancel", "--graceful", run_id)
    remote.wait(run_id, "cancelled")
    refused = remote.call("resume", run_id, "--backend", "nowhere")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    remote.ok("resume", run_id, "--backend", "local", "cluster.ranks_per_node=2")
    value = remote.wait(run_id, "finished")
    assert value["backend"] == "local"
    assert len(value["job_ids"]) == 2
    assert remote.losses(run_id) == undisturbed
