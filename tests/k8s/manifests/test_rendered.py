"""What each workload's objects say, above all what their controllers make of an exit code."""

from __future__ import annotations

import base64
import copy
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llmops import api
from llmops.backends.k8s import manifests, resources
from llmops.errors import UserError
from llmops.launch import dry_run
from tests.k8s.manifests.build import WORKLOADS, at, objects, pods, text
from tests.k8s.manifests.schemas import problems

JOBSET_AT = {"jobset": ("JobSet", "spec"), "trainjob": ("TrainingRuntime", "spec", "template", "spec")}
CODES = {"operator": "In"}
DISRUPTED = {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def test_a_job_tells_a_stop_from_a_failure_from_giving_up():
    spec = objects("job", nodes=3)["Job"]["spec"]
    # The order counts: a pod that gives up while it is drained has given up.
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {**CODES, "values": [77]}},
        {"action": "Ignore", **DISRUPTED},
        {"action": "Ignore", "onExitCodes": {**CODES, "values": [75, 143]}},
    ]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    # With a plain backoffLimit every restart waits longer, ignored or not; per index it does not.
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (1000, 0)
    assert "backoffLimit" not in spec


@pytest.mark.parametrize("workload", JOBSET_AT)
def test_a_jobset_restarts_all_pods_and_counts_no_stop(workload):
    spec = at(objects(workload, nodes=3), JOBSET_AT[workload])
    policy = spec["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (1000, "BlockingRecreate")
    by_policy = {"onJobFailureReasons": ["PodFailurePolicy"]}
    giveup = {"onJobFailureMessagePatterns": ["exit code 77 "], **by_policy}
    assert policy["rules"] == [
        {"name": "giveup", "action": "FailJobSet", **giveup},
        {"name": "stopped", "action": "RestartJobSetAndIgnoreMaxRestarts", **by_policy},
    ]
    (group,) = spec["replicatedJobs"]
    job = group["template"]["spec"]
    assert (job["completions"], job["parallelism"], group["replicas"]) == (3, 3, 1)
    assert job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {**CODES, "values": [77]}},
        {"action": "FailJob", **DISRUPTED},
        {"action": "FailJob", "onExitCodes": {**CODES, "values": [75, 143]}},
    ]


def test_a_pytorchjob_has_a_master_and_leaves_no_pod_behind():
    spec = objects("pytorchjob", nodes=3)["PyTorchJob"]["spec"]
    roles = spec["pytorchReplicaSpecs"]
    assert {role: (each["replicas"], each["restartPolicy"]) for role, each in roles.items()} == {
        "Master": (1, "ExitCode"),
        "Worker": (2, "ExitCode"),
    }
    assert spec["runPolicy"] == {"cleanPodPolicy": "Running", "backoffLimit": 1000}
    assert list(objects("pytorchjob", nodes=1)["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def test_a_trainjob_uses_its_own_runtime():
    found = objects("trainjob", nodes=3, active_deadline_s=60)
    name = found["TrainJob"]["metadata"]["name"]
    assert found["TrainJob"]["spec"] == {
        "activeDeadlineSeconds": 60,
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
        "trainer": {"numNodes": 3},
    }
    (group,) = at(found, JOBSET_AT["trainjob"])["replicatedJobs"]
    assert group["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_pod_knows_which_node_it_is(workload):
    found = pods(objects(workload, nodes=2))
    numbers = []
    for pod in found:
        env = {each["name"]: each for each in pod["spec"]["containers"][0]["env"]}
        numbers.append(env["LLMOPS_FIRST_NODE"]["value"])
        label = "labels['training.kubeflow.org/replica-index']"
        index = "annotations['batch.kubernetes.io/job-completion-index']"
        expected = f"metadata.{label if workload == 'pytorchjob' else index}"
        assert env["LLMOPS_REPLICA"]["valueFrom"]["fieldRef"]["fieldPath"] == expected
        fields = {name: env[name]["valueFrom"]["fieldRef"]["fieldPath"] for name in ("LLMOPS_POD_IP", "LLMOPS_HOST")}
        assert fields == {"LLMOPS_POD_IP": "status.podIP", "LLMOPS_HOST": "spec.nodeName"}
    assert numbers == (["0", "1"] if workload == "pytorchjob" else ["0"])


@pytest.mark.parametrize("workload", WORKLOADS)
def test_pods_are_locked_down_and_never_restarted_in_place(workload):
    for pod in pods(objects(workload, nodes=2)):
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        # Rules on exit codes need Never; a PyTorchJob's own policy is beside its template, and one here is ignored.
        assert spec.get("restartPolicy") == (None if workload == "pytorchjob" else "Never")
        assert container["name"] == ("pytorch" if workload == "pytorchjob" else "node")
        assert spec["terminationGracePeriodSeconds"] == 51
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 65534,
            "fsGroup": 65534,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {"/tmp": "tmp", "/dev/shm": "shm", "/llmops": "agent"}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_supervisor_comes_along_unless_a_folder_has_it(workload):
    found = objects(workload)
    name = found["ConfigMap"]["metadata"]["name"]
    (pod, *_) = pods(found)
    assert {"name": "agent", "configMap": {"name": name}} in pod["spec"]["volumes"]
    archive = zipfile.ZipFile(io.BytesIO(base64.b64decode(found["ConfigMap"]["binaryData"]["agent.pyz"])))
    assert "llmops/agent/k8s.py" in archive.namelist()
    command = pod["spec"]["containers"][0]["command"]
    assert command == [
        *("python3", "/llmops/agent.pyz", "k8s", "--run", "s3://bucket/runs/train-20260101-abcd"),
        *("--submission", "0"),
    ]
    shared = objects(workload, Path("/runs/agent/x.pyz"), mounts=[{"path": "/runs", "pvc": "runs"}])
    assert "ConfigMap" not in shared
    assert pods(shared)[0]["spec"]["containers"][0]["command"][1] == "/runs/agent/x.pyz"


# A key of the configuration, and where its value is in the pod (a path), or in the workload ("/" first).
KEYS: list[tuple[dict[str, Any], tuple[str | int, ...], Any]] = [
    ({"cpus": "8"}, ("containers", 0, "resources"), {"requests": {"cpu": "8"}, "limits": {"cpu": "8"}}),
    ({"gpus_per_node": 8}, ("containers", 0, "resources", "limits"), {"nvidia.com/gpu": "8"}),
    ({"gpus_per_node": 1, "gpu_resource": "amd.com/gpu"}, ("containers", 0, "resources", "limits", "amd.com/gpu"), "1"),
    ({"resources": {"rdma/hca": "1"}}, ("containers", 0, "resources", "requests", "rdma/hca"), "1"),
    ({"image_pull_policy": "Never"}, ("containers", 0, "imagePullPolicy"), "Never"),
    ({"image_pull_secrets": ["reg"]}, ("imagePullSecrets",), [{"name": "reg"}]),
    ({"work_dir": "/app"}, ("containers", 0, "workingDir"), "/app"),
    ({"config_env": ["site"]}, ("containers", 0, "envFrom"), [{"configMapRef": {"name": "site"}}]),
    ({"node_selector": {"pool": "a100"}}, ("nodeSelector",), {"pool": "a100"}),
    ({"tolerations": [{"operator": "Exists"}]}, ("tolerations",), [{"operator": "Exists"}]),
    ({"priority_class": "high"}, ("priorityClassName",), "high"),
    ({"service_account": "trainer"}, ("serviceAccountName",), "trainer"),
    ({"scheduler": "mine", "gang": "volcano"}, ("schedulerName",), "mine"),
    ({"gang": "coscheduling"}, ("schedulerName",), "scheduler-plugins-scheduler"),
    ({"host_network": True}, ("dnsPolicy",), "ClusterFirstWithHostNet"),
    (
        {"metrics": {"enabled": True, "port": 9500}},
        ("containers", 0, "ports"),
        [{"name": "metrics", "containerPort": 9500}, {"name": "metrics-train", "containerPort": 9501}],
    ),
    ({"grace_s": 300}, ("terminationGracePeriodSeconds",), 300),
    ({"shm": "64Gi"}, ("volumes", 1, "emptyDir"), {"medium": "Memory", "sizeLimit": "64Gi"}),
    ({"mounts": [{"path": "/d", "memory": "1Gi"}]}, ("volumes", 3, "emptyDir", "sizeLimit"), "1Gi"),
    ({"mounts": [{"path": "/dev/shm", "memory": ""}]}, ("volumes", 2, "emptyDir"), {"medium": "Memory"}),
    ({"mounts": [{"path": "/d", "host_path": "/x"}]}, ("volumes", 3, "hostPath"), {"path": "/x"}),
    ({"mounts": [{"path": "/d", "empty_dir": ""}]}, ("volumes", 3, "emptyDir"), {}),
    ({"mounts": [{"path": "/d", "secret": "s"}]}, ("containers", 0, "volumeMounts", 3, "readOnly"), True),
    (
        {"mounts": [{"path": "/d", "pvc": "p", "name": "data", "sub_path": "a"}]},
        ("containers", 0, "volumeMounts", 3),
        {"name": "data", "mountPath": "/d", "subPath": "a"},
    ),
    ({"security": {"run_as_user": None, "seccomp": False}}, ("securityContext",), {"runAsNonRoot": True}),
    (
        {"security": {"add_capabilities": ["IPC_LOCK"]}},
        ("containers", 0, "securityContext", "capabilities"),
        {"drop": ["ALL"], "add": ["IPC_LOCK"]},
    ),
    (
        {"topology_spread": [{"maxSkew": 1, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}]},
        ("topologySpreadConstraints", 0, "labelSelector", "matchLabels"),
        manifests.labels("train-20260101-abcd", 0),
    ),
]


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize(("values", "path", "expected"), KEYS, ids=[str(case[0])[:60] for case in KEYS])
def test_every_key_has_its_place_in_every_pod(workload, values, path, expected):
    found = objects(workload, nodes=2, **values)
    assert [problem for item in found.values() for problem in problems(item)] == []
    for pod in pods(found):
        assert at(pod["spec"], path) == expected


def test_deadlines_queues_and_labels_of_the_workloads():
    values = {"active_deadline_s": 60, "ttl_s": 5, "queue": "q", "labels": {"team": "x"}, "annotations": {"a": "b"}}
    times = {"activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 5, "suspend": True}
    found = {workload: objects(workload, **values) for workload in ("job", "pytorchjob", "jobset")}
    assert times.items() <= found["job"]["Job"]["spec"].items()
    assert times.items() <= found["pytorchjob"]["PyTorchJob"]["spec"]["runPolicy"].items()
    jobset = found["jobset"]["JobSet"]["spec"]
    assert (jobset["suspend"], jobset["ttlSecondsAfterFinished"]) == (True, 5)
    # A JobSet has no deadline; its Job's would only restart it.
    assert jobset["replicatedJobs"][0]["template"]["spec"]["activeDeadlineSeconds"] == 60
    assert {"name": "deadline", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]} in jobset[
        "failurePolicy"
    ]["rules"]
    found["trainjob"] = objects("trainjob", **{**values, "ttl_s": None})
    for workload, items in found.items():
        assert [problem for item in items.values() for problem in problems(item)] == []
        metadata = items[resources.WORKLOADS[workload].kind]["metadata"]
        assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "q"
        for described in (metadata, pods(items)[0]["metadata"]):
            assert described["labels"]["team"] == "x"
            assert described["annotations"] == {"a": "b"}


def test_a_gang_is_placed_together():
    name = "train-abcd-0123abcd"
    for workload in ("job", "jobset", "pytorchjob"):
        found = objects(workload, nodes=2, gang="volcano")
        name = found["PodGroup"]["metadata"]["name"]
        assert found["PodGroup"]["spec"] == {"minMember": 2}
        assert pods(found)[-1]["metadata"]["annotations"] == {"scheduling.k8s.io/group-name": name}
        found = objects(workload, nodes=2, gang="coscheduling")
        assert found["PodGroup"]["apiVersion"] == "scheduling.x-k8s.io/v1alpha1"
        assert pods(found)[-1]["metadata"]["labels"]["scheduling.x-k8s.io/pod-group"] == name
    assert objects("trainjob", gang="volcano")["TrainingRuntime"]["spec"]["podGroupPolicy"] == {"volcano": {}}


def test_secrets_are_references():
    values: dict[str, Any] = {"secret_env": {"HF_TOKEN": {"secret": "hugging-face", "key": "token"}}}
    for workload in WORKLOADS:
        (pod, *_) = pods(objects(workload, **values))
        entry = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hugging-face", "key": "token"}}}
        assert entry in pod["spec"]["containers"][0]["env"]


def test_no_value_of_a_secret_is_in_the_text(tmp_path, monkeypatch):
    """By the way that `llmops submit` goes, with the secret in the environment of whoever submits."""
    monkeypatch.setenv("LLMOPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    secret = ["secrets=[HF_TOKEN]", "cluster.secret_env.HF_TOKEN={secret: hugging-face, key: token}"]
    for workload in WORKLOADS:
        overrides = ["cluster.image=lab/train:1.0", f"cluster.workload={workload}", *secret]
        prepared = api.prepare(overrides, backend="k8s", runs_url="s3://bucket/runs", command=["true"])
        shown = dry_run(prepared)
        assert "hf_0123456789" not in shown + prepared.composed.yaml_text
        assert "hugging-face" in shown


PATCHES = [  # the examples of RFC 7396 that patch an object, and what comes of them
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"a": "foo"}, {"a": {"b": {"c": None}}}, {"a": {"b": {}}}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("before", "patch", "after"), PATCHES)
def test_patches_are_json_merge_patches(before, patch, after):
    spec = objects("job", patches={"Job": {"spec": {"x": before}}})["Job"]["spec"]
    assert spec.get("x") == before
    kept = copy.deepcopy(before)
    assert manifests._merge(before, patch) == after
    assert before == kept


def test_patches_reach_their_kind_alone_and_no_reference():
    found = objects(
        "job",
        labels={"a": "b"},
        patches={"Service": {"metadata": {"labels": {"c": "d"}}}, "Job": {"spec": {"maxFailedIndexes": None}}},
    )
    assert found["Service"]["metadata"]["labels"]["c"] == "d"
    assert "c" not in found["Job"]["metadata"]["labels"]
    assert "maxFailedIndexes" not in found["Job"]["spec"]


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ({"metadata": {"name": "mine"}}, "cluster.patches.Job: the Job must keep its name"),
        ({"metadata": {"namespace": "other"}}, "and namespace"),
        ({"metadata": {"labels": {"llmops.run": None}}}, "must keep its label llmops.run"),
        ({"metadata": None}, "has no metadata"),
        ({"kind": "CronJob"}, "its last object must be the Job"),
    ],
)
def test_what_is_found_by_name_and_label_keeps_them(patch, expected):
    with pytest.raises(UserError) as caught:
        text("job", patches={"Job": patch})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_of_ones_own(tmp_path):
    mine = tmp_path / "mine.j2"
    shipped = (Path(__file__).parents[3] / "templates" / "job.yaml.j2").read_text()
    mine.write_text(shipped.replace("completionMode: Indexed", "completionMode: Indexed\n  manualSelector: false"))
    assert objects("job", template=str(mine))["Job"]["spec"]["manualSelector"] is False
    for content, expected in [
        ("a: [", "is not YAML"),
        ("a: b", "no Kubernetes object"),
        ("kind: ConfigMap", "its last object must be the Job"),
        ("{{ nosuch }}", "nosuch"),
    ]:
        mine.write_text(content)
        with pytest.raises(UserError) as caught:
            text("job", template=str(mine))
        assert str(mine) in str(caught.value)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
