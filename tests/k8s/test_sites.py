"""``llmops init`` and ``llmops doctor`` against the double of an API server, with objects that real schemas accept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from llmops.backends.k8s.client import Api
from llmops.cli.main import main
from llmops.config.compose import load_config
from llmops.config.schema import K8sCluster
from llmops.sites import k8s, k8s_checks
from tests.k8s.api import recorded
from tests.k8s.api.server import ApiServer
from tests.k8s.conftest import write_kubeconfig
from tests.k8s.manifests.schemas import problems
from tests.k8s.manifests.test_admin import everything

GPU_NODE = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
TAINT = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}


def node(name: str, gpus: int, labels: dict[str, str], *taints: dict[str, str]) -> dict[str, Any]:
    """A recorded node with other GPUs, labels and taints."""
    made = json.loads(json.dumps(recorded.items("discovery/nodes")[0]))
    made["metadata"] = {"name": name, "labels": {"kubernetes.io/os": "linux", **labels}}
    made["spec"] = {"taints": list(taints)} if taints else {}
    for which in ("capacity", "allocatable"):
        made["status"][which] = {**made["status"][which], "nvidia.com/gpu": str(gpus)}
        if not gpus:
            del made["status"][which]["nvidia.com/gpu"]
    return {"apiVersion": "v1", "kind": "Node", **made}


def storage_class(name: str, default: bool = False) -> dict[str, Any]:
    notes = {"annotations": {"storageclass.kubernetes.io/is-default-class": "true"}} if default else {}
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name, **notes},
        "provisioner": "nfs.csi.k8s.io",
    }


def queue(name: str, active: str = "True") -> dict[str, Any]:
    condition = {"type": "Active", "status": active, "message": "Can't submit new workloads to clusterQueue"}
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "LocalQueue",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterQueue": "gpus"},
        "status": {"conditions": [condition]},
    }


def quota(used: int, hard: int) -> dict[str, Any]:
    limits = {"requests.nvidia.com/gpu": str(hard)}
    status = {"hard": limits, "used": {"requests.nvidia.com/gpu": str(used)}}
    metadata = {"name": "team", "namespace": "default"}
    return {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": metadata,
        "spec": {"hard": limits},
        "status": status,
    }


def claim(name: str, mode: str) -> dict[str, Any]:
    spec = {"accessModes": [mode], "resources": {"requests": {"storage": "10Ti"}}}
    metadata = {"name": name, "namespace": "default"}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def priority(name: str, value: int, **more: Any) -> dict[str, Any]:
    return {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": name},
        "value": value,
        **more,
    }


FULL = [
    node("gpu1", 8, GPU_NODE, TAINT),
    node("gpu2", 8, GPU_NODE, TAINT, {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}),
    node("small", 4, {"nvidia.com/gpu.product": "NVIDIA-L40S"}),
    node("cpu", 0, {}),
    storage_class("fast", default=True),
    storage_class("slow"),
    queue("dead", "False"),
    queue("training"),
    quota(3, 16),
    claim("runs", "ReadWriteMany"),
    claim("scratch", "ReadWriteOnce"),
    priority("deadline", 1000),
    priority("spare", -10, preemptionPolicy="Never", globalDefault=True),
    priority("system-node-critical", 2000001000),
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-b"}},
]


@pytest.fixture
def full(server: ApiServer, kubeconfig: Path) -> ApiServer:
    """A cluster with all that is asked for."""
    for item in FULL:
        server.store.put(item)
    return server


@pytest.mark.parametrize("item", {item["kind"]: item for item in FULL}.values(), ids=lambda item: str(item["kind"]))
def test_what_the_double_is_given_a_real_server_would_take(item: dict[str, Any]) -> None:
    assert problems({key: value for key, value in item.items() if key != "status"}) == []


def role(server: ApiServer, kubeconfig: Path, *left_out: str) -> None:
    """The user has the Role of k8s/base and no more, without the verbs on some resources."""
    rules = [
        {**rule, "resources": [each for each in rule["resources"] if each not in left_out]}
        for rule in everything()["Role", "launcher"]["rules"]
    ]
    server.users["role-token"] = ("ada", rules)
    write_kubeconfig(kubeconfig, server.url, "role-token")


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the checks of this backend by name."""
    capsys.readouterr()
    code = main(["doctor", "--backend", "k8s", "--runs-url", "s3://bucket/runs", "--json", *arguments])
    found = json.loads(capsys.readouterr().out)
    return code, {check["name"]: check for check in found["checks"] if check["section"] == "kubernetes"}


@pytest.fixture
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the cluster is of interest here: neither torch nor the run store is asked."""
    from llmops.sites import doctor as module
    from llmops.sites import machine

    monkeypatch.setattr(module, "_stores", lambda *arguments: [])
    monkeypatch.setattr(machine, "gpus", lambda timeout: [])


def test_the_rights_that_are_asked_for_are_those_of_the_role() -> None:
    given = {
        (group, resource, verb)
        for rule in everything()["Role", "launcher"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    asked = {*k8s_checks.COMMON, *(right for each in k8s_checks.KINDS.values() for right in each)}
    assert {right for right in given if right[1] != "podgroups"} == asked
    for right in asked:
        assert problems(k8s.review("default", *right)) == []


@pytest.mark.usefixtures("no_store")
def test_a_cluster_in_order_has_nothing_to_do(full: ApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = doctor(capsys)
    assert (code, {check["result"] for check in checks.values()}) == (0, {"ok"})
    assert checks["version"]["found"] == "v1.36.2"
    assert checks["workloads"]["found"] == "job, jobset, pytorchjob, trainjob; auto takes pytorchjob"
    assert checks["queues"]["found"] == "dead (admits nothing), training; none is set (cluster.queue)"
    assert "2 nodes with 8 nvidia.com/gpu (NVIDIA-H100-80GB-HBM3)" in checks["GPUs"]["found"]
    assert "50 s to save and leave (checkpoint.save_seconds + 30)" in checks["grace period"]["found"]
    assert "same time" in checks["clock"]["found"]
    assert checks["quota"]["found"] == "3 of 16 nvidia.com/gpu are used in the namespace"


@pytest.mark.usefixtures("no_store")
def test_the_role_of_ours_suffices_and_what_is_not_shown_is_no_failure(
    full: ApiServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    role(full, kubeconfig)
    code, checks = doctor(capsys)
    assert code == 0
    assert {name for name, check in checks.items() if check["result"] != "ok"} == {"queues"}
    assert "may not be listed" in checks["queues"]["found"]
    assert "GPUs" not in checks


@pytest.mark.usefixtures("no_store")
def test_missing_rights_are_named_with_their_remedy(
    full: ApiServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    role(full, kubeconfig, "pods/log", "pytorchjobs", "jobsets")
    code, checks = doctor(capsys)
    assert code == 1
    assert checks["rights: all runs"]["result"] == "fail"
    assert checks["rights: all runs"]["found"] == "may not get pods/log"
    assert "kubectl apply -k k8s/base" in checks["rights: all runs"]["remedy"]
    assert checks["rights: pytorchjob"]["result"] == "fail"  # auto takes it
    assert "create pytorchjobs.kubeflow.org" in checks["rights: pytorchjob"]["found"]
    assert checks["rights: jobset"]["result"] == "warn"
    assert checks["rights: job"]["result"] == "ok"


@pytest.mark.usefixtures("no_store")
def test_queues_that_admit_nothing_and_gangs_that_may_not_be_made(
    full: ApiServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full.store.drop(*next(key for key in full.store.objects if key[2] == "training"))
    _, checks = doctor(capsys)
    assert checks["queues"]["result"] == "warn"
    assert checks["queues"]["found"].startswith("dead: Can't submit")
    role(full, kubeconfig, "podgroups")
    code, checks = doctor(capsys, "cluster.gang=volcano")
    assert (code, checks["rights: volcano"]["result"]) == (1, "fail")
    assert "create podgroups.scheduling.volcano.sh" in checks["rights: volcano"]["found"]


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize(
    ("arguments", "name", "result", "words"),
    [
        (["cluster.queue=nope"], "queues", "fail", "nope is not in default"),
        (["cluster.queue=dead"], "queues", "fail", "Can't submit new workloads"),
        (["cluster.gang=volcano"], "gangs", "ok", "volcano"),
        (["cluster.namespace=gone"], "dry run", "fail", "no namespace gone"),
        (["cluster.grace_s=600", "checkpoint.save_seconds=120"], "grace period", "ok", "600 s"),
        (["cluster.gpus_per_node=1", "cluster.gpu_resource=amd.com/gpu"], "GPUs", "fail", "nvidia.com/gpu"),
    ],
)
def test_a_configuration_is_held_against_the_cluster(
    full: ApiServer, capsys: pytest.CaptureFixture[str], arguments: list[str], name: str, result: str, words: str
) -> None:
    code, checks = doctor(capsys, *arguments)
    assert (checks[name]["result"], code) == (result, 1 if result == "fail" else 0)
    assert words in checks[name]["found"]
    assert bool(checks[name]["remedy"]) == (result == "fail")


@pytest.mark.usefixtures("no_store")
def test_an_old_server_without_operators_and_with_spot_nodes(
    full: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    full.version = {"major": "1", "minor": "28+", "gitVersion": "v1.28.9-gke.1"}
    full.absent |= {"kubeflow.org", "jobset.x-k8s.io", "trainer.kubeflow.org", "kueue.x-k8s.io"}
    full.store.put(node("spot", 8, {**GPU_NODE, "cloud.google.com/gke-spot": "true"}))
    full.store.put(quota(16, 16))
    code, checks = doctor(capsys, "checkpoint.save_seconds=40")
    assert code == 1
    assert checks["version"]["result"] == "fail"
    assert "older than 1.29" in checks["version"]["found"]
    assert checks["workloads"]["found"] == "job; auto takes job"
    assert checks["queues"]["found"].startswith("no Kueue")
    assert checks["grace period"]["result"] == "warn"
    assert checks["grace period"]["remedy"].startswith("set checkpoint.save_seconds=20")
    assert checks["quota"]["result"] == "warn"
    code, checks = doctor(capsys, "cluster.queue=training", "cluster.workload=jobset")
    assert (checks["queues"]["result"], checks["workloads"]["result"]) == ("fail", "fail")


@pytest.mark.usefixtures("no_store")
def test_a_server_that_does_not_answer_is_a_failed_check(
    server: ApiServer, kubeconfig: Path, dead_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_kubeconfig(kubeconfig, f"http://127.0.0.1:{dead_port}")
    code, checks = doctor(capsys)
    assert code == 1
    assert checks["API server"]["result"] == "fail"
    assert "does not answer" in checks["API server"]["found"]
    assert checks["API server"]["remedy"].startswith("check the network")
    write_kubeconfig(kubeconfig, server.url, "wrong-token")
    _, checks = doctor(capsys)
    assert "does not accept these credentials" in checks["API server"]["found"] + checks["rights"]["found"]


@pytest.mark.usefixtures("no_store")
def test_a_clock_that_is_wrong_is_told(
    server: ApiServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Api, "date", lambda self: "Tue, 03 Feb 2026 10:00:00 GMT")
    code, checks = doctor(capsys)
    assert (code, checks["clock"]["result"]) == (1, "fail")
    assert "behind this machine" in checks["clock"]["found"]


def written(tmp_path: Path, *arguments: str) -> tuple[Path, K8sCluster]:
    """Where init has written, and what a run would get of it."""
    path = tmp_path / "conf" / "cluster" / "prod.yaml"
    assert main(["init", "--backend", "k8s", "--output", str(path), *arguments]) == 0
    image = [] if "--image" in arguments else ["cluster.image=lab/train:1"]
    cluster = load_config(
        ["cluster=prod", "recipe=tiny", "train.micro_batch_size=1", *image], tmp_path / "conf"
    ).config.cluster
    assert isinstance(cluster, K8sCluster)
    return path, cluster


def test_init_writes_what_the_cluster_has(full: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cluster = written(tmp_path, "--image", "lab/train:1.0")
    assert (cluster.context, cluster.namespace, cluster.image) == ("prod", "default", "lab/train:1.0")
    assert (cluster.gpus_per_node, cluster.ranks_per_node, cluster.gpu_resource) == (8, 8, "nvidia.com/gpu")
    assert cluster.node_selector == GPU_NODE
    assert cluster.tolerations == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert cluster.queue == "training"
    text = path.read_text()
    for words in (
        '# workload: "jobset"',
        "# ranks_per_node: 4  # for 1 node\n# gpus_per_node: 4\n",
        '# priority_class: "deadline"  # 1000\n',
        '# priority_class: "spare"  # -10, the default, never preempts',
        '# mounts: [{"path": "/runs", "pvc": "runs"}]',
        "# fast  (nfs.csi.k8s.io, the default)",
        "# team: requests.nvidia.com/gpu 3 of 16",
        "others here: team-b",
    ):
        assert words in text
    assert "scratch" not in text
    assert "system-node-critical" not in text
    assert 'queue: "dead"' not in text
    out = capsys.readouterr().out
    assert f"llmops submit --config-dir {tmp_path}/conf cluster=prod" in out


def test_init_goes_by_what_an_ordinary_user_may_see(
    full: ApiServer, kubeconfig: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    role(full, kubeconfig)
    path, cluster = written(tmp_path)
    assert (cluster.gpus_per_node, cluster.queue, cluster.workload) == (None, None, "auto")
    text = path.read_text()
    assert "Nodes may not be listed here" in text
    assert "its queues may not be listed" in text
    assert "must be set" in text
    assert "cluster.image=IMAGE" in capsys.readouterr().out


def test_every_alternative_is_yaml_that_can_be_uncommented(full: ApiServer, tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    found = [
        yaml.safe_load(line.removeprefix("# "))
        for line in path.read_text().splitlines()
        if re.match(r'# [a-z_]+: ["\[{0-9]', line)
    ]
    assert len(found) >= 9
    known = yaml.safe_load(path.read_text())
    for alternative in found:
        assert alternative.keys() <= set(K8sCluster.__struct_fields__)
        values = {key: value for key, value in known.items() if key != "defaults"}
        msgspec.convert({"backend": "k8s"} | values | alternative, K8sCluster)


def test_init_without_a_server_writes_nothing(
    server: ApiServer, kubeconfig: Path, dead_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_kubeconfig(kubeconfig, f"http://127.0.0.1:{dead_port}")
    path = tmp_path / "conf" / "cluster" / "prod.yaml"
    assert main(["init", "--backend", "k8s", "--output", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not answer" in error
    assert not path.parent.exists()
