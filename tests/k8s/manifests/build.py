"""Configurations and job specs to render, without a cluster and without composing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from llmops.backends.k8s import manifests
from llmops.config.schema import K8sCluster
from llmops.job import JobSpec, RetryPolicy, StopPolicy

WORKLOADS = ("job", "jobset", "pytorchjob", "trainjob")
POD_AT = {
    "Job": [("spec", "template")],
    "JobSet": [("spec", "replicatedJobs", 0, "template", "spec", "template")],
    "TrainingRuntime": [("spec", "template", "spec", "replicatedJobs", 0, "template", "spec", "template")],
    "PyTorchJob": [
        ("spec", "pytorchReplicaSpecs", "Master", "template"),
        ("spec", "pytorchReplicaSpecs", "Worker", "template"),
    ],
}


def cluster(**values: Any) -> K8sCluster:
    return msgspec.convert({"image": "lab/train:1.0", **values}, K8sCluster)


def spec(workload: str, of: K8sCluster, **values: Any) -> JobSpec:
    run_id = values.pop("run_id", "train-20260101-abcd")
    tag = f"{run_id}.0.0123abcd"
    fields: dict[str, Any] = {
        "run_id": run_id,
        "name": "train",
        "submission": 0,
        "tag": tag,
        "backend": "k8s",
        "run_url": f"s3://bucket/runs/{run_id}",
        "nodes": of.nodes,
        "ranks_per_node": of.ranks_per_node,
        "command": ["true"],
        "kind": "command",
        "python": of.python or "python3",
        "env": {},
        "secrets": [],
        "threads_per_rank": 1,
        "code_archive": None,
        "retry": RetryPolicy(3, 20, 2.0, 60.0),
        "stop": StopPolicy(20.5, 120.0, None, 1800.0),
        "options": {"workload": workload, "namespace": "team-a", "name": manifests.object_name(tag, run_id)},
    }
    return JobSpec(**{**fields, **values})


def text(
    workload: str,
    agent: Path | None = None,
    env: dict[str, str] | None = None,
    metrics: dict[str, Any] | None = None,
    **values: Any,
) -> str:
    """The rendered text of ``workload``, with ``values`` for keys of the cluster."""
    of = cluster(**values)
    return manifests.render(of, spec(workload, of, env=env or {}, metrics=metrics or {}), agent)


def objects(workload: str, agent: Path | None = None, **values: Any) -> dict[str, dict[str, Any]]:
    """The rendered objects by kind."""
    return {item["kind"]: item for item in manifests.load(text(workload, agent, **values))}


def at(value: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        value = value[part]
    return value


def pods(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """All pod templates, node 0's first."""
    return [
        at(found[kind], path)
        for kind, paths in POD_AT.items()
        for path in paths
        if kind in found and not (path[-2] == "Worker" and "Worker" not in found[kind]["spec"]["pytorchReplicaSpecs"])
    ]
