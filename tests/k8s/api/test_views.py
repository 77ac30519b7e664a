"""Recorded pods, workloads, events and watches, and what people are told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmops.backends import k8s
from llmops.backends.k8s import pods
from llmops.backends.k8s.resources import POD_LABEL, JobId
from llmops.backends.k8s.views import view, wants_events
from llmops.job import JobView
from tests.k8s.api import recorded
from tests.k8s.api.server import ApiServer

# By recording of a pod: what is wrong with it, from the beginning of the line.
PODS = {
    "running": "",
    "running-restarted": "",
    "succeeded": "",
    "pending-ContainerCreating": "starting",
    "init-running": "starting",
    "pending-gated": "held back by a scheduling gate (example.com/wait)",
    "pending-unsched-gpu": "unschedulable: 0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
    "pending-unsched-pvc": 'unschedulable: 0/2 nodes are available: persistentvolumeclaim "nope" not found.',
    "pending-unsched-selector": "unschedulable: 0/2 nodes are available: 2 node(s) didn't match Pod's node affinity",
    "preemptor-nominated": "unschedulable: waits for others to leave node2; 0/2 nodes are available",
    "waiting-ErrImagePull": "its image localhost/nope:1 cannot be pulled (ErrImagePull): failed to pull",
    "waiting-ImagePullBackOff": "its image localhost/nope:1 cannot be pulled (ImagePullBackOff): Back-off",
    "waiting-InvalidImageName": "its image UPPER//x::y cannot be pulled (InvalidImageName): Failed to apply",
    "waiting-ErrImageNeverPull": "its image localhost/nope:1 cannot be pulled (ErrImageNeverPull): Container image",
    "waiting-CreateContainerConfigError": 'its container cannot be configured: secret "nope" not found',
    "waiting-CrashLoopBackOff": "ends again and again, 2 times so far: exit code 1",
    "init-failed": "exit code 4",
    "failed-exit3": "exit code 3",
    "failed-signal11": "exit code 139 (signal 11)",
    "failed-OOMKilled": "out of memory: killed at its memory limit (OOMKilled)",
    "failed-Evicted": 'evicted by its node: Usage of EmptyDir volume "d" exceeds the limit "1Mi".',
    "failed-DeadlineExceeded": "over its deadline (activeDeadlineSeconds): Pod was active on the node longer",
    "failed-StartError": "its command cannot be started: failed to create containerd task",
    "failed-termination-message": "exit code 1: cause: loss is NaN",
    "failed-termination-message-from-log": "exit code 1: Traceback (most recent call last): File",
    "disruptiontarget-eviction": "evicted (its node is drained",
    "disruptiontarget-preemption": "preempted by pods of higher priority",
    "terminating": "being stopped",
    "terminating-killed": "exit code 137 (signal 9)",
    "delete-pending": "being stopped",
}
NO_PODS = "its pods are not made yet"
# By recording of a workload, without its pods.
WORKLOADS = {
    "jobs/just-created": ("pending", NO_PODS),
    "jobs/status-running": ("pending", NO_PODS),
    "jobs/status-resumed": ("pending", NO_PODS),  # its condition Suspended is there, and False
    "jobs/status-suspended": ("pending", "suspended"),
    "jobs/status-complete": ("finished", ""),
    "jobs/status-complete-SuccessPolicy": ("finished", ""),
    "jobs/status-resumed-complete": ("finished", ""),
    "jobs/status-failed-BackoffLimitExceeded": ("failed", "BackoffLimitExceeded: Job has reached the specified"),
    "jobs/status-failed-DeadlineExceeded": ("failed", "DeadlineExceeded: Job was active longer than"),
    "jobs/status-failed-FailedIndexes": ("failed", "FailedIndexes: Job has failed indexes"),
    "jobs/status-failed-MaxFailedIndexesExceeded": ("failed", "MaxFailedIndexesExceeded: "),
    "jobs/status-failed-PodFailurePolicy": ("failed", "PodFailurePolicy: Container c for pod rec-jobs/pfp-gt97q"),
    "pytorchjob/just-created": ("pending", NO_PODS),  # it has no status at all
    "pytorchjob/status-Running": ("pending", NO_PODS),
    "pytorchjob/status-Restarting": ("pending", NO_PODS),
    "pytorchjob/status-suspended": ("pending", "suspended"),
    "pytorchjob/status-Succeeded": ("finished", ""),
    "pytorchjob/status-Succeeded-resumed": ("finished", ""),
    "pytorchjob/status-Failed": ("failed", "PyTorchJobFailed: PyTorchJob pn is failed because 1 Worker replica(s)"),
    "pytorchjob/status-Failed-exitcode": ("failed", 'PyTorchJobFailed: job "pe" is failing because "Worker"'),
    "pytorchjob/status-Failed-backofflimit": ("failed", "PyTorchJobFailed: Job pf has failed because it has reached"),
    "jobset/status-running": ("pending", NO_PODS),
    "jobset/status-restarting": ("pending", NO_PODS),
    "jobset/status-suspended": ("pending", "suspended"),
    "jobset/status-completed": ("finished", ""),
    "jobset/status-failed-rule": ("failed", "FailJobSetFailurePolicyAction: applying FailJobSet"),
    "jobset/status-failed-max-restarts": ("failed", "ReachedMaxRestarts: jobset failed due to reaching max"),
    "trainjob/status-running": ("pending", NO_PODS),
    "trainjob/status-suspended": ("pending", "suspended"),
    "trainjob/status-complete": ("finished", ""),
    "trainjob/status-failed": ("failed", "FailedJobs: jobset failed due to one or more job failures"),
}


def job_of(workload: dict[str, Any]) -> JobId:
    metadata = workload["metadata"]
    return JobId("prod", metadata["namespace"], workload["kind"].lower(), metadata["name"])


@pytest.mark.parametrize("name", PODS)
def test_a_pods_trouble_in_words(name: str) -> None:
    told = pods.trouble(recorded.body(f"pods/{name}"))
    assert told == PODS[name] if not PODS[name] else told.startswith(PODS[name])
    assert len(told) < 400


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workloads_state(name: str) -> None:
    workload = recorded.body(name)
    told = view(job_of(workload), workload, [])
    state, reason = WORKLOADS[name]
    assert (told.state, told.reason[: len(reason)]) == (state, reason)
    assert bool(told.reason) == bool(reason)


def states(workload: str, its_pods: str) -> JobView:
    item = recorded.body(workload)
    return view(job_of(item), item, recorded.items(its_pods))


def test_pods_decide_whether_it_runs() -> None:
    for workload, its_pods in (
        ("jobs/status-running", "jobs/pods-of-job-running"),
        ("trainjob/status-running", "trainjob/pods"),
        ("pytorchjob/status-Running", "pytorchjob/pods-running"),
    ):
        told = states(workload, its_pods)
        assert (told.state, told.reason) == ("running", "")
        assert told.start_time is not None
    assert states("jobset/status-running", "jobset/pods").state == "completing"
    # A rank that is done does not make the others wait for it.
    assert states("pytorchjob/status-Running", "pytorchjob/pods").state == "running"
    failed = states("jobset/status-restarting", "jobset/pods-after-failed")
    assert failed.state == "pending"
    assert failed.reason.endswith("restarts them or gives up; exit code 3")


def test_a_failed_pytorchjob_whose_master_runs_on_is_not_over() -> None:
    told = states("pytorchjob/status-Failed", "pytorchjob/pods-after-Failed")
    assert told.state in ("completing", "failed")
    running = {**recorded.body("pods/running")}
    item = recorded.body("pytorchjob/status-Failed")
    told = view(job_of(item), item, [running])
    assert (told.state, told.reason) == ("completing", "failed; 1 pod still stopping")


def test_the_newest_pod_of_each_node_counts() -> None:
    """A Job keeps the pods that failed; what failed before the one that runs is history."""
    running = recorded.items("jobs/pods-of-job-running")
    old = recorded.body("pods/failed-OOMKilled")
    metadata = {**old["metadata"], "labels": running[0]["metadata"]["labels"]}
    metadata["creationTimestamp"] = "2026-01-01T00:00:00Z"
    item = recorded.body("jobs/status-running")
    told = view(job_of(item), item, [*running, {**old, "metadata": metadata}])
    assert (told.state, told.reason) == ("running", "")
    lost = {**old, "metadata": {**metadata, "creationTimestamp": "2027-01-01T00:00:00Z"}}
    told = view(job_of(item), item, [*running, lost])
    assert told.state == "pending"
    assert told.reason.startswith("1 of 2 pods running; out of memory")


def test_many_pods_with_one_trouble_are_one_line() -> None:
    waiting = recorded.body("pods/pending-unsched-gpu")
    item = recorded.body("jobs/status-running")
    its = [{**waiting, "metadata": {**waiting["metadata"], "name": f"p-{index}"}} for index in range(1000)]
    told = view(job_of(item), item, its)
    assert told.state == "pending"
    assert told.reason.startswith("1000 pods unschedulable: 0/2 nodes are available")
    assert len(told.reason) < 400


def test_a_queue_that_holds_it_back_is_named() -> None:
    item = recorded.body("jobs/status-suspended")
    item["metadata"] = {**item["metadata"], "labels": {"kueue.x-k8s.io/queue-name": "team-a"}}
    assert view(job_of(item), item, []).reason == "waits in the queue team-a (Kueue)"


MISSING_VOLUME = "pods/waiting-ContainerCreating-missing-configmap"
# Why there is no pod, or why one does not start: by workload, its pods and events.
EVENTS = [
    ("jobs/status-pods-refused", "", "events/job-nosa", "no pod can be made: Error creating: pods"),
    ("jobs/status-pods-refused", "", "events/job-nopc", "no pod can be made: Error creating: pods"),
    ("jobs/quota-job-status", "", "events/job-qj", "exceeded quota"),
    ("jobs/psa-job-status", "", "events/job-psa", "violates PodSecurity"),
    ("pytorchjob/stuck-pbt", "", "events/pytorchjob-pbt", "no pod can be made: "),
    ("jobs/status-running", MISSING_VOLUME, "events/pod-creating-missing-vol", "FailedMount"),
]


@pytest.mark.parametrize(("workload", "pod", "events", "words"), EVENTS)
def test_events_tell_what_pods_cannot(workload: str, pod: str, events: str, words: str) -> None:
    item, its = recorded.body(workload), [recorded.body(pod)] if pod else []
    assert wants_events(job_of(item), item, its)
    told = view(job_of(item), item, its, recorded.items(events))
    assert told.state == "pending"
    assert words in told.reason


def test_no_events_are_asked_for_when_the_pods_say_it() -> None:
    item = recorded.body("jobs/status-running")
    assert not wants_events(job_of(item), item, recorded.items("jobs/pods-of-job-running"))
    ended = recorded.body("jobs/status-complete")
    assert not wants_events(job_of(ended), ended, [])


# What each workload's watch says, in its order, with no pods known: it never jumps back from its end.
WATCHES = {
    "indexed-job-2pods.job": ["pending", "completing", "finished"],
    "job-backofflimit.job": ["pending", "completing", "failed"],
    "job-foreground-delete.job": ["pending", "completing"],
    "pytorchjob-2pods.pytorchjob": ["pending", "finished"],
    "pytorchjob-restart-exitcode.pytorchjob": ["pending", "finished"],
    "jobset-2pods.jobset": ["pending", "finished", "completing"],
    "jobset-restart.jobset": ["pending", "failed"],
    "trainjob-2nodes.trainjob": ["pending", "finished"],
}


@pytest.mark.parametrize("name", WATCHES)
def test_the_states_of_a_recorded_life(name: str) -> None:
    events = [event for event in recorded.watched(name)["events"] if event["type"] in ("ADDED", "MODIFIED")]
    seen = [view(job_of(event["object"]), event["object"], []).state for event in events]
    assert list(dict.fromkeys(seen)) == WATCHES[name]


def test_every_recorded_state_of_a_pod_can_be_told() -> None:
    """Of six lives: no state of a real pod is an exception, and it ends as it did."""
    for name in ("indexed-job-2pods", "job-foreground-delete", "pytorchjob-2pods", "jobset-2pods", "trainjob-2nodes"):
        told = [
            pods.trouble(event["object"])
            for event in recorded.watched(f"{name}.pods")["events"]
            if event["type"] in ("ADDED", "MODIFIED", "DELETED")
        ]
        assert {"", "starting"} & set(told)
        assert all(len(words) < 400 for words in told)


def test_a_look_replays_a_recorded_cluster(server: ApiServer, kubeconfig: Path) -> None:
    """Recorded objects in the double: states, and events of a Job that has no pods, by way of the verbs."""
    refused, running = recorded.body("jobs/status-pods-refused"), recorded.body("jobs/status-running")
    for item in (refused, running, *recorded.items("jobs/pods-of-job-running"), *recorded.items("events/job-nosa")):
        kind = {"apiVersion": "v1", "kind": "Event" if "involvedObject" in item else "Pod"}
        labels = {**item["metadata"].get("labels", {}), "app.kubernetes.io/managed-by": "llmops"}
        metadata = {**item["metadata"], "labels": labels, "namespace": "default"}
        server.store.put({**kind, **item, "metadata": metadata})
    ids = [str(JobId("prod", "default", "job", item["metadata"]["name"])) for item in (refused, running)]
    views = k8s.K8sBackend().look(ids).views
    assert views[ids[0]].state == "pending"
    assert "serviceaccount" in views[ids[0]].reason
    assert (views[ids[1]].state, views[ids[1]].reason) == ("running", "")
    assert [request.resource for request in server.requests] == ["batch/jobs", "/pods", "/events"]
    assert POD_LABEL["job"] in server.requests[1].query["labelSelector"]
