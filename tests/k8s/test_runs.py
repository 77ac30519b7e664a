"""Runs from the command line to their end: what is submitted to the API is what the pods run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent.pods import PROGRAM
from tests.k8s.api.server import ApiServer
from tests.k8s.conftest import write_kubeconfig
from tests.k8s.kubelet import Cluster
from tests.launcher.harness import TINY, Launcher

KINDS = {"job": "Job", "jobset": "JobSet", "pytorchjob": "PyTorchJob", "trainjob": "TrainJob"}
IMAGE = ("cluster.image=trainer:1", f"cluster.python={sys.executable}", "cluster.nodes=2")


class K8s(Launcher):
    """The command line with a kubeconfig that names the double."""

    def __init__(self, root: Path, server: ApiServer, folder: Path) -> None:
        kubeconfig = write_kubeconfig(folder / "kubeconfig", server.url)
        super().__init__(root, "k8s", KUBECONFIG=str(kubeconfig))
        self.server, self.folder, self.made = server, folder, list[Cluster]()

    def cluster(self, workload: str) -> Cluster:
        """Carry out what was submitted."""
        self.made.append(Cluster(self.server, KINDS[workload], self.folder))
        return self.made[-1]


@pytest.fixture
def k8s(server: ApiServer, tmp_path: Path) -> Iterator[K8s]:
    made = K8s(tmp_path / "runs", server, tmp_path)
    yield made
    for cluster in made.made:
        cluster.close()


@pytest.fixture
def submit(k8s: K8s, tmp_path: Path) -> Callable[..., str]:
    """Submits with a mount for the runs."""
    mount = f"cluster.mounts=[{{path: {tmp_path}, host_path: {tmp_path}}}]"

    def run(workload: str, *overrides: str, command: tuple[str, ...] = ()) -> str:
        (tmp_path / "runs").mkdir(exist_ok=True)
        return k8s.submit(*overrides, *IMAGE, mount, f"cluster.workload={workload}", command=command)

    return run


@pytest.mark.parametrize("workload", list(KINDS))
def test_submitted_watched_disturbed_and_finished(k8s: K8s, submit: Any, tmp_path: Path, workload: str) -> None:
    run_id = submit(workload, command=(sys.executable, str(PROGRAM)))
    assert k8s.status(run_id)["state"] == "pending"
    cluster = k8s.cluster(workload)
    run = tmp_path / "runs" / run_id
    cluster.start().until(lambda: (run / "started-0-1").exists(), "the ranks of attempt 0")
    assert k8s.status(run_id)["state"] == "running"
    assert '"lab/train@sha256:0123"' in (run / "job/0000/image.json").read_text()
    cluster.delete(1)
    cluster.until(lambda: (run / "started-1-1").exists(), "the ranks of attempt 1")
    (run / "finish").touch()
    cluster.until_over()
    value = k8s.status(run_id)
    assert value["state"] == "finished"
    assert [each["reason"] for each in value["attempts"]] == ["preempted", "finished"]
    assert value["attempts"][0]["hosts"] == ["host0", "host1"]
    assert value["job_ids"][0].startswith(f"prod/default/{workload}/")
    k8s.server.log(f"{cluster.name}-0", b"2026-01-01T00:00:00Z what it printed\n")
    assert f"[{cluster.name}-0] what it printed" in k8s.ok("logs", "--pods", run_id)


def test_a_job_whose_answer_was_lost_is_found_by_its_name(k8s: K8s, submit: Any, tmp_path: Path) -> None:
    """The launcher died between the answer and writing it down; the context may have changed since."""
    run_id = submit("job", command=("true",))
    (tmp_path / "runs" / run_id / "job/0000/job.json").unlink()
    value = k8s.status(run_id)
    assert value["state"] == "pending"
    assert value["job_ids"][0].startswith("prod/default/job/")
    again = submit("job", command=("true",))
    (tmp_path / "runs" / again / "job/0000/job.json").unlink()
    k8s.server.store.objects.clear()
    assert k8s.status(again)["state"] == "unknown"
    k8s.server.close()
    refused = k8s.call("resume", again)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "not known whether" in refused.stderr


def test_a_cancelled_run_leaves_nothing(k8s: K8s, submit: Any, tmp_path: Path) -> None:
    run_id = submit("job", command=(sys.executable, str(PROGRAM)))
    cluster = k8s.cluster("job")
    run = tmp_path / "runs" / run_id
    cluster.start().until(lambda: (run / "started-0-1").exists(), "the ranks")
    k8s.ok("cancel", "--graceful", "--no-wait", run_id)
    cluster.until(lambda: not cluster.pods, "the pods to end")
    assert k8s.status(run_id)["state"] == "cancelled"
    assert not k8s.server.store.objects
    assert '"saved": true' in (run / "attempts/0000/end.json").read_text()


def test_a_failing_program_is_given_up_with_its_last_words(k8s: K8s, submit: Any) -> None:
    run_id = submit("pytorchjob", "retry.max_no_progress=2", "retry.backoff_s=0.1", command=("false",))
    cluster = k8s.cluster("pytorchjob")
    cluster.start().until_over()
    value = k8s.status(run_id)
    assert value["state"] == "failed"
    assert [each["reason"] for each in value["attempts"]] == ["failed", "failed"]


def test_a_run_moves_between_this_machine_and_a_cluster_bit_by_bit(
    k8s: K8s, submit: Any, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    here = Launcher(k8s.root, "local")
    k8s.root.mkdir()
    run_id = here.submit(*TINY)
    here.wait_step(run_id, 12)
    here.ok("cancel", "--graceful", run_id)
    mount = f"cluster.mounts=[{{path: {tmp_path}, host_path: {tmp_path}}}]"
    k8s.ok("resume", run_id, "--backend", "k8s", *IMAGE, mount, "cluster.workload=job")
    cluster = k8s.cluster("job").start()
    cluster.until(lambda: (here.step(run_id) or 0) >= 30, "step 30")
    k8s.ok("cancel", "--graceful", "--no-wait", run_id)
    cluster.until(lambda: not cluster.pods, "the pods to end")
    here.ok("resume", run_id, "--backend", "local", "cluster.ranks_per_node=2")
    assert here.wait(run_id, "finished")["backend"] == "local"
    assert here.losses(run_id) == undisturbed
