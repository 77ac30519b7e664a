"""Jobs on AWS Batch through TorchX: its real scheduler and AWS' real client, against a server that answers as Batch."""

from __future__ import annotations

import pytest

from tests.launcher.harness import Launcher
from tests.torchx.batch import Batch

ON_BATCH = ("-o", "scheduler=aws_batch", "-o", "image=lab/train:1", "-o", "queue=gpu", "-o", "memory_mb=1000")


@pytest.fixture
def batch():
    found = Batch()
    yield found
    found.close()


@pytest.fixture
def launcher(tmp_path, batch):
    return Launcher(tmp_path / "runs", "torchx", **batch.env)


def test_a_job_is_submitted_seen_and_cancelled(launcher, batch):
    run_id = launcher.submit(*ON_BATCH, command=("true",))
    (job,) = batch.jobs
    (job_id,) = launcher.status(run_id)["job_ids"]
    assert job_id.startswith("aws_batch/gpu/llmops-")
    assert job["jobName"].startswith(job_id.rpartition("/")[2])
    assert launcher.status(run_id)["state"] == "pending"
    job["status"] = "RUNNING"
    assert launcher.status(run_id)["state"] == "running"
    batch.listed = 0  # many others came after it
    assert launcher.status(run_id)["state"] == "running"
    launcher.ok("cancel", run_id)
    assert job["status"] == "FAILED"
    assert launcher.status(run_id)["state"] == "cancelled"


def test_a_lost_answer_makes_no_second_job(launcher, batch):
    batch.lose_answers = 1
    run_id = launcher.submit(*ON_BATCH, command=("true",))
    assert len(batch.jobs) == 1
    assert launcher.status(run_id)["state"] == "pending"


def test_refused_by_the_service(launcher, batch):
    batch.refuse = "Job queue gpu is disabled"
    done = launcher.call("submit", "--backend", "torchx", *ON_BATCH, "--", "true")
    assert done.returncode == 2
    assert done.stderr.startswith("llmops: error: torchx refused the job: ")
    assert "Job queue gpu is disabled" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_job_that_ended_without_a_word(launcher, batch):
    run_id = launcher.submit(*ON_BATCH, command=("true",))
    batch.jobs[0]["status"] = "FAILED"
    assert launcher.status(run_id)["state"] == "failed"
    batch.jobs.clear()
    value = launcher.status(run_id)
    assert value["state"] == "failed"
    assert "knows no such app" in value["reason"]
