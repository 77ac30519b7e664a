"""The kinds of objects that a run is made of, where the API server serves them, and how their pods are found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from llmops.errors import UserError

MANAGED = "app.kubernetes.io/managed-by=llmops"


@dataclass(frozen=True)
class Resource:
    """One kind. ``group`` is empty for the core group."""

    group: str
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        """The path of its group and version."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    def path(self, namespace: str, name: str = "", sub: str = "") -> str:
        """Of the collection, of one object, or of a subresource of it."""
        parts = [self.root, "namespaces", quote(namespace, safe=""), self.plural]
        return "/".join(parts + [quote(part, safe="") for part in (name, sub) if part])


POD = Resource("", "v1", "pods", "Pod")
EVENT = Resource("", "v1", "events", "Event")
# By the name that `cluster.workload` has for them.
WORKLOADS = {
    "job": Resource("batch", "v1", "jobs", "Job"),
    "jobset": Resource("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet"),
    "pytorchjob": Resource("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob"),
    "trainjob": Resource("trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob"),
}
_KINDS = {
    (each.api_version, each.kind): each
    for each in (
        *WORKLOADS.values(),
        POD,
        Resource("", "v1", "configmaps", "ConfigMap"),
        Resource("", "v1", "services", "Service"),
        Resource("trainer.kubeflow.org", "v1alpha1", "trainingruntimes", "TrainingRuntime"),
        Resource("scheduling.volcano.sh", "v1beta1", "podgroups", "PodGroup"),
        Resource("scheduling.x-k8s.io", "v1alpha1", "podgroups", "PodGroup"),
    )
}
# The label by which each controller marks a workload's pods with its name. A TrainJob's JobSet has the TrainJob's name.
POD_LABEL = {
    "job": "batch.kubernetes.io/job-name",
    "jobset": "jobset.sigs.k8s.io/jobset-name",
    "pytorchjob": "training.kubeflow.org/job-name",
    "trainjob": "jobset.sigs.k8s.io/jobset-name",
}
ARRAY = "array"  # the workload of a job id: an Indexed Job of which each index is a run of its own
ARRAY_LABEL = "llmops.trials"  # of such a Job, with their number
INDEX = "batch.kubernetes.io/job-completion-index"  # label and annotation of an Indexed Job's pod


def resource_of(item: Mapping[str, Any]) -> Resource:
    """The kind of an object that is to be submitted."""
    key = (str(item.get("apiVersion")), str(item.get("kind")))
    if key not in _KINDS:
        known = ", ".join(sorted({kind for _, kind in _KINDS}))
        raise UserError(f"the manifest holds a {key[1]} of {key[0]}; llmops can submit: {known}")
    return _KINDS[key]


class JobId(NamedTuple):
    """What ``<context>/<namespace>/<workload>/<name>`` says, or ``…/array/<name>/<index>`` of one element of an array.

    ``context`` is empty for the cluster around us.
    """

    context: str
    namespace: str
    workload: str
    name: str
    kubeconfig: str = ""  # only where the config named one: the file that holds the context
    position: int | None = None  # of the element, in an array

    def __str__(self) -> str:
        where = quote(self.context, safe="@:+=,~ ") + (f"?{quote(self.kubeconfig, safe='')}" if self.kubeconfig else "")
        element = [] if self.position is None else [str(self.position)]
        return "/".join([where, self.namespace, self.workload, self.name, *element])

    @property
    def kind(self) -> str:
        """Its kind of object, a key of :data:`WORKLOADS`."""
        return "job" if self.workload == ARRAY else self.workload

    @property
    def resource(self) -> Resource:
        """Where its object is."""
        return WORKLOADS[self.kind]

    def element(self, index: int) -> JobId:
        """One element of an array. Another workload has one only: itself."""
        return self._replace(position=index) if self.workload == ARRAY else self

    @classmethod
    def parse(cls, text: str) -> JobId | None:
        """None for what is no job id of this backend."""
        parts = text.split("/")
        if len(parts) not in (4, 5) or parts[2] not in (*WORKLOADS, ARRAY) or not parts[3]:
            return None
        if len(parts) == 5 and (parts[2] != ARRAY or not re.fullmatch(r"0|[1-9][0-9]*", parts[4])):
            return None
        position = int(parts[4]) if len(parts) == 5 else None
        context, _, kubeconfig = parts[0].partition("?")
        return cls(unquote(context), parts[1], parts[2], parts[3], unquote(kubeconfig), position)
