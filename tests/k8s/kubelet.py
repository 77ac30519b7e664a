"""What a cluster does with a workload that the double of the API server has: its pods run, as processes of ours.

Commands and environments are those of the submitted objects; what pods and workloads report is put into the server.
"""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from llmops.agent.rundir import RunDir
from tests.agent.pods import Pods
from tests.k8s.api.server import ApiServer
from tests.k8s.api.store import KINDS, POD, Object, now

LABEL = {
    "Job": "batch.kubernetes.io/job-name",
    "JobSet": "jobset.sigs.k8s.io/jobset-name",
    "PyTorchJob": "training.kubeflow.org/job-name",
    "TrainJob": "jobset.sigs.k8s.io/jobset-name",
}
DONE = {"Job": "Complete", "JobSet": "Completed", "PyTorchJob": "Succeeded", "TrainJob": "Complete"}
INDEX = "batch.kubernetes.io/job-completion-index"


class Cluster(Pods):
    """Carries out the one workload of a server, or the one called ``name``. ``root``: for the output of the pods."""

    def __init__(self, server: ApiServer, kind: str, root: Path, name: str = "") -> None:
        self.server, self.kind_of = server, next(each for each in KINDS if each.kind == kind)
        self.rundir, self.root = RunDir(str(root)), root
        self.workload = kind.lower()
        self.pods: dict[int, subprocess.Popen[bytes]] = {}
        self.codes: list[tuple[int, int]] = []
        self.restarting = self.deleted = False
        self.state, self.name = "running", name
        self.name = name or self.object()["metadata"]["name"]
        self.nodes = sum(count for _, count in self._templates())

    def object(self) -> Object:
        """The workload."""
        objects = self.server.store.objects.items()
        return next(each for key, each in objects if key[0] == self.kind_of and self.name in ("", key[2]))

    def _templates(self) -> list[tuple[Object, int]]:
        """(pod template, pods) in the order of the nodes."""
        spec = self.object()["spec"]
        if self.kind_of.kind == "Job":
            return [(spec["template"], spec["completions"])]
        if self.kind_of.kind in ("JobSet", "TrainJob"):
            if self.kind_of.kind == "TrainJob":
                runtime = next(
                    each
                    for key, each in self.server.store.objects.items()
                    if key[0].kind == "TrainingRuntime" and key[2] == self.name
                )
                spec = runtime["spec"]["template"]["spec"]
            (each,) = spec["replicatedJobs"]
            return [(each["template"]["spec"]["template"], each["template"]["spec"]["completions"])]
        roles = spec["pytorchReplicaSpecs"]
        return [(roles[name]["template"], roles[name]["replicas"]) for name in ("Master", "Worker") if name in roles]

    def start(self, *nodes: int) -> Cluster:
        placed = [(template, index) for template, count in self._templates() for index in range(count)]
        for node in nodes or range(self.nodes):
            template, index = placed[node]
            pod = self._pod(node, template, index)
            self._drop(node)
            self.server.store.put(pod)
            (container,) = pod["spec"]["containers"]
            self.spawn(node, container["command"], dict(value(each, pod) for each in container["env"]))
        return self

    def _pod(self, node: int, template: Object, index: int) -> Object:
        kind = self.kind_of.kind
        labels = {**template["metadata"].get("labels", {}), LABEL[kind]: self.name}
        annotations = dict(template["metadata"].get("annotations", {}))
        if kind == "PyTorchJob":
            labels["training.kubeflow.org/replica-index"] = str(index)
        else:
            annotations[INDEX] = str(index)
        status = {"phase": "Running", "podIP": "127.0.0.1", "startTime": now(), "conditions": []}
        running = {"ready": True, "state": {"running": {"startedAt": now()}}, "imageID": "lab/train@sha256:0123"}
        status["containerStatuses"] = [{"name": "node", **running}]
        owner = {"uid": self.object()["metadata"]["uid"], "kind": kind, "name": self.name}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{self.name}-{node}",
                "labels": labels,
                "annotations": annotations,
                "ownerReferences": [{"apiVersion": self.kind_of.api_version, **owner}],
            },
            "spec": {**template["spec"], "nodeName": f"host{node}"},
            "status": status,
        }

    def _drop(self, node: int) -> None:
        key = (POD, "default", f"{self.name}-{node}")
        if key in self.server.store.objects:
            self.server.store.drop(*key)

    def control(self) -> None:
        """One pass: what was deleted is stopped, what has ended is reported."""
        objects = self.server.store.objects
        for node in list(self.pods):
            pod = objects.get((POD, "default", f"{self.name}-{node}"))
            if pod is not None and "deletionTimestamp" in pod["metadata"] and not pod.get("told"):
                pod["told"] = True
                self.pods[node].send_signal(signal.SIGTERM)
        gone = [key for key in objects if key[0] == self.kind_of and key[2] == self.name]
        if not gone or "deletionTimestamp" in objects[gone[0]]["metadata"]:
            self.deleted, self.restarting = True, False
        super().control()

    def _ended(self, node: int, code: int) -> None:
        if self.deleted:
            self._drop(node)
            return
        pod = self.server.store.objects[POD, "default", f"{self.name}-{node}"]
        phase = {"phase": "Failed" if code else "Succeeded"}
        ended = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": now()}}
        status = {**pod["status"], **phase, "containerStatuses": [{"name": "node", "ready": False, "state": ended}]}
        self.server.store.put({**pod, "apiVersion": "v1", "kind": "Pod", "status": status})
        super()._ended(node, code)
        if self.state != "running":
            kind = DONE[self.kind_of.kind] if self.state == "succeeded" else "Failed"
            condition = {"type": kind, "status": "True", "reason": "Test", "message": "", "lastTransitionTime": now()}
            item = self.object()
            self.server.store.put({**item, "status": {**item.get("status", {}), "conditions": [condition]}})


def value(variable: Object, pod: Object) -> tuple[str, str]:
    """A variable of the container, as the kubelet fills it in."""
    if "value" in variable:
        return variable["name"], re.sub(r"\$\$", "$", variable["value"])
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    found: Any
    if named := re.fullmatch(r"metadata\.(labels|annotations)\['(.*)'\]", path):
        found = pod["metadata"][named[1]][named[2]]
    else:
        section, name = path.split(".")
        found = pod[section][name]
    return variable["name"], str(found)
