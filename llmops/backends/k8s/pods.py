"""Why a pod does not run, or did not: its conditions and its containers' states, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmops.backends.k8s.explain import one_line

MAX_WHY = 300

Object = Mapping[str, Any]

_DISRUPTED = {
    "PreemptionByScheduler": "preempted by pods of higher priority",
    "EvictionByEvictionAPI": "evicted (its node is drained, or somebody asked for it)",
    "DeletionByTaintManager": "evicted: its node has a taint (lost or in maintenance)",
    "DeletionByPodGC": "removed: its node is gone",
    "TerminationByKubelet": "evicted by its node (short of a resource, or shutting down)",
}
_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_STARTING = ("ContainerCreating", "PodInitializing", "")


def over(pod: Object) -> bool:
    """Whether its containers have ended for good."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def runs(pod: Object) -> bool:
    """Whether its containers run and nobody has asked it to stop."""
    started = any("running" in each.get("state", {}) for each in pod["status"].get("containerStatuses") or [])
    return pod["status"].get("phase") == "Running" and started and not stopping(pod)


def stopping(pod: Object) -> bool:
    """Whether it was deleted and is not gone yet: its phase does not say so."""
    return "deletionTimestamp" in pod["metadata"]


def starting(pod: Object) -> bool:
    """Whether it is on a node and its containers are being made; if that lasts, only events say why."""
    return trouble(pod) == "starting" and "deletionTimestamp" not in pod["metadata"]


def trouble(pod: Object) -> str:
    """What is wrong with it, or what it waits for. Empty for a pod that runs well or has succeeded."""
    status = pod.get("status", {})
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    disrupted = conditions.get("DisruptionTarget", {})
    if disrupted.get("status") == "True":
        reason = str(disrupted.get("reason"))
        return _DISRUPTED.get(reason) or f"disrupted ({reason}): {_short(disrupted)}"
    if status.get("phase") == "Failed" and status.get("reason"):
        return _failed(str(status["reason"]), _short(status))
    if stopping(pod) and status.get("phase") != "Failed":
        return "being stopped"
    for container in _containers(status):
        told = _ended(container) or _waits(container)
        if told:
            return told
    if status.get("phase") == "Failed":
        return "failed"
    if status.get("phase") != "Pending":
        return ""
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        if scheduled.get("reason") == "SchedulingGated":
            gates = ", ".join(gate["name"] for gate in pod.get("spec", {}).get("schedulingGates") or [])
            return f"held back by a scheduling gate ({gates})"
        nominated = status.get("nominatedNodeName")
        waits = f"waits for others to leave {nominated}; " if nominated else ""
        return f"unschedulable: {waits}{_short(scheduled)}"
    return "starting" if scheduled else "waits for the scheduler"


def _containers(status: Object) -> Iterable[Object]:
    """Init containers first: until they are through, the others only wait."""
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _failed(reason: str, message: str) -> str:
    words = {
        "Evicted": "evicted by its node",
        "DeadlineExceeded": "over its deadline (activeDeadlineSeconds)",
        "NodeLost": "its node is lost",
        "Terminated": "stopped because its node shuts down",
        "NodeShutdown": "stopped because its node shuts down",
    }.get(reason, reason)
    return f"{words}: {message}" if message else words


def _ended(container: Object) -> str:
    ended = container.get("state", {}).get("terminated")
    return termination(ended) if ended else ""


def termination(ended: Object) -> str:
    """A container's end in words; empty for success."""
    code, reason, message = ended.get("exitCode"), ended.get("reason"), _short(ended)
    if reason == "OOMKilled":
        return "out of memory: killed at its memory limit (OOMKilled); raise cluster.memory"
    if code == 0:
        return ""
    if reason in ("StartError", "ContainerCannotRun"):
        return f"its command cannot be started: {message}"
    told = f"exit code {code}"
    # A shell's way of saying it: Kubernetes has no field that is filled.
    told += f" (signal {code - 128})" if isinstance(code, int) and 128 < code < 160 else ""
    return f"{told}: {message}" if message else told


def _waits(container: Object) -> str:
    waiting = container.get("state", {}).get("waiting")
    if waiting is None:
        return ""
    reason, message = str(waiting.get("reason") or ""), _short(waiting)
    if reason in _STARTING:
        return "starting"
    if reason in _IMAGE:
        return f"its image {container.get('image')} cannot be pulled ({reason}): {message}"
    if reason == "CrashLoopBackOff":
        last = container.get("lastState", {}).get("terminated")
        why = termination(last) if last else ""
        return f"ends again and again, {container.get('restartCount')} times so far" + (f": {why}" if why else "")
    if reason == "CreateContainerConfigError":
        return f"its container cannot be configured: {message}"
    return f"{reason}: {message}" if message else reason


def _short(item: Object) -> str:
    return one_line(str(item.get("message") or ""), MAX_WHY)
