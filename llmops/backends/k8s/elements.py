"""The elements of an array: what an Indexed Job, and the pods of one of its indexes, say of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmops.backends.k8s import pods as pod_words
from llmops.backends.k8s import views
from llmops.backends.k8s.resources import INDEX, JobId
from llmops.job import JobState, JobView

Object = Mapping[str, Any]


def spans(text: str) -> set[int]:
    """The numbers of ``1,3-5``, as a Job's status has its completed and failed indexes."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def index_of(pod: Object) -> int | None:
    """Which element a pod is of."""
    metadata = pod["metadata"]
    told = (metadata.get("labels") or {}).get(INDEX, (metadata.get("annotations") or {}).get(INDEX))
    return None if told is None else int(told)


class Elements:
    """Those of one Job, read once for however many of them are asked about."""

    def __init__(self, workload: Object | None, pods: Sequence[Object]) -> None:
        self.workload = workload
        status = {} if workload is None else workload.get("status", {})
        self.completed = spans(str(status.get("completedIndexes") or ""))
        self.failed = spans(str(status.get("failedIndexes") or ""))
        self.active = int(status.get("active") or 0)
        self.parallel = 1 if workload is None else int(workload.get("spec", {}).get("parallelism") or 0)
        self.pods = {index: pod for pod in views.newest(pods) if (index := index_of(pod)) is not None}

    def wants_events(self, jobs: Iterable[JobId]) -> bool:
        """Whether only events can say what one of them waits for: its pod was not made, or is being started."""
        workload = self.workload
        if workload is None or views.suspended(workload) or views.ending(workload) or _deleted(workload):
            return False
        missing = self.active < self.parallel
        waiting = (self.pods.get(job.position or 0) for job in jobs if not self._over(job.position or 0))
        return any(missing if pod is None else pod_words.starting(pod) for pod in waiting)

    def view(self, job: JobId, events: Sequence[Object] = ()) -> JobView:
        """The state of one. ``events``: of the Job and of any of its pods."""
        index = job.position or 0
        pod = self.pods.get(index)
        state, reason = self._ended(index, pod) or self._open(job, pod, events)
        pods = [pod] if pod else []
        began = views.start({}, pods) if state != "pending" else None
        return JobView(str(job), state, reason, began, views.images(pods))

    def _over(self, index: int) -> bool:
        return index in self.completed or index in self.failed

    def _ended(self, index: int, pod: Object | None) -> tuple[JobState, str] | None:
        """What the Job says of an element that is over, or that it will never start; None for others."""
        workload, alive = self.workload, pod is not None and not pod_words.over(pod)
        if workload is None:
            return ("completing", "its job is deleted; its pod is still stopping") if alive else _GONE
        ended = views.ending(workload)
        if not (self._over(index) or ended or _deleted(workload)):
            return None
        if alive:
            return "completing", "its pod is still stopping"
        if index in self.completed:
            return "finished", ""
        if index in self.failed:
            return "failed", (pod_words.trouble(pod) if pod else "") or "it was given up"
        if ended:
            return "failed", views.failure(ended, [pod] if pod else [])
        return "gone", "its job is being deleted"

    def _open(self, job: JobId, pod: Object | None, events: Sequence[Object]) -> tuple[JobState, str]:
        workload = self.workload or {}
        if views.suspended(workload):
            return "pending", views.held(workload)
        if pod is None:
            if self.active >= self.parallel:
                return "pending", f"waits for its turn: {self.parallel} at a time"
            return "pending", _happened(job, events) or "its pod is not made yet"
        if pod_words.runs(pod):
            return "running", ""
        if pod["status"].get("phase") == "Succeeded":
            return "completing", "its pod has ended; its controller has still to say so"
        told = pod_words.trouble(pod)
        if pod_words.over(pod):
            return "pending", f"its pod has ended, and its controller restarts it or gives up; {told}".rstrip("; ")
        event = _happened(job, events) if told == "starting" else ""
        return "pending", f"{told}: {event}" if event else told


_GONE: tuple[JobState, str] = ("gone", "Kubernetes knows no such job")


def _deleted(workload: Object) -> bool:
    return "deletionTimestamp" in workload["metadata"]


def _happened(job: JobId, events: Sequence[Object]) -> str:
    """What events of the Job itself tell, or of this element's pods, which are named after both."""
    names = ((each, str(each.get("involvedObject", {}).get("name"))) for each in events)
    own = f"{job.name}-{job.position}-"
    return views.happened([event for event, about in names if about == job.name or about.startswith(own)])
