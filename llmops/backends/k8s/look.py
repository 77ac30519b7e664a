"""One look at any number of jobs: a list of pods and a list for each kind of workload, for each namespace."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from llmops.backends.k8s.client import Api
from llmops.backends.k8s.elements import Elements
from llmops.backends.k8s.explain import ApiError
from llmops.backends.k8s.resources import (
    ARRAY,
    ARRAY_LABEL,
    EVENT,
    INDEX,
    MANAGED,
    POD,
    POD_LABEL,
    WORKLOADS,
    JobId,
)
from llmops.backends.k8s.views import view, wants_events
from llmops.job import JobView

FEW = 20  # up to so many jobs are asked for by name: a namespace may hold thousands of others

Object = Mapping[str, Any]


def look_at(api: Api, jobs: Sequence[JobId]) -> dict[str, JobView]:
    """Views by job id, of jobs in one namespace."""
    namespace = jobs[0].namespace
    workloads = {kind: _workloads(api, namespace, [job for job in jobs if job.kind == kind]) for kind in kinds(jobs)}
    pods: dict[tuple[str, str], list[Object]] = {}
    for pod in api.list(POD, namespace, _selector(jobs))[0]:
        for kind in workloads:
            name = pod["metadata"].get("labels", {}).get(POD_LABEL[kind])
            if name:
                pods.setdefault((kind, name), []).append(pod)
    found = {job: (workloads[job.kind].get(job.name), pods.get((job.kind, job.name), [])) for job in jobs}
    whole = {job: its for job, its in found.items() if job.position is None}
    arrays: dict[str, list[JobId]] = {}
    for job in found:
        if job.position is not None:
            arrays.setdefault(job.name, []).append(job)
    elements = {name: Elements(*found[members[0]]) for name, members in arrays.items()}
    asking = {job.name for job, (workload, its) in whole.items() if wants_events(job, workload, its)}
    asking |= {name for name, members in arrays.items() if elements[name].wants_events(members)}
    events = _events(api, namespace, asking) if asking else {}
    views = {str(job): view(job, *its, events.get(job.name, ())) for job, its in whole.items()}
    for name, members in arrays.items():
        views |= {str(job): elements[name].view(job, events.get(name, ())) for job in members}
    return views


def find_by_tag(api: Api, namespace: str, names: Mapping[str, str]) -> dict[str, JobId]:
    """Job ids by tag. ``names``: the tag by the name that its objects have, which no other submission's have."""
    found: dict[str, JobId] = {}
    for kind, resource in WORKLOADS.items():
        try:
            items = api.list(resource, namespace, MANAGED)[0]
        except ApiError as error:
            if error.unserved or (error.status == 403 and "." in resource.group):
                continue  # a kind that is not installed, which a restricted user is told as forbidden
            raise
        for item in items:
            name = str(item["metadata"]["name"])
            if name in names:
                workload = ARRAY if ARRAY_LABEL in item["metadata"]["labels"] else kind
                found[names[name]] = JobId(api.context, namespace, workload, name, api.kubeconfig)
    return found


def kinds(jobs: Iterable[JobId]) -> list[str]:
    """The kinds of workload among the jobs."""
    return list(dict.fromkeys(job.kind for job in jobs))


def _workloads(api: Api, namespace: str, jobs: Sequence[JobId]) -> dict[str, Object]:
    fields = f"metadata.name={jobs[0].name}" if len({job.name for job in jobs}) == 1 else ""
    try:
        items = api.list(jobs[0].resource, namespace, MANAGED, fields)[0]
    except ApiError as error:
        if not error.unserved:
            raise
        items = []  # the CRD was removed, and every object of it went along
    return {str(item["metadata"]["name"]): item for item in items}


def _selector(jobs: Sequence[JobId]) -> str:
    labels = {POD_LABEL[job.kind] for job in jobs}
    names = {job.name for job in jobs}
    if len(names) > FEW or len(labels) > 1:
        return MANAGED
    named = f"{MANAGED},{labels.pop()} in ({','.join(sorted(names))})"
    indexes = {job.position for job in jobs}
    if len(names) > 1 or len(indexes) > FEW or None in indexes:
        return named
    return f"{named},{INDEX} in ({','.join(sorted(map(str, indexes)))})"


def _events(api: Api, namespace: str, names: Collection[str]) -> dict[str, list[Object]]:
    """What is told of the jobs' objects. All their names begin with the job's, which ends with a random part."""
    try:
        items = api.list(EVENT, namespace, fields="type=Warning")[0]
    except ApiError as error:
        if error.status != 403:
            raise
        return {}  # a state without its reason is better than none
    told: dict[str, list[Object]] = {}
    for event in items:
        about = str(event.get("involvedObject", {}).get("name"))
        parts = about.split("-")
        for end in range(len(parts), 0, -1):
            name = "-".join(parts[:end])
            if name in names:
                told.setdefault(name, []).append(event)
                break
    return told
