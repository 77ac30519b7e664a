"""One look at any number of jobs: a list of pods and a list for each kind of workload, for each namespace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmops.backends.k8s.client import Api
from llmops.backends.k8s.explain import ApiError
from llmops.backends.k8s.resources import EVENT, MANAGED, POD, POD_LABEL, WORKLOADS, JobId
from llmops.backends.k8s.views import view, wants_events
from llmops.job import JobView

FEW = 20  # up to so many jobs are asked for by name: a namespace may hold thousands of others

Object = Mapping[str, Any]


def look_at(api: Api, jobs: Sequence[JobId]) -> dict[str, JobView]:
    """Views by job id, of jobs in one namespace."""
    namespace = jobs[0].namespace
    workloads = {
        kind: _workloads(api, namespace, [job for job in jobs if job.workload == kind]) for kind in kinds(jobs)
    }
    pods: dict[tuple[str, str], list[Object]] = {}
    for pod in api.list(POD, namespace, _selector(jobs))[0]:
        for kind in workloads:
            name = pod["metadata"].get("labels", {}).get(POD_LABEL[kind])
            if name:
                pods.setdefault((kind, name), []).append(pod)
    found = {job: (workloads[job.workload].get(job.name), pods.get((job.workload, job.name), [])) for job in jobs}
    asking = [job for job, (workload, its) in found.items() if wants_events(job, workload, its)]
    events = _events(api, namespace, asking) if asking else {}
    return {str(job): view(job, *found[job], events.get(job, ())) for job in jobs}


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
                found[names[name]] = JobId(api.context, namespace, kind, name, api.kubeconfig)
    return found


def kinds(jobs: Iterable[JobId]) -> list[str]:
    """The kinds of workload among the jobs."""
    return list(dict.fromkeys(job.workload for job in jobs))


def _workloads(api: Api, namespace: str, jobs: Sequence[JobId]) -> dict[str, Object]:
    fields = f"metadata.name={jobs[0].name}" if len(jobs) == 1 else ""
    try:
        items = api.list(WORKLOADS[jobs[0].workload], namespace, MANAGED, fields)[0]
    except ApiError as error:
        if not error.unserved:
            raise
        items = []  # the CRD was removed, and every object of it went along
    return {str(item["metadata"]["name"]): item for item in items}


def _selector(jobs: Sequence[JobId]) -> str:
    labels = {POD_LABEL[job.workload] for job in jobs}
    if len(jobs) > FEW or len(labels) > 1:
        return MANAGED
    return f"{MANAGED},{labels.pop()} in ({','.join(sorted(job.name for job in jobs))})"


def _events(api: Api, namespace: str, jobs: Sequence[JobId]) -> dict[JobId, list[Object]]:
    """What is told of the jobs' objects. All their names begin with the job's, which ends with a random part."""
    try:
        items = api.list(EVENT, namespace, fields="type=Warning")[0]
    except ApiError as error:
        if error.status != 403:
            raise
        return {}  # a state without its reason is better than none
    told: dict[JobId, list[Object]] = {}
    names = {job.name: job for job in jobs}
    for event in items:
        about = str(event.get("involvedObject", {}).get("name"))
        parts = about.split("-")
        for end in range(len(parts), 0, -1):
            job = names.get("-".join(parts[:end]))
            if job is not None:
                told.setdefault(job, []).append(event)
                break
    return told
