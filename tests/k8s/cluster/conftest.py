"""A namespace of the current kubeconfig's cluster, and what is run in it, by the environment:

LLMOPS_TEST_IMAGE        an image with a Python 3.9 or newer (required)
LLMOPS_TEST_RUNS_URL     the run store; a folder is mounted into the pods from the nodes (required)
LLMOPS_TEST_MOUNTS       cluster.mounts, where the folder is not on the nodes: [{path: /runs, pvc: runs}]
LLMOPS_TEST_PULL_POLICY  cluster.image_pull_policy; IfNotPresent by default
LLMOPS_TEST_WORKLOADS    kinds to test, "job jobset pytorchjob trainjob"; by default what the cluster serves
LLMOPS_TEST_OVERRIDES    further overrides, with blanks between them, e.g. cluster.security.run_as_user=0
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llmops.backends.k8s import client, discover
from llmops.backends.k8s.client import Api
from llmops.backends.k8s.resources import MANAGED, POD, WORKLOADS, Resource
from llmops.errors import ClusterError, UserError
from tests.launcher.harness import Launcher

NAMESPACES = "/api/v1/namespaces"


class Cluster:
    """One namespace of a real cluster, and the launcher that works on it."""

    def __init__(self, api: Api, namespace: str, launcher: Launcher, overrides: list[str]) -> None:
        self.api, self.namespace, self.launcher, self.overrides = api, namespace, launcher, overrides

    def submit(self, workload: str, program: str, *overrides: str) -> str:
        """A Python program on two nodes. Returns the run's id."""
        chosen = [*self.overrides, f"cluster.workload={workload}", "cluster.nodes=2", *overrides]
        return self.launcher.submit(*chosen, command=("python3", "-c", program))

    def pods(self, phase: str = "") -> list[dict[str, Any]]:
        """All pods of llmops in the namespace; ``phase``: only those."""
        found = self.api.list(POD, self.namespace, MANAGED)[0]
        return [pod for pod in found if phase in ("", pod["status"].get("phase"))]

    def wait(self, condition: Callable[[], Any], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            told = [(pod["metadata"]["name"], pod["status"].get("phase")) for pod in self.pods()]
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}; pods: {told}"
            time.sleep(1.0)

    def left(self) -> list[str]:
        """Objects of llmops in the namespace, without pods."""
        config_maps, services = Resource("", "v1", "configmaps", "ConfigMap"), Resource("", "v1", "services", "Service")
        kinds = [config_maps, services, *(WORKLOADS[kind] for kind in discover.served(self.api))]
        return [
            f"{kind.kind} {item['metadata']['name']}"
            for kind in kinds
            for item in self.api.list(kind, self.namespace, MANAGED)[0]
        ]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    image, runs_url = os.environ.get("LLMOPS_TEST_IMAGE"), os.environ.get("LLMOPS_TEST_RUNS_URL")
    if not image or not runs_url:
        pytest.skip("set LLMOPS_TEST_IMAGE and LLMOPS_TEST_RUNS_URL; tests/k8s/cluster/conftest.py says to what")
    try:
        context, _ = client.current(None, None)
        api = client.connect(context)
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "llmops-test-"}}
        namespace = str(api.post(NAMESPACES, body, {})["metadata"]["name"])
    except (ClusterError, UserError) as error:
        pytest.skip(f"no namespace can be made: {error}")
    try:
        mounts = os.environ.get("LLMOPS_TEST_MOUNTS") or (
            "[]" if "://" in runs_url else f"[{{path: '{runs_url}', host_path: '{runs_url}'}}]"
        )
        overrides = [
            f"cluster.image='{image}'",
            f"cluster.image_pull_policy={os.environ.get('LLMOPS_TEST_PULL_POLICY', 'IfNotPresent')}",
            f"cluster.namespace={namespace}",
            f"cluster.mounts={mounts}",
            "code.enabled=false",
            *os.environ.get("LLMOPS_TEST_OVERRIDES", "").split(),
        ]
        yield Cluster(api, namespace, Launcher(runs_url, "k8s"), overrides)
    finally:
        api.delete(f"{NAMESPACES}/{namespace}", "Background")


@pytest.fixture(params=list(WORKLOADS))
def workload(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """Each kind of workload that is wanted, or that the cluster has."""
    kind = str(request.param)
    wanted = os.environ.get("LLMOPS_TEST_WORKLOADS", "").replace(",", " ").split()
    if wanted and kind not in wanted:
        pytest.skip(f"LLMOPS_TEST_WORKLOADS does not name {kind}")
    if not wanted and not discover.serves(cluster.api, kind):
        pytest.skip(f"the cluster serves no {WORKLOADS[kind].plural}.{WORKLOADS[kind].group}")
    return kind
