"""Studies from the command line to the table: what is submitted to the API is what the pods run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.pods import Pods
from tests.k8s.api.server import ApiServer
from tests.k8s.api.store import POD
from tests.k8s.conftest import write_kubeconfig
from tests.k8s.indexed import JOB, IndexedJob
from tests.k8s.kubelet import Cluster
from tests.sweep.driver import Sweeper

KINDS = {"job": "Job", "pytorchjob": "PyTorchJob"}
LONG = {"STEPS": "400", "STEP_S": "0.1"}


class Studies(Sweeper):
    """The command line with a kubeconfig that names the double."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        super().__init__(folder / "runs", "k8s", KUBECONFIG=str(write_kubeconfig(folder / "kubeconfig", server.url)))
        self.root.mkdir()
        self.server, self.folder = server, folder
        self.fixed = ["cluster.image=trainer:1", f"cluster.python={sys.executable}"]
        self.fixed.append(f"cluster.mounts=[{{path: {folder}, host_path: {folder}}}]")
        self.made: list[Pods] = []

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> tuple[str, IndexedJob]:
        """Submit a study of one-pod trials, and carry it out."""
        study = self.sweep(*self.fixed, *arguments, env=env)
        return study, self.carry_out()

    def carry_out(self) -> IndexedJob:
        """The newest Job."""
        job = IndexedJob(self.server, self.folder)
        self.made.append(job)
        return job

    def states(self, study: str) -> list[str]:
        return [trial["state"] for trial in self.study(study)["trials"]]


@pytest.fixture
def k8s(server: ApiServer, tmp_path: Path) -> Iterator[Studies]:
    made = Studies(server, tmp_path)
    yield made
    for each in made.made:
        each.close()


def test_a_grid_with_a_deleted_pod_and_a_trial_that_fails_for_good(k8s: Studies) -> None:
    lrs = "env.LR=0.001,0.003,0.01,0.03,none,0.1"
    quick = ("retry.max_failures=1", "cluster.workload=auto")
    gate = k8s.folder / "gate"
    env = {"STEPS": "40", "STEP_S": "0.1", "GATE": str(gate)}
    study, job = k8s.start(lrs, *quick, "--max-parallel", "2", "--name", "curves", env=env)
    assert k8s.states(study) == ["pending"] * 6
    first = k8s.run_folder(study, 0)
    job.until(lambda: (first / "state.json").exists(), "trial 0 to save")
    k8s.server.requests.clear()
    trials = k8s.study(study)["trials"]
    # Whatever the number of trials: one list of Jobs and one of pods.
    assert [request.resource for request in k8s.server.requests] == ["batch/jobs", "/pods"]
    assert [trial["state"] for trial in trials] == ["running"] * 2 + ["pending"] * 4
    assert trials[5]["reason"] == "waits for its turn: 2 at a time"
    assert trials[1]["job_id"] == f"prod/default/array/{job.name}/1"
    for index, text in ((0, b"of trial 0"), (1, b"of trial 1")):
        k8s.server.log(job.pod_name(index), b"2026-01-01T00:00:00Z " + text + b"\n")
    assert k8s.ok("logs", "--pods", "curves/1") == f"[{job.pod_name(1)}] of trial 1\n"
    job.remove(0)
    job.until(lambda: bool(job.codes), "the pod to stop")
    gate.touch()
    job.until_over()
    assert job.most == 2
    assert (job.completed, job.failed) == ({0, 1, 2, 3, 5}, {4})
    assert dict(job.made) == {0: 2, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1}, "only the trial whose pod went has another one"
    trials = k8s.study(study)["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 4 + ["failed", "complete"]
    assert "2 attempts failed" in trials[4]["reason"]
    assert [end["reason"] for end in k8s.attempts_of(study, 0)] == ["preempted", "finished"]
    assert k8s.attempts_of(study, 1)[0]["reason"] == "finished"
    assert len(k8s.values(study, 0)) == 40, "it went on from its checkpoint"
    assert k8s.status("curves/3")["job_ids"] == [f"prod/default/array/{job.name}/3"]
    assert json.loads(k8s.ok("sweep", "best", "--json", study))["trial"] == 2


def test_a_pod_that_dies_with_its_supervisor_is_made_again(k8s: Studies) -> None:
    study, job = k8s.start("env.LR=0.01,0.02", env={"STEPS": "40", "STEP_S": "0.1"})
    first = k8s.run_folder(study, 0)
    job.until(lambda: (first / "state.json").exists(), "trial 0 to save")
    job.kill_all(0)
    job.until_over()
    assert k8s.states(study) == ["complete"] * 2
    assert (0, 137) in job.codes
    assert dict(job.failures) == {0: 1}


def test_cancelling_one_trial_leaves_the_job_and_the_others(k8s: Studies) -> None:
    gate = k8s.folder / "gate"
    env = {"STEPS": "30", "GATE": str(gate)}
    study, job = k8s.start("env.LR=0.01,0.02,0.03,0.04", "--max-parallel", "1", env=env)
    first = k8s.run_folder(study, 0)
    job.until(lambda: (first / "state.json").exists(), "trial 0 to save")
    k8s.ok("cancel", f"{study}/2")
    k8s.ok("cancel", "--no-wait", f"{study}/0")
    assert not [request for request in k8s.server.requests if request.method == "DELETE"]
    job.until(lambda: bool(job.codes), "trial 0 to stop")
    gate.touch()
    job.until_over()
    assert k8s.states(study) == ["cancelled", "complete", "cancelled", "complete"]
    assert (job.failed, job.codes[0]) == ({0}, (0, 77))
    assert not k8s.run_folder(study, 2).exists(), "its pod found that it was not wanted"


@pytest.mark.parametrize("how", [(), ("--graceful",)])
def test_cancelling_a_study_leaves_nothing(k8s: Studies, how: tuple[str, ...]) -> None:
    study, job = k8s.start("env.LR=range(1,9)", "--max-parallel", "2", env=LONG)
    first = k8s.run_folder(study, 0)
    job.until(lambda: (first / "state.json").exists(), "trial 0 to save")
    k8s.ok("cancel", "--no-wait", *how, study)
    job.until(lambda: not job.pods, "the pods to end")
    assert set(k8s.states(study)) == {"cancelled"}
    assert not k8s.server.store.objects
    assert not [code for _, code in job.codes if code == 0]
    assert len(list((k8s.root / study / "trials").iterdir())) == 2, "no other trial was started"
    assert k8s.attempts_of(study, 0)[0]["saved"] is bool(how)


def test_what_failed_is_a_job_of_its_own_when_it_runs_again(k8s: Studies) -> None:
    study, job = k8s.start("env.LR=0.01,none,0.02", "retry.max_failures=1", env={"STEPS": "5"})
    job.until_over()
    assert k8s.states(study) == ["complete", "failed", "complete"]
    assert "1 trials run again, 1 are new" in k8s.ok(
        "sweep", "resume", study, "--trials", "1", "--allow-changes", "env.LR=0.03,0.04", "env.STEPS=7"
    )
    again = k8s.carry_out()
    assert again.name != job.name
    assert again.job()["spec"]["completions"] == 2
    again.until_over()
    trials = k8s.study(study)["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "failed", "complete", "complete"]
    assert k8s.status(f"{study}/1")["job_ids"] == [
        f"prod/default/array/{job.name}/1",
        f"prod/default/array/{again.name}/0",
    ]
    assert k8s.status(f"{study}/3")["job_ids"] == [f"prod/default/array/{again.name}/1"]


def test_a_study_whose_answer_was_lost_is_found_by_its_name(k8s: Studies) -> None:
    study, job = k8s.start("env.LR=0.01,0.02")
    record = k8s.root / study / "job/0000/job.json"
    record.unlink()
    assert k8s.states(study) == ["pending"] * 2
    assert json.loads(record.read_text())["job_id"] == f"prod/default/array/{job.name}"


def test_what_a_trial_waits_for_before_it_has_a_pod(k8s: Studies) -> None:
    study, job = k8s.start("env.LR=0.01,0.02", "cluster.queue=team-a")
    reasons = {trial["reason"] for trial in k8s.study(study)["trials"]}
    assert reasons == {"waits in the queue team-a (Kueue)"}
    k8s.server.store.merge(JOB, "default", job.name, {"spec": {"suspend": False}})
    job.until_over()
    assert k8s.states(study) == ["complete"] * 2


@pytest.mark.parametrize("workload", list(KINDS))
def test_trials_of_several_pods_are_workloads_of_their_own(k8s: Studies, workload: str) -> None:
    large = ("cluster.nodes=2", f"cluster.workload={workload}", "cluster.queue=team-a")
    study = k8s.sweep(*k8s.fixed, *large, "env.LR=0.01,0.02,0.03")
    kind = KINDS[workload]
    made = [key for key in k8s.server.store.objects if key[0].kind == kind]
    assert len(made) == 3
    k8s.ok("cancel", "--no-wait", f"{study}/2")
    left = [key for key in k8s.server.store.objects if key[0].kind == kind]
    assert len(left) == 2
    for trial, key in enumerate(left):
        item = k8s.server.store.objects[key]
        assert item["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
        (k8s.folder / key[2]).mkdir()
        cluster = Cluster(k8s.server, kind, k8s.folder / key[2], key[2])
        k8s.made.append(cluster)
        cluster.start(1)
        log = k8s.folder / key[2] / "pod1.log"
        cluster.until(lambda log=log: "waiting for node 0's pod" in log.read_text(), "the pod of node 1 to wait")
        assert not k8s.run_folder(study, trial).exists(), "only node 0's pod makes the run"
        cluster.start(0).until_over()
        assert cluster.state == "succeeded"
        assert k8s.status(f"{study}/{trial}")["job_ids"] == [f"prod/default/{workload}/{key[2]}"]
    assert k8s.states(study) == ["complete", "complete", "cancelled"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cluster.nodes=2",), "need a Kueue queue that admits them as a whole"),
        (("cluster.nodes=2", "cluster.queue=q", "--max-parallel", "2"), "as the quota of cluster.queue=q admits them"),
        (("cluster.workload=jobset",), "a study of one-pod trials is one Indexed Job"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    k8s: Studies, arguments: tuple[str, ...], words: str
) -> None:
    done = k8s.call("sweep", "--backend", "k8s", *k8s.fixed, "env.LR=1,2,3", *arguments, "--", "true")
    assert done.returncode == 2
    assert words in done.stderr
    assert "(nothing was submitted of 3 trials)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(k8s.root.iterdir())
    assert not [key for key in k8s.server.store.objects if key[0] != POD]
