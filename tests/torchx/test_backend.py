"""``--backend torchx``: real processes of TorchX's own scheduler, and the requests for schedulers that are not here."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from pathlib import Path

import pytest

from llmops.agent.torchx import address
from llmops.backends.torchx import processes, schedulers
from llmops.cli.main import main
from tests.launcher.harness import Launcher
from tests.torchx.commands import COUNTER

LOCAL = ("-o", "scheduler=local_cwd", "code.enabled=false", "env.WHERE=here")
BATCH = ("-o", "scheduler=aws_batch", "-o", "image=lab/train:1", "-o", "queue=gpu")


@pytest.fixture
def launcher(tmp_path):
    found = Launcher(tmp_path / "runs", "torchx")
    yield found
    for path in found.root.glob("*/job/0000/spec.json"):
        for pid in processes.alive(f"llmops-{path.parts[-4][-4:]}"):
            os.kill(pid, signal.SIGKILL)


def counter(tmp_path: Path, steps: int) -> tuple[str, ...]:
    (tmp_path / "state").mkdir(exist_ok=True)
    return (sys.executable, "-c", COUNTER, str(tmp_path / "state"), str(steps))


def test_two_replicas_run_under_one_supervisor(launcher, tmp_path):
    run_id = launcher.submit(*LOCAL, "-o", "nodes=2", command=counter(tmp_path, 5))
    value = launcher.wait(run_id, "finished")
    assert [attempt["reason"] for attempt in value["attempts"]] == ["finished"]
    shown = launcher.ok("logs", run_id)
    assert "rank 0 of 2 starts at 0" in shown
    assert "rank 1 done at 5" in shown
    launcher.wait_for(lambda: launcher.alive(run_id) == [], 60, "all processes to be gone", run_id)


def test_saved_on_a_graceful_cancel_and_resumed(launcher, tmp_path):
    run_id = launcher.submit(*LOCAL, command=counter(tmp_path, 10_000))
    launcher.wait_for(lambda: (launcher._heartbeat(run_id) or 0) >= 3, 60, "the third step", run_id)
    assert launcher.status(run_id)["state"] == "running"
    launcher.ok("cancel", run_id, "--graceful")
    assert launcher.status(run_id)["state"] == "cancelled"
    reached = int((tmp_path / "state" / "0").read_text())
    assert reached >= 3
    assert launcher.alive(run_id) == []
    launcher.ok("resume", run_id, f"command=[{sys.executable},-c,pass]")
    value = launcher.wait(run_id, "finished")
    assert len(value["job_ids"]) == 2


def test_cancelled_at_once(launcher, tmp_path):
    run_id = launcher.submit(*LOCAL, command=("sleep", "600"))
    launcher.wait_for(lambda: launcher.ranks(run_id), 60, "the rank", run_id)
    launcher.ok("cancel", run_id)
    assert launcher.status(run_id)["state"] == "cancelled"
    launcher.wait_for(lambda: launcher.alive(run_id) == [], 60, "all processes to be gone", run_id)


def test_a_replica_that_is_lost_is_no_success(launcher):
    run_id = launcher.submit(*LOCAL, command=("sleep", "600"))
    launcher.wait_for(lambda: launcher.ranks(run_id), 60, "the rank", run_id)
    name = launcher.status(run_id)["job_ids"][0].rpartition("/")[2]
    for pid in processes.alive(name):
        os.kill(pid, signal.SIGKILL)
    value = launcher.wait(run_id, "failed")
    assert "its processes are gone" in value["reason"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-o", "scheduler=local_cw"), "did you mean local_cwd?"),
        (("-o", "scheduler=slurm"), "use --backend slurm"),
        (("-o", "scheduler=llmops_k8s"), "use --backend k8s"),
        (("-o", "scheduler=lsf"), "no name"),
        (("-o", "scheduler=aws_sagemaker"), "does not list apps"),
        (("-o", "scheduler=gcp_batch", "-o", "image=x", "-o", "nodes=2"), "cluster.nodes=2: gcp_batch"),
        ((), "cluster.scheduler is not set"),
        (("-o", "scheduler=local_cwd", "-o", "log_dri=/x"), "local_cwd has no such option; did you mean log_dir?"),
        (("-o", "scheduler=local_cwd", "-o", "prepend_cwd=maybe"), "expected true or false"),
        (("-o", "nodes"), "give it as KEY=VALUE"),
        (BATCH[:4], "cluster.options.queue is not set"),
        (BATCH[:2], "cluster.image is not set"),
        ((*BATCH, "-o", "priority=high"), "expected a whole number"),
        ((*BATCH, "-o", "mounts=[bind]"), "cluster.mounts: "),
        ((*BATCH, "-o", "resource=aws_nope"), "no resource of this name"),
        (BATCH, "requires memMB to be set"),
        ((*BATCH, "secrets=[TOKEN]"), "secrets: TOKEN cannot travel"),
        (("-o", "scheduler=local_docker", "-o", "image=lab/x", "-o", "copy_env=AWS_*"), "not written into a run"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_left(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LLMOPS_RUNS_URL", str(tmp_path / "runs"))
    assert main(["submit", "--backend", "torchx", *options, "--", "true"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert said in told
    assert not (tmp_path / "runs").exists()


def test_a_sweep_is_refused(launcher):
    done = launcher.call("sweep", "--backend", "torchx", "cluster.scheduler=local_cwd", "env.A=1,2", "--", "true")
    assert done.returncode == 2
    assert "knows no arrays" in done.stderr


def test_the_request_for_aws_batch(launcher):
    sized = ("-o", "nodes=2", "-o", "gpus_per_node=8", "-o", "memory_mb=64000", "-o", "max_retries=3")
    shown = launcher.ok("render", "--backend", "torchx", *BATCH, *sized, "--", "python", "it's.py", "$x")
    assert "numNodes: 2" in shown
    assert "attempts: 3" in shown
    assert "queue: gpu" in shown
    assert "--node $AWS_BATCH_JOB_NODE_INDEX" in shown
    assert '--main "${AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS:-}"' in shown
    assert f"containerPath: {launcher.root}" in shown
    assert not launcher.root.exists()


def test_the_request_for_docker(launcher):
    shown = launcher.ok(
        "render", "--backend", "torchx", "-o", "scheduler=local_docker", "-o", "image=lab/train:1", "--", "true"
    )
    assert "image: lab/train:1" in shown
    assert f"Source: {launcher.root}" in shown
    assert "mem_limit" not in shown  # nothing was said of it


def test_a_scheduler_out_of_reach_gets_nothing(launcher, tmp_path):
    launcher.env |= {"DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
    done = launcher.call("submit", "--backend", "torchx", "-o", "scheduler=local_docker", "-o", "image=x", "--", "true")
    assert done.returncode == 2
    assert "torchx refused the job: TorchX's local_docker does not answer" in done.stderr
    (value,) = [launcher.status(path.name) for path in launcher.root.glob("2*")]
    assert value["state"] == "failed"


def test_apps_are_known_by_their_names():
    assert schedulers._name("gpu-queue:llmops-k3x7-1a2b3c4d-qwerty") == "llmops-k3x7-1a2b3c4d"
    assert schedulers._name("llmops-k3x7-1a2b3c4d-qwerty") == "llmops-k3x7-1a2b3c4d"
    assert schedulers._name("project:europe:llmops-k3x7-1a2b3c4d-q") == "llmops-k3x7-1a2b3c4d"


def test_a_run_store_that_is_no_folder(s3_url, tmp_path):
    own = {"XDG_STATE_HOME": str(tmp_path / "state"), "XDG_DATA_HOME": str(tmp_path / "data"), "WORD": "hello"}
    remote = Launcher(s3_url, "torchx", **own)
    run_id = remote.submit(*LOCAL, "-o", "nodes=2", "secrets=[WORD]", command=("sh", "-c", "echo $RANK ${#WORD}"))
    assert remote.wait(run_id, "finished")["attempts"][0]["reason"] == "finished"
    assert sorted(remote.ok("logs", run_id).split("\n")[:2]) == ["[0/0] 0 5", "[0/1] 1 5"]


def test_replica_0_says_where_others_reach_it():
    assert address("10.1.2.3") == "10.1.2.3"
    ipaddress.ip_address(address(""))
    ipaddress.ip_address(address("localhost"))  # as MCAD calls replica 0 to itself
