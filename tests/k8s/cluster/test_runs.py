"""Runs on a real cluster. What it needs is told in conftest.py; `make test-k8s` runs it."""

from __future__ import annotations

import pytest

from llmops.backends.k8s.resources import MANAGED, POD
from tests.k8s.cluster.conftest import Cluster

pytestmark = pytest.mark.k8s_cluster

START_S = 300.0  # images are there, but several controllers follow each other
STOP_S = 180.0
HELLO = "import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])"
# The first attempt waits to be disturbed.
WAITS = "import os, time; print('up', flush=True); time.sleep(1 if int(os.environ['LLMOPS_ATTEMPT']) else 900)"


def test_two_nodes_run_to_their_end(cluster: Cluster, workload: str) -> None:
    run_id = cluster.submit(workload, HELLO)
    value = cluster.launcher.wait(run_id, "finished", timeout=START_S)
    assert [attempt["reason"] for attempt in value["attempts"]] == ["finished"]
    output = cluster.launcher.ok("logs", run_id)
    assert "rank 0 of 2" in output
    assert "rank 1 of 2" in output
    cluster.wait(lambda: not cluster.pods("Running"), "no pod to run", STOP_S)


def test_a_program_that_fails_ends_failed_with_no_pod_left_running(cluster: Cluster, workload: str) -> None:
    program = "import os, sys, time; time.sleep(600 if os.environ['RANK'] == '0' else 1); sys.exit(3)"
    run_id = cluster.submit(workload, program, "retry.max_no_progress=2", "retry.backoff_s=1")
    value = cluster.launcher.wait(run_id, "failed", timeout=START_S)
    assert "exit code 3" in value["reason"]
    assert [attempt["reason"] for attempt in value["attempts"]] == ["failed", "failed"]
    cluster.wait(lambda: not cluster.pods("Running"), "no pod to run", STOP_S)


@pytest.mark.parametrize("disturbance", ["delete", "evict"])
def test_a_run_goes_on_when_a_pod_is_taken_away(cluster: Cluster, workload: str, disturbance: str) -> None:
    run_id = cluster.submit(workload, WAITS)
    cluster.launcher.wait(run_id, "running", timeout=START_S)
    cluster.wait(lambda: cluster.launcher.ok("logs", run_id).count("up") == 2, "both ranks to be up", START_S)
    victim = max(pod["metadata"]["name"] for pod in cluster.pods("Running"))
    path = POD.path(cluster.namespace, victim)
    if disturbance == "delete":
        cluster.api.delete(path, "Background")
    else:
        metadata = {"name": victim, "namespace": cluster.namespace}
        cluster.api.post(f"{path}/eviction", {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}, {})
    value = cluster.launcher.wait(run_id, "finished", timeout=START_S + STOP_S)
    assert [attempt["reason"] for attempt in value["attempts"]] == ["preempted", "finished"]
    cluster.wait(lambda: not cluster.pods("Running"), "no pod to run", STOP_S)


@pytest.mark.parametrize("how", [(), ("--graceful",)])
def test_a_cancelled_run_leaves_nothing(cluster: Cluster, workload: str, how: tuple[str, ...]) -> None:
    run_id = cluster.submit(workload, WAITS)
    name = cluster.launcher.status(run_id)["job_ids"][0].rsplit("/", 1)[1]
    cluster.launcher.wait(run_id, "running", timeout=START_S)
    cluster.launcher.ok("cancel", *how, run_id, timeout=START_S + STOP_S)
    cluster.launcher.wait(run_id, "cancelled", timeout=STOP_S)
    cluster.wait(lambda: not [each for each in cluster.left() if name in each], f"all of {name} to be gone", STOP_S)
    pods = [pod["metadata"]["name"] for pod in cluster.api.list(POD, cluster.namespace, MANAGED)[0]]
    assert [each for each in pods if each.startswith(name)] == []


def test_what_the_server_refuses_is_one_line_and_leaves_nothing(cluster: Cluster) -> None:
    before = sorted(cluster.left())
    patch = "cluster.patches={Job: {spec: {noSuchField: 1}}}"
    done = cluster.launcher.call(
        "submit", "--backend", "k8s", *cluster.overrides, "cluster.workload=job", patch, "--", "true"
    )
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0), done.stderr
    assert "noSuchField" in done.stderr
    assert sorted(cluster.left()) == before
