"""Evaluations as runs: of a run that is over, beside one that trains, stopped and resumed, and those that cannot be."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from llm.checkpoint.leases import read_leases
from llm.utils.storage import open_storage
from llmops import api, evaluation
from llmops.backends.slurm import SlurmBackend
from llmops.config.schema import SlurmCluster
from llmops.launch import Origin, Prepared, job_spec
from llmops.runs.records import JobRecord, Submission, SubmissionRecord, load_run
from llmops.runs.store import open_store
from tests.eval.conftest import scores
from tests.launcher.harness import Launcher

TRAINING = (
    "recipe=tiny", "train.max_steps=30", "checkpoint.every_steps=10", "checkpoint.keep_last=1", "eval.batches=1",
    "eval.sample_prompts=[]", "cluster.ranks_per_node=1", "train.global_batch_size=8",
)  # fmt: skip
TASKS = {"local_choice", "local_passages", "local_echo"}


def test_each_commit_of_a_training_is_evaluated_while_it_goes_on(local: Launcher) -> None:
    run_id = local.submit(*TRAINING, "eval.every=commit", "eval.limit=2", "--name", "lear")
    local.wait(run_id, "finished")
    companion = local.wait("lear-eval", "finished")
    assert companion["attempts"][0]["state"] == "finished"
    folder = Path(local.url, run_id)
    found = scores(folder)
    steps = {result["step"] for result in found.values()}
    # Retention keeps one commit, and the training waits for nobody: those that were seen in time have all their scores.
    assert 30 in steps
    assert steps <= {10, 20, 30}
    assert set(found) == {f"{task}@{step}" for task in TASKS for step in steps}
    assert all(result["by"] == companion["id"] for result in found.values())
    assert not read_leases(open_storage(str(folder)))
    # What they are shown by.
    page = local.ok("status", "lear")
    assert "local_passages" in page
    assert "token_perplexity" in page
    served = local.ok("metrics", "--once")
    assert f'llmops_run_score{{metric="acc",run_id="{run_id}",task="local_choice"}}' in served
    # Nothing is left to do for another one, and a change of the questions is another evaluation.
    again = local.submit("task=eval", "run=lear", "step=every", "eval.limit=2")
    local.wait(again, "finished")
    assert scores(folder).keys() == found.keys()
    assert "config.yaml" in os.listdir(Path(local.url, again))

    # By step, which may be one that retention has removed.
    refused = local.call("submit", "task=eval", "run=lear", "step=61")
    assert refused.returncode == 2
    assert "step=61" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_an_evaluation_is_preempted_and_goes_on(local: Launcher, trained: Path) -> None:
    run_id = local.submit("task=eval", f"run={trained}", "eval.batch_size=1", "--name", "judge")

    def answered() -> bool:
        return bool(list((trained / "evals").glob("*.local_choice.*.json")))

    try:
        local.wait_for(answered, 180, "a task to be done", run_id)
        made = {path: path.stat().st_mtime_ns for path in (trained / "evals").glob("*.json")}
        supervisor = int(local.status(run_id)["job_ids"][0].split(":")[1])
        os.kill(supervisor, signal.SIGTERM)
        value = local.wait(run_id, "finished")
        assert [each["reason"] for each in value["attempts"]] == ["preempted", "finished"]
        assert scores(trained).keys() == {f"{task}@60" for task in TASKS}
        assert all(path.stat().st_mtime_ns == at for path, at in made.items()), "a task was evaluated twice"
        assert not list((trained / "evals").glob("requests/*"))
    finally:
        shutil.rmtree(trained / "evals", ignore_errors=True)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=eval"], "task=eval needs run=NAME"),
        (["task=eval", "run=nobody"], "there is no run 'nobody'"),
        (["task=eval", "run=/nowhere"], "run=/nowhere: there is no run"),
        (["task=eval", "run=RUN", "step=7"], "step=7: RUN has no checkpoint of it; there are those of 20, 40, 60"),
        (["task=eval", "run=RUN", "dist.pp=2"], "evaluations spread a model by dp_shard and tp alone"),
        (["task=eval", "run=RUN", "eval=code"], "set eval.run_code=true"),
        (["task=eval", "run=RUN", "eval.task_dir=mine"], "give an absolute path"),
        (["recipe=tiny", "eval.every=commit", "eval.tasks=[]"], "eval.tasks=[]: name one task or more"),
    ],
)
def test_what_cannot_be_evaluated_is_not_submitted(
    local: Launcher, trained: Path, overrides: list[str], said: str
) -> None:
    done = local.call("submit", *(each.replace("RUN", str(trained)) for each in overrides))
    assert done.returncode == 2
    assert said.replace("RUN", str(trained)) in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(Path(local.url).glob("2*"))


def test_trials_are_not_followed(local: Launcher) -> None:
    done = local.call("sweep", "recipe=tiny", "train.lr=1e-3,2e-3", "eval.every=commit")
    assert done.returncode == 2
    assert "trials are not followed" in done.stderr


def test_on_a_cluster(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlurmBackend, "check", lambda *_: None)

    def prepare(*overrides: str) -> Prepared:
        return api.prepare(overrides, backend="slurm", runs_url=str(tmp_path / "runs"))

    prepared = prepare("task=eval", f"run={trained}", "cluster.ranks_per_node=2", "dist=fsdp_tp", "dist.tp=2")
    spec = job_spec(prepared, 0, "tag", "config.yaml", Origin())
    assert spec.command[1:] == ["-m", "llm.eval", "--config", f"{prepared.run_url}/config.yaml"]
    assert prepared.name == f"{trained.name}-eval"
    assert f"run: {trained}\n" in prepared.composed.yaml_text
    # What goes along with a large training is small, and waits until that one has begun.
    large = prepare(
        "recipe=tiny", "eval.every=commit", "cluster.nodes=4", "cluster.ranks_per_node=8", "cluster.gpus_per_node=8",
        "train.global_batch_size=256", "eval.ranks=2", "name=large",
    )  # fmt: skip
    companion = evaluation.companion(large.config, large.name)
    assert companion.eval.every == "never"
    submission = Submission(
        SubmissionRecord(number=0, tag="tag", backend="slurm", created=0.0), JobRecord(job_id="17", by="job", time=0.0)
    )
    run = replace(load_run(open_store(str(trained))), submissions=[submission])
    followed = evaluation.follow(companion, run).config
    assert isinstance(followed.cluster, SlurmCluster)
    assert (followed.name, followed.run, followed.step, followed.follow) == ("large-eval", str(trained), "every", True)
    cluster = followed.cluster
    assert (cluster.nodes, cluster.ranks_per_node, cluster.gpus_per_node, cluster.dependency) == (1, 2, 2, "after:17")
