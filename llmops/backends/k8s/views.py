"""What a workload, its pods and, where these say nothing, its events mean: the state of a job."""

from __future__ import annotations

import calendar
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.backends.k8s import pods as pod_words
from llmops.backends.k8s.explain import one_line
from llmops.backends.k8s.resources import JobId
from llmops.job import JobState, JobView

Object = Mapping[str, Any]

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_DONE = {"job": "Complete", "jobset": "Completed", "pytorchjob": "Succeeded", "trainjob": "Complete"}
# Events that tell why there is no pod, or why one does not start. Their type is Warning or Normal as it comes.
_TELLING = ("FailedCreate", "FailedCreatePod", "FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")


def view(job: JobId, workload: Object | None, pods: Sequence[Object], events: Sequence[Object] = ()) -> JobView:
    """The state of one job. ``workload``: None where the server has none; ``pods``: its own, older ones included."""
    latest = newest(pods)
    alive = [pod for pod in latest if not pod_words.over(pod)]
    if workload is None:
        if alive:
            return JobView(str(job), "completing", f"it is deleted; {_pods(len(alive))} still stopping")
        return JobView(str(job), "gone", "Kubernetes knows no such job")
    state, reason = _state(job, workload, latest, alive, events)
    return JobView(str(job), state, reason, None if state == "pending" else start(workload, latest), images(latest))


def wants_events(job: JobId, workload: Object | None, pods: Sequence[Object]) -> bool:
    """Whether only events can say what it waits for: a pod was not made, or is being started."""
    if workload is None or suspended(workload) or ending(workload) or "deletionTimestamp" in workload["metadata"]:
        return False
    latest = newest(pods)
    return len(latest) < _expected(job.kind, workload) or any(pod_words.starting(pod) for pod in latest)


def _state(
    job: JobId, workload: Object, latest: Sequence[Object], alive: Sequence[Object], events: Sequence[Object]
) -> tuple[JobState, str]:
    if "deletionTimestamp" in workload["metadata"]:
        return "completing", f"being deleted; {_pods(len(alive))} still there"
    ended = ending(workload)
    if ended is not None:
        finished = ended["type"] == _DONE[job.kind]
        if alive:
            return "completing", f"{'finished' if finished else 'failed'}; {_pods(len(alive))} still stopping"
        return ("finished", "") if finished else ("failed", failure(ended, latest))
    if suspended(workload):
        told = held(workload)
        return "pending", f"{told}; {_pods(len(alive))} still stopping" if alive else told
    conditions = holding(workload)
    if "FailureTarget" in conditions or "SuccessCriteriaMet" in conditions:
        return "completing", f"{_pods(len(alive))} still stopping" if alive else ""
    running = sum(pod_words.runs(pod) for pod in latest)
    done = sum(pod["status"].get("phase") == "Succeeded" for pod in latest)
    expected = max(_expected(job.kind, workload), len(latest))
    told = _troubles(latest, expected, events)
    if done == expected:
        return "completing", "all pods have ended; its controller has still to say so"
    if running and running + done == expected:
        return "running", told
    if running:  # its supervisors wait for the rest, or stop
        return "pending", _counted(running, expected, told)
    if latest and not alive:
        return "pending", f"its pods have ended, and its controller restarts them or gives up; {told}".rstrip("; ")
    return "pending", told or "its pods are not made yet"


def _counted(running: int, expected: int, told: str) -> str:
    return f"{running} of {_pods(expected)} running" + (f"; {told}" if told else "")


def _troubles(latest: Sequence[Object], expected: int, events: Sequence[Object]) -> str:
    """What is wrong with the pods, the most frequent first; what events say where pods say nothing."""
    counts = Counter(told for pod in latest if (told := pod_words.trouble(pod)))
    event, words = happened(events), []
    for told, count in counts.most_common(3):
        many = f"{count} pods " if count > 1 else ""
        words.append(f"{many}{told}" + (f": {event}" if event and told == "starting" else ""))
    if event and len(latest) < expected:
        words.append(event)
    return "; ".join(words)


def happened(events: Sequence[Object]) -> str:
    """The newest event that tells why there is no pod or why it does not start."""
    telling = [event for event in events if event.get("reason") in _TELLING]
    if not telling:
        return ""
    newest = max(telling, key=_event_time)
    kind = str(newest["reason"])
    why = one_line(str(newest.get("message") or ""), pod_words.MAX_WHY)
    return f"no pod can be made: {why}" if kind.startswith("FailedCreate") and "Sand" not in kind else f"{kind}: {why}"


def _event_time(event: Object) -> str:
    """RFC 3339, of either style of event; without the fraction, so that both compare."""
    series = event.get("series") or {}
    told = event.get("lastTimestamp") or series.get("lastObservedTime") or event.get("eventTime")
    return str(told or event["metadata"].get("creationTimestamp") or "")[:19]


def failure(ended: Object, pods: Sequence[Object]) -> str:
    """The controller's reason, and what the pods that are left say."""
    reason, message = str(ended.get("reason") or ""), one_line(str(ended.get("message") or ""), pod_words.MAX_WHY)
    told = ": ".join(part for part in (reason, message) if part)
    words = Counter(word for pod in pods if (word := pod_words.trouble(pod)))
    return "; ".join([told, *(f"{count} × {word}" if count > 1 else word for word, count in words.most_common(2))])


def images(pods: Sequence[Object]) -> tuple[str, ...]:
    """What runs in the pods, by digest: more than one where the tag was moved in between."""
    statuses = (each for pod in pods for each in pod.get("status", {}).get("containerStatuses") or [])
    return tuple(sorted({str(each["imageID"]) for each in statuses if each.get("imageID")}))


def holding(workload: Object) -> dict[str, Object]:
    """The conditions that hold. One that no longer does stays in the list as False."""
    told = workload.get("status", {}).get("conditions") or []
    return {each["type"]: each for each in told if each.get("status") == "True"}


def ending(workload: Object) -> Object | None:
    """The condition that says that it is over. Failed first: Restarting may stay beside it."""
    conditions = holding(workload)
    names = ("Failed", "Complete", "Completed", "Succeeded")
    return next((conditions[name] for name in names if name in conditions), None)


def suspended(workload: Object) -> bool:
    spec = workload.get("spec", {})
    return bool(spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"))


def _expected(kind: str, workload: Object) -> int:
    """How many pods it should have at once."""
    spec = workload.get("spec", {})
    if kind == "job":
        return int(spec.get("parallelism") or 1)
    if kind == "trainjob":
        return int(spec.get("trainer", {}).get("numNodes") or 1)
    if kind == "pytorchjob":
        return sum(int(each.get("replicas") or 1) for each in (spec.get("pytorchReplicaSpecs") or {}).values())
    parts = spec.get("replicatedJobs") or []
    return sum(
        int(each.get("replicas") or 1) * int(each["template"].get("spec", {}).get("parallelism") or 1) for each in parts
    )


def held(workload: Object) -> str:
    """What a suspended workload waits for."""
    queue = workload["metadata"].get("labels", {}).get(QUEUE_LABEL)
    return f"waits in the queue {queue} (Kueue)" if queue else "suspended"


def newest(pods: Sequence[Object]) -> list[Object]:
    """Of each node of the job the newest pod: a controller may keep those that failed before.

    Of two that were made in one second, it is the one that is not over.
    """
    found: dict[str, Object] = {}
    for pod in sorted(pods, key=lambda pod: (str(pod["metadata"].get("creationTimestamp")), not pod_words.over(pod))):
        found[_place(pod)] = pod
    return [found[place] for place in sorted(found)]


def _place(pod: Object) -> str:
    metadata = pod["metadata"]
    labels = metadata.get("labels") or {}
    index = labels.get("batch.kubernetes.io/job-completion-index")
    if index is None:
        index = (metadata.get("annotations") or {}).get("batch.kubernetes.io/job-completion-index")
    if index is not None:
        return f"{labels.get('batch.kubernetes.io/job-name', '')}/{int(index):06d}"
    return str(metadata["name"])  # of a PyTorchJob: the same each time


def start(workload: Object, pods: Sequence[Object]) -> float | None:
    """When the first of its present pods came to a node; else what the controller says."""
    times = [pod.get("status", {}).get("startTime") for pod in pods]
    told = min((each for each in times if each), default=workload.get("status", {}).get("startTime"))
    return calendar.timegm(time.strptime(told, "%Y-%m-%dT%H:%M:%SZ")) if told else None


def _pods(count: int) -> str:
    return f"{count} pod" if count == 1 else f"{count} pods"
