"""Submitting, looking, finding and cancelling against the double: no duplicates, nothing left behind, few requests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from llmops.backends import k8s
from llmops.backends.base import Ambiguous, Rejected
from llmops.backends.k8s import client
from llmops.backends.k8s.client import Api
from llmops.backends.k8s.look import find_by_tag
from llmops.backends.k8s.resources import POD_LABEL, WORKLOADS, JobId
from llmops.backends.k8s.submit import submit
from llmops.errors import ClusterError
from tests.k8s.api import recorded
from tests.k8s.api.server import ApiServer, Request
from tests.k8s.api.store import POD

NAME = "run-a-0a1b2c3d"
LABELS = {"app.kubernetes.io/managed-by": "llmops", "llmops.run": "run-a", "llmops.submission": "0"}


def objects(workload: str, name: str = NAME) -> list[dict[str, Any]]:
    """What is rendered for a workload, as far as these verbs look at it."""

    def made(api_version: str, kind: str, called: str, **spec: Any) -> dict[str, Any]:
        return {"apiVersion": api_version, "kind": kind, "metadata": {"name": called, "labels": LABELS}, **spec}

    resource = WORKLOADS[workload]
    found = [made("v1", "ConfigMap", f"{name}-agent", binaryData={})]
    if workload == "job":
        found.append(made("v1", "Service", name, spec={"clusterIP": "None"}))
    if workload == "trainjob":
        found.append(made(resource.api_version, "TrainingRuntime", name, spec={}))
    return [*found, made(resource.api_version, resource.kind, name, spec={"parallelism": 2})]


def stored(server: ApiServer) -> list[tuple[str, str]]:
    return sorted((kind.kind, name) for kind, _, name in server.store.objects)


def job_id(workload: str = "job", name: str = NAME) -> JobId:
    return JobId("prod", "default", workload, name)


def dry(request: Request) -> bool:
    return "dryRun" in request.query


def real(request: Request) -> bool:
    return not dry(request)


def creates(server: ApiServer, kind: str) -> list[Request]:
    """Requests that would really create."""
    return [r for r in server.requests if r.method == "POST" and r.resource.endswith(kind) and "dryRun" not in r.query]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_everything_is_tried_dry_and_then_owned_by_the_workload(server: ApiServer, api: Api, workload: str) -> None:
    submit(api, "default", objects(workload))
    dry = [request for request in server.requests if request.query.get("dryRun") == "All"]
    assert len(dry) == len(objects(workload))
    assert all(r.query["fieldValidation"] == "Strict" for r in server.requests if r.method == "POST")
    assert len(stored(server)) == len(objects(workload))
    owner = next(each for (kind, _, _), each in server.store.objects.items() if kind.kind == WORKLOADS[workload].kind)
    others = [each for each in server.store.objects.values() if each is not owner]
    assert {each["metadata"]["ownerReferences"][0]["uid"] for each in others} == {owner["metadata"]["uid"]}
    server.store.delete(*next(key for key, each in server.store.objects.items() if each is owner), "Foreground")
    assert stored(server) == []


REFUSALS = {
    "job": "invalid/job-unknown-field-strict",
    "jobset": "invalid/jobset-bad-successPolicy",
    "pytorchjob": "invalid/pytorchjob-name-dns1035",
    "trainjob": "invalid/trainjob-reserved-env",
}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_what_the_dry_run_refuses_leaves_nothing_behind(server: ApiServer, api: Api, workload: str) -> None:
    plural = WORKLOADS[workload].plural
    server.fail(recorded.raw(REFUSALS[workload]), method="POST", path=f"/{plural}$", test=dry)
    with pytest.raises(Rejected, match=r"is invalid|denied it"):
        submit(api, "default", objects(workload))
    assert stored(server) == []
    assert not creates(server, plural)


@pytest.mark.parametrize("how", ["invalid/pytorchjob-over-etcd-limit", "jobs/quota-pod-403"])
def test_what_only_the_create_refuses_leaves_nothing_behind(server: ApiServer, api: Api, how: str) -> None:
    server.fail(recorded.raw(how), times=99, method="POST", path="/jobs$", test=real)
    with pytest.raises((Rejected, Ambiguous)) as error:
        submit(api, "default", objects("job"))
    assert isinstance(error.value, Rejected)
    assert stored(server) == []


def test_what_cannot_be_removed_again_is_named(server: ApiServer, api: Api) -> None:
    server.fail(recorded.raw("jobs/quota-pod-403"), method="POST", path="/jobs$", test=real)
    server.fail((403, {}, b"{}"), times=99, method="DELETE", path="configmaps")
    with pytest.raises(Rejected, match=f"could not be removed again: ConfigMap {NAME}-agent"):
        submit(api, "default", objects("job"))
    assert stored(server) == [("ConfigMap", f"{NAME}-agent")]


@pytest.mark.parametrize("fault", ["lost", "reset", 500, 503, 429])
@pytest.mark.parametrize("plural", ["jobs", "configmaps"])
def test_a_create_without_an_answer_is_made_once(server: ApiServer, api: Api, fault: int | str, plural: str) -> None:
    server.fail(fault, times=2, method="POST", path=f"/{plural}$", test=real)
    submit(api, "default", objects("job"))
    assert stored(server) == [("ConfigMap", f"{NAME}-agent"), ("Job", NAME), ("Service", NAME)]
    if fault == "lost" and plural == "jobs":
        assert len(creates(server, "/jobs")) == 1  # it was looked up, and found


def test_a_create_that_nobody_can_ask_about_is_ambiguous(server: ApiServer, api: Api) -> None:
    """Then nothing is taken away: the job may be there and need it."""
    server.fail("lost", method="POST", path="/jobs$", test=real)
    server.fail("reset", times=999, path=f"/jobs/{NAME}")
    with pytest.raises(Ambiguous):
        submit(api, "default", objects("job"))
    assert len(creates(server, "/jobs")) == 1
    assert ("Job", NAME) in stored(server)
    assert ("ConfigMap", f"{NAME}-agent") in stored(server)


def test_a_server_that_goes_away_before_the_job_was_sent_has_none(server: ApiServer, api: Api) -> None:
    server.fail("reset", times=9999)
    with pytest.raises(Rejected, match="does not answer"):
        submit(api, "default", objects("job"))
    assert stored(server) == []


def test_submitting_twice_makes_one_job(server: ApiServer, api: Api) -> None:
    submit(api, "default", objects("job"))
    submit(api, "default", objects("job"))
    assert len(stored(server)) == 3


def test_a_name_that_is_being_deleted_is_not_ours(server: ApiServer, api: Api) -> None:
    server.fail(recorded.raw("jobs/create-during-foreground-delete"), method="POST", path="/jobs$")
    with pytest.raises(Rejected, match="being deleted"):
        submit(api, "default", objects("job"))


def test_cancel_deletes_in_the_foreground_and_takes_absence_for_done(server: ApiServer, kubeconfig: Path) -> None:
    backend = k8s.K8sBackend()
    submit(client.connect("prod"), "default", objects("job"))
    put_pods(server, "job", NAME, 1)
    backend.cancel([str(job_id())], graceful=True)
    assert server.requests[-1].body["propagationPolicy"] == "Foreground"
    view = backend.look([str(job_id())]).views[str(job_id())]
    assert (view.state, view.reason) == ("completing", "being deleted; 1 pod still there")
    server.store.drop(POD, "default", f"{NAME}-0")
    assert backend.look([str(job_id())]).views[str(job_id())].state == "gone"
    backend.cancel([str(job_id())], graceful=False)
    server.absent.add("kubeflow.org")
    with pytest.raises(ClusterError, match="the cancellation is recorded"):
        backend.cancel([str(job_id("pytorchjob"))], graceful=False)


def put_pods(server: ApiServer, workload: str, name: str, count: int, phase: str = "Running") -> None:
    owner = next((e for (k, _, n), e in server.store.objects.items() if n == name and k.kind.endswith(("Job", "Set"))))
    reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": name}
    reference["uid"] = owner["metadata"]["uid"]
    for index in range(count):
        labels = {**LABELS, POD_LABEL[workload]: name, "batch.kubernetes.io/job-completion-index": str(index)}
        metadata = {"name": f"{name}-{index}", "labels": labels, "ownerReferences": [reference]}
        states = [{"name": "node", "state": {"running": {}} if phase == "Running" else {"waiting": {}}}]
        status = {"phase": phase, "containerStatuses": states, "startTime": "2026-11-22T12:00:00Z"}
        server.store.put(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status, "spec": {"containers": states}}
        )


def test_any_number_of_jobs_costs_a_list_for_pods_and_one_for_each_kind(server: ApiServer, kubeconfig: Path) -> None:
    """1,000 pods of 100 jobs of two kinds: two pages of pods, and two lists."""
    ids = []
    for index in range(100):
        workload, name = ("job", "jobset")[index % 2], f"run-{index}-{index:08x}"
        server.store.put(objects(workload, name)[-1])
        put_pods(server, workload, name, 10)
        ids.append(str(job_id(workload, name)))
    began = time.monotonic()
    views = k8s.K8sBackend().look(ids).views
    assert time.monotonic() - began < 20
    assert [request.verb for request in server.requests] == ["list"] * 4
    assert [request.resource for request in server.requests].count("/pods") == 2
    assert {view.state for view in views.values()} == {"running"}
    server.requests.clear()
    k8s.K8sBackend().look(ids[:1])
    assert [request.resource for request in server.requests] == ["batch/jobs", "/pods"]
    assert "in (run-0-00000000)" in server.requests[1].query["labelSelector"]


def test_a_job_is_found_by_its_name_in_any_kind(server: ApiServer, api: Api) -> None:
    server.absent.add("trainer.kubeflow.org")
    server.store.put(objects("jobset")[-1])
    wanted = {NAME: "run-a.0.0a1b2c3d", "run-b-ffffffff": "run-b.0.ffffffff"}
    assert find_by_tag(api, "default", wanted) == {"run-a.0.0a1b2c3d": job_id("jobset")}


def test_who_does_not_answer_is_unreachable_and_hides_nobody(server: ApiServer, kubeconfig: Path) -> None:
    server.store.put(objects("job")[-1])
    gone = JobId("other", "default", "job", "x-00000000")
    views = k8s.K8sBackend().look([str(job_id()), str(gone), "12345"]).views
    assert views[str(job_id())].state == "pending"
    assert views[str(gone)].state == "unreachable"
    assert "other" in views[str(gone)].reason
    assert views["12345"].state == "unreachable"
    server.fail((403, *recorded.raw("auth/403-list-secrets")[1:]), path="/pods$")
    view = k8s.K8sBackend().look([str(job_id())]).views[str(job_id())]
    assert (view.state, "may not list" in view.reason) == ("unreachable", True)
    server.fail("reset", times=999, path="pytorchjobs")
    look = k8s.K8sBackend().look([str(job_id())], ["run-a.0.0a1b2c3d"])
    assert (look.views[str(job_id())].state, look.views["unreachable"].state) == ("pending", "unreachable")
    with pytest.raises(ClusterError, match="does not answer"):
        k8s.K8sBackend().find("run-a.0.0a1b2c3d")
