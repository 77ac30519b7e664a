"""Trials of one Indexed Job: their ids, what is told of each, and what it costs to ask."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from llmops.backends.k8s import K8sBackend
from llmops.backends.k8s.client import Api
from llmops.backends.k8s.elements import Elements, spans
from llmops.backends.k8s.look import find_by_tag
from llmops.backends.k8s.resources import INDEX, JobId
from llmops.errors import ClusterError
from llmops.job import JobView
from tests.k8s.api import recorded
from tests.k8s.api.server import ApiServer
from tests.k8s.api.store import POD
from tests.k8s.api.test_backend import role_rules, submission
from tests.k8s.api.test_submit import put_pods

NAME = "lr-0123abcd"
ARRAY = JobId("prod", "default", "array", NAME)


def job(**status: Any) -> dict[str, Any]:
    """An Indexed Job of 10 trials, 3 at a time."""
    spec = {"completions": 10, "parallelism": 3, "completionMode": "Indexed"}
    return {"metadata": {"name": NAME, "labels": {}}, "spec": spec, "status": status}


def pod(index: int, recording: str, created: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    """A recorded pod as one of an index."""
    found = recorded.body(f"pods/{recording}")
    labels = {"batch.kubernetes.io/job-name": NAME, INDEX: str(index)}
    metadata = {**found["metadata"], "labels": labels, "creationTimestamp": created}
    return {**found, "metadata": {**metadata, "name": f"{NAME}-{index}-abcde"}}


def told(index: int, workload: dict[str, Any] | None, *pods: dict[str, Any], events: tuple[Any, ...] = ()) -> JobView:
    return Elements(workload, pods).view(ARRAY.element(index), events)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prod/default/array/x-01/7", JobId("prod", "default", "array", "x-01", "", 7)),
        ("prod/default/array/x-01", JobId("prod", "default", "array", "x-01")),
        ("a%2Fb?%2Fhome%2Fme/ns/array/x/0", JobId("a/b", "ns", "array", "x", "/home/me", 0)),
    ],
)
def test_an_elements_id_says_which_it_is(text: str, expected: JobId) -> None:
    assert JobId.parse(text) == expected
    assert str(expected) == text
    assert expected.kind == "job"


@pytest.mark.parametrize("text", ["p/d/job/x/7", "p/d/array/x/", "p/d/array/x/-1", "p/d/array/x/1/2", "p/d/array//1"])
def test_what_is_no_elements_id(text: str) -> None:
    assert JobId.parse(text) is None


def test_a_workload_of_its_own_is_its_only_element() -> None:
    backend = K8sBackend()
    assert backend.element("prod/default/array/x", 3) == "prod/default/array/x/3"
    assert backend.element("prod/default/jobset/x", 0) == "prod/default/jobset/x"
    assert backend.element("1234", 0) == "1234"
    with pytest.raises(ClusterError, match="is no job id of Kubernetes"):
        backend.cancel(["1234"], graceful=False)


def test_the_spans_of_a_status() -> None:
    assert spans("") == set()
    assert spans("1,3-5,10") == {1, 3, 4, 5, 10}


def test_each_index_has_a_state_of_its_own() -> None:
    workload = job(active=2, completedIndexes="0-1", failedIndexes="2")
    lost, running = pod(3, "failed-OOMKilled"), pod(3, "running", "2026-01-01T00:00:09Z")
    states = {index: told(index, workload, pod(2, "failed-exit3"), running, lost) for index in (1, 2, 3, 4)}
    assert {index: view.state for index, view in states.items()} == {
        1: "finished", 2: "failed", 3: "running", 4: "pending",
    }  # fmt: skip
    assert states[2].reason == "exit code 3"
    assert states[4].reason == "its pod is not made yet"
    assert states[3].start_time is not None
    assert states[4].start_time is None
    assert told(4, job(active=3)).reason == "waits for its turn: 3 at a time"


@pytest.mark.parametrize(
    ("recording", "state", "words"),
    [
        ("succeeded", "completing", "its controller has still to say so"),
        ("failed-OOMKilled", "pending", "restarts it or gives up; out of memory"),
        ("terminating", "pending", "being stopped"),
        ("pending-unsched-gpu", "pending", "unschedulable: "),
        ("waiting-ImagePullBackOff", "pending", "cannot be pulled"),
    ],
)
def test_its_newest_pod_decides_until_the_job_does(recording: str, state: str, words: str) -> None:
    view = told(0, job(active=1), pod(0, recording))
    assert (view.state, words in view.reason) == (state, True)


def test_a_job_that_is_over_or_deleted_starts_no_more_elements() -> None:
    ended = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "too long"}
    over = job(completedIndexes="1", failedIndexes="2", conditions=[ended])
    assert told(1, over).state == "finished"
    assert (told(3, over).state, told(3, over).reason) == ("failed", "DeadlineExceeded: too long")
    assert told(3, over, pod(3, "running")).state == "completing"
    deleted = job()
    deleted["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert told(0, deleted, pod(0, "terminating")).state == "completing"
    assert told(5, deleted, pod(0, "terminating")).state == "gone"
    assert told(0, None, pod(0, "terminating")).state == "completing"
    assert told(0, None).state == "gone"


def test_a_recorded_job_with_one_failed_index() -> None:
    workload = recorded.body("jobs/status-failed-FailedIndexes")
    states = [Elements(workload, []).view(ARRAY.element(index)).state for index in range(3)]
    assert states == ["finished", "failed", "finished"]


def test_events_are_the_jobs_own_or_of_its_pods() -> None:
    def event(about: str, why: str) -> dict[str, Any]:
        named = {"involvedObject": {"name": about}, "reason": "FailedCreate", "message": why}
        return {**named, "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}}

    events = (event(NAME, "exceeded quota"), event(f"{NAME}-10-abcde", "of another"))
    assert told(1, job(active=1), events=events).reason == "no pod can be made: exceeded quota"
    assert Elements(job(active=1), []).wants_events([ARRAY.element(1)])
    assert not Elements(job(active=3), []).wants_events([ARRAY.element(1)])
    assert not Elements(job(active=1, completedIndexes="1"), []).wants_events([ARRAY.element(1)])


def test_a_thousand_elements_cost_a_list_of_jobs_and_one_of_pods(server: ApiServer, kubeconfig: Path) -> None:
    backend = K8sBackend()
    whole = backend.submit(submission(trials=1000, nodes=1))
    name = whole.rsplit("/", 1)[1]
    put_pods(server, "job", name, 400)
    ids = [backend.element(whole, index) for index in range(1000)]
    server.requests.clear()
    began = time.monotonic()
    views = backend.look(ids).views
    assert time.monotonic() - began < 10
    lists = [request.resource for request in server.requests]
    assert (lists.count("batch/jobs"), lists.count("/pods"), lists.count("/events")) == (1, 1, 1)
    assert [views[job_id].state for job_id in (ids[0], ids[399], ids[400])] == ["running", "running", "pending"]
    server.requests.clear()
    backend.look([ids[3], whole])
    backend.look([ids[3]])
    selectors = [r.query["labelSelector"] for r in server.requests if r.resource == "/pods"]
    assert INDEX not in selectors[0]
    assert selectors[1].endswith(f"{INDEX} in (3)")


def test_cancelling_an_element_asks_nothing_of_the_cluster(server: ApiServer, kubeconfig: Path) -> None:
    """Its supervisor sees the intent; a pod that is deleted would be made again, and may not be deleted either."""
    server.users["admin-token"] = ("launcher", role_rules())
    backend = K8sBackend()
    whole = backend.submit(submission(trials=4, nodes=1))
    put_pods(server, "job", whole.rsplit("/", 1)[1], 1)
    before = dict(server.store.objects)
    backend.cancel([backend.element(whole, 0)], graceful=False)
    assert server.store.objects == before
    backend.cancel([whole], graceful=False)
    assert all("deletionTimestamp" in each["metadata"] for key, each in server.store.objects.items() if key[0] == POD)


def test_the_lines_of_an_element_are_of_its_pods_alone(server: ApiServer, kubeconfig: Path) -> None:
    backend = K8sBackend()
    whole = backend.submit(submission(trials=20, nodes=1))
    name = whole.rsplit("/", 1)[1]
    put_pods(server, "job", name, 12)
    for index in (1, 11):
        server.log(f"{name}-{index}", f"2026-01-01T00:00:00Z of {index}\n".encode())
    assert [line.text for line in backend.logs(f"{whole}/1")] == ["of 1"]


def test_a_study_is_found_by_its_tag(server: ApiServer, kubeconfig: Path, api: Api) -> None:
    made = submission(trials=4, nodes=1)
    whole = K8sBackend().submit(made)
    assert whole.split("/")[2] == "array"
    assert K8sBackend().find(made.spec.tag) == whole
    assert find_by_tag(api, "default", {"other": "x"}) == {}
