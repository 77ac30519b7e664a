"""The validation that other tests rely on can fail."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests.k8s.manifests.build import WORKLOADS, at, objects
from tests.k8s.manifests.schemas import problems

POD = ("spec", "template", "spec")
CHILD = ("replicatedJobs", 0, "template", "spec")
MASTER = ("spec", "pytorchReplicaSpecs", "Master")
RUNTIME = ("spec", "template", "spec")
# What is broken: of which object, where, and what it is replaced by (None: removed).
TAMPERED: list[tuple[str, str, tuple[str | int, ...], Any]] = [
    ("job", "Job", ("spec", "completionsCount"), 2),
    ("job", "Job", ("spec", "completions"), "two"),
    ("job", "Job", ("spec", "template"), None),
    ("job", "Job", ("spec", "podFailurePolicy", "rules", 0, "action"), None),
    ("job", "Job", ("spec", "podFailurePolicy", "rules", 0, "onExitCodes", "values", 0), "77"),
    ("job", "Job", (*POD, "restart"), "Never"),
    ("job", "Job", (*POD, "containers", 0, "name"), None),
    ("job", "Job", (*POD, "containers", 0, "env", 0, "value"), 0),
    ("job", "Job", (*POD, "containers", 0, "volumeMounts", 0, "path"), "/x"),
    ("job", "Job", ("metadata", "label"), {}),
    ("job", "Job", ("metadata", "labels", "llmops.submission"), 0),
    ("job", "Service", ("spec", "selectors"), {}),
    ("job", "ConfigMap", ("binary"), {}),
    ("jobset", "JobSet", ("spec", "failurePolicy", "rules", 0, "action"), "GiveUp"),
    ("jobset", "JobSet", ("spec", "failurePolicy", "restartStrategy"), "Never"),
    ("jobset", "JobSet", ("spec", "failurePolicy", "rules", 0, "name"), None),
    ("jobset", "JobSet", ("spec", *CHILD, "parallel"), 2),
    ("jobset", "JobSet", ("spec", *CHILD, "template", "spec", "containers", 0, "images"), "x"),
    ("jobset", "JobSet", ("spec", *CHILD, "template", "metadata", "label"), {}),
    ("trainjob", "TrainJob", ("spec", "numNodes"), 2),
    ("trainjob", "TrainJob", ("spec", "runtimeRef", "name"), None),
    ("trainjob", "TrainingRuntime", (*RUNTIME, "failurePolicy", "maxRestart"), 2),
    ("trainjob", "TrainingRuntime", ("spec", "mlPolicy", "numNodes"), "two"),
    ("trainjob", "TrainingRuntime", (*RUNTIME, *CHILD, "podFailurePolicy", "rules", 0, "action"), None),
    ("pytorchjob", "PyTorchJob", ("spec", "pytorchReplicaSpecs"), None),
    ("pytorchjob", "PyTorchJob", ("spec", "runPolicy", "cleanPods"), "All"),
    ("pytorchjob", "PyTorchJob", (*MASTER, "replicas"), "1"),
    ("pytorchjob", "PyTorchJob", (*MASTER, "template", "spec", "containers", 0, "name"), None),
    ("pytorchjob", "PyTorchJob", (*MASTER, "template", "spec", "containers", 0, "env", 0, "valueOf"), {}),
]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_untouched_objects_are_valid(workload):
    for item in objects(workload, nodes=2).values():
        assert problems(item) == []


@pytest.mark.parametrize(("workload", "kind", "path", "value"), TAMPERED)
def test_a_broken_object_is_found_out(workload, kind, path, value):
    path = (path,) if isinstance(path, str) else path
    item = copy.deepcopy(objects(workload, nodes=2)[kind])
    target = at(item, path[:-1])
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    assert problems(item), json.dumps(item)[:500]


def test_a_second_item_of_the_same_key_is_found_out():
    item = objects("jobset")["JobSet"]
    volumes = item["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["volumes"]
    volumes.append(volumes[0])
    assert "two items have ['name']" in problems(item)[0]


def test_an_unknown_kind_is_found_out():
    assert problems({"apiVersion": "v2", "kind": "Job"}) == ["no schema for v2 Job"]
