"""Which kinds of workload an API server has, and what `auto` stands for."""

from __future__ import annotations

from llmops.backends.k8s.client import Api
from llmops.backends.k8s.explain import ApiError
from llmops.backends.k8s.resources import WORKLOADS


def serves(api: Api, workload: str) -> bool:
    """Whether the kind is served. Every authenticated user may ask, so no Role is needed."""
    resource = WORKLOADS[workload]
    try:
        found = api.get(resource.root)
    except ApiError as error:
        if error.status == 404:  # plain text where the group is absent, a Status where only the version is
            return False
        raise
    return any(each.get("name") == resource.plural for each in found.get("resources") or [])


def served(api: Api) -> list[str]:
    """Every kind of workload that the server has; the CRD alone does not prove that its operator runs."""
    return [workload for workload in WORKLOADS if serves(api, workload)]


def choose(api: Api) -> str:
    """What `auto` stands for: what most clusters have, else what needs no operator."""
    return "pytorchjob" if serves(api, "pytorchjob") else "job"
