"""What a Kubernetes cluster says of itself, as far as the user may ask; what may not be asked is None."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.backends.k8s.client import PAGE, Api
from llmops.backends.k8s.explain import ApiError

OLDEST = (1, 29)
MAX_NODES = 20 * PAGE
# Labels by which nodes name their GPUs: NVIDIA's and AMD's discovery, GKE, Karpenter.
GPU_LABELS = (
    "nvidia.com/gpu.product",
    "amd.com/gpu.product-name",
    "cloud.google.com/gke-accelerator",
    "karpenter.k8s.aws/instance-gpu-name",
)
# Nodes that their cloud takes back, and the seconds that it gives them, whatever a pod asks for.
SPOT = {
    ("cloud.google.com/gke-spot", "true"): 30,
    ("cloud.google.com/gke-preemptible", "true"): 30,
    ("kubernetes.azure.com/scalesetpriority", "spot"): 30,
    ("eks.amazonaws.com/capacityType", "SPOT"): 120,
    ("karpenter.sh/capacity-type", "spot"): 120,
}
_GPU = re.compile(r"^([a-z0-9-]+\.)+[a-z]+/(gpu|mig-.*|.*gpu.*|tpu)$")

Object = dict[str, Any]


def version(api: Api) -> tuple[str, tuple[int, int]]:
    """As it calls itself, and its two numbers."""
    told = api.get("/version")
    numbers = [re.match(r"\d+", str(told.get(key, ""))) for key in ("major", "minor")]
    major, minor = (int(each[0]) if each else 0 for each in numbers)
    return str(told.get("gitVersion") or f"{major}.{minor}"), (major, minor)


def groups(api: Api) -> dict[str, list[str]]:
    """API groups with their versions, the preferred one first."""
    found = {}
    for each in api.get("/apis").get("groups") or []:
        preferred = str((each.get("preferredVersion") or {}).get("version") or "")
        versions = [str(item["version"]) for item in each.get("versions") or []]
        found[str(each["name"])] = sorted(versions, key=lambda version: version != preferred)
    return found


def listed(api: Api, path: str) -> list[Object] | None:
    """All objects of a collection; None where the user may not list it, or it is not served."""
    items: list[Object] = []
    token = ""
    while True:
        try:
            page = api.get(path, {"limit": PAGE, **({"continue": token} if token else {})})
        except ApiError as error:
            if error.status in (403, 404):
                return None
            raise
        items += page.get("items") or []
        token = str((page.get("metadata") or {}).get("continue") or "")
        if not token or len(items) >= MAX_NODES:
            return items


def storage_classes(api: Api) -> list[Object] | None:
    """Belong to the whole cluster."""
    return listed(api, "/apis/storage.k8s.io/v1/storageclasses")


def priority_classes(api: Api) -> list[Object] | None:
    """Without the two of the system."""
    found = listed(api, "/apis/scheduling.k8s.io/v1/priorityclasses")
    return None if found is None else [each for each in found if not name(each).startswith("system-")]


def claims(api: Api, namespace: str) -> list[Object] | None:
    """Volumes of the namespace."""
    return listed(api, f"/api/v1/namespaces/{namespace}/persistentvolumeclaims")


def quotas(api: Api, namespace: str) -> list[Object] | None:
    """What the namespace may use."""
    return listed(api, f"/api/v1/namespaces/{namespace}/resourcequotas")


def namespaces(api: Api) -> list[Object] | None:
    """Most users may not list them."""
    return listed(api, "/api/v1/namespaces")


def nodes(api: Api) -> list[Object] | None:
    """Most users may not list them."""
    return listed(api, "/api/v1/nodes")


def queues(api: Api, namespace: str, known: Mapping[str, Sequence[str]]) -> list[Object] | None:
    """Kueue's local queues. None where there is no Kueue, or they may not be listed."""
    versions = known.get("kueue.x-k8s.io")
    if not versions:
        return None
    return listed(api, f"/apis/kueue.x-k8s.io/{versions[0]}/namespaces/{namespace}/localqueues")


def inactive(queue: Object) -> str:
    """Why a local queue admits nothing; empty when it does, or does not say."""
    for condition in (queue.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "Active" and condition.get("status") == "False":
            return str(condition.get("message") or condition.get("reason") or "not active")
    return ""


def gpus(found: Sequence[Object]) -> list[tuple[str, int, str, str, int]]:
    """(resource, GPUs of a node, label, its value, number of such nodes), the most numerous first; schedulable ones."""
    kinds: Counter[tuple[str, int, str, str]] = Counter()
    for node in found:
        if (node.get("spec") or {}).get("unschedulable"):
            continue
        labels = node["metadata"].get("labels") or {}
        label = next((key for key in GPU_LABELS if key in labels), "")
        for resource, count in ((node.get("status") or {}).get("allocatable") or {}).items():
            if _GPU.match(resource) and str(count).isdigit() and int(count) > 0:
                kinds[resource, int(count), label, str(labels.get(label, ""))] += 1
    return [(*kind, count) for kind, count in kinds.most_common()]


def quota_gpus(found: Sequence[Object]) -> dict[str, tuple[str, str]]:
    """GPU resources that quotas limit, with what is used and what is allowed."""
    limits = {}
    for each in found:
        status = each.get("status") or {}
        hard = status.get("hard") or (each.get("spec") or {}).get("hard") or {}
        for key, value in hard.items():
            resource = key.removeprefix("requests.").removeprefix("limits.")
            if _GPU.match(resource):
                limits[resource] = (str((status.get("used") or {}).get(key, "0")), str(value))
    return limits


def spot(found: Sequence[Object]) -> int | None:
    """The fewest seconds that a cloud leaves nodes that are here; None without such nodes."""
    marks = {pair for node in found for pair in (node["metadata"].get("labels") or {}).items()}
    given = [seconds for pair, seconds in SPOT.items() if pair in marks]
    return min(given) if given else None


def allowed(api: Api, namespace: str, rights: Sequence[tuple[str, str, str]]) -> list[bool]:
    """May the user do each of (group, resource, verb)? ``resource`` may end in ``/subresource``."""
    return [_may(api, namespace, *right) for right in rights]


def review(namespace: str, group: str, resource: str, verb: str) -> Object:
    """The question whether we may; everybody who is known may ask it."""
    plural, _, sub = resource.partition("/")
    what = {"namespace": namespace, "verb": verb, "group": group, "resource": plural}
    what |= {"subresource": sub} if sub else {}
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": what},
    }


def _may(api: Api, namespace: str, group: str, resource: str, verb: str) -> bool:
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    answer = api.post(path, review(namespace, group, resource, verb), {})
    return bool((answer.get("status") or {}).get("allowed"))


def name(item: Object) -> str:
    """Of an object."""
    return str(item["metadata"]["name"])


def count(nodes: int) -> str:
    """In words."""
    return "1 node" if nodes == 1 else f"{nodes} nodes"
