"""Requests: retries that end, errors in one line, lists in pages, watches that come back."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmops.backends.k8s import client, watch
from llmops.backends.k8s.discover import choose, served
from llmops.backends.k8s.explain import ApiError, Unanswered
from llmops.backends.k8s.resources import POD, WORKLOADS, JobId
from llmops.errors import ClusterError, UserError
from tests.conftest import free_ports
from tests.k8s.api import recorded
from tests.k8s.api.server import ADMIN, ApiServer
from tests.k8s.conftest import write_kubeconfig

PODS = POD.path("default")


def put_pods(server: ApiServer, count: int, **labels: str) -> None:
    for index in range(count):
        metadata = {"name": f"p-{index:04d}", "labels": {"app.kubernetes.io/managed-by": "llmops", **labels}}
        server.store.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"phase": "Running"}})


@pytest.mark.parametrize("fault", [429, 500, 503, "reset", "lost"])
def test_what_may_be_repeated_is_tried_again(server: ApiServer, api: client.Api, fault: int | str) -> None:
    put_pods(server, 1)
    server.fail(fault, times=client.TRIES - 1)
    assert len(api.list(POD, "default")[0]) == 1
    assert len(server.requests) == client.TRIES


@pytest.mark.parametrize(("fault", "error"), [(429, ApiError), (503, ApiError), ("reset", Unanswered)])
def test_tries_are_bounded(server: ApiServer, api: client.Api, fault: int | str, error: type[Exception]) -> None:
    server.fail(fault, times=100)
    with pytest.raises(error):
        api.get(PODS)
    assert len(server.requests) == client.TRIES


def test_retry_after_is_kept_within_reason(server: ApiServer, api: client.Api, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    server.fail((429, {"Retry-After": "3"}, b"{}"))
    api.get(PODS)
    assert slept == [3.0]
    server.fail((429, {"Retry-After": "86400"}, b"{}"))
    with pytest.raises(ApiError, match="throttling"):
        api.get(PODS)
    assert slept == [3.0]


def test_a_list_comes_in_pages_and_survives_their_expiry(server: ApiServer, api: client.Api) -> None:
    put_pods(server, client.PAGE * 2 + 1)
    assert len(api.list(POD, "default")[0]) == client.PAGE * 2 + 1
    assert len(server.requests) == 3
    pages = itertools.count()

    def second(request: Any) -> bool:
        if next(pages) == 1:
            server.store.forget()
        return False

    server.fail(500, test=second)
    names = [pod["metadata"]["name"] for pod in api.list(POD, "default")[0]]
    assert len(names) == len(set(names)) == client.PAGE * 2 + 1


def test_a_server_that_is_not_there_is_named_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "config", url)))
    began = time.monotonic()
    with pytest.raises(ClusterError, match=rf"{url}.*\(nothing listens there.*prod"):
        client.connect("prod").get(PODS)
    assert time.monotonic() - began < client.TOTAL_S


def test_no_credential_is_ever_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ApiServer) -> None:
    secret = "eyJhbGciOiJIUzI1NiJ9.c2VjcmV0"
    url = server.url.replace("http://", "http://me:pa55word@")
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "config", url, secret)))
    with pytest.raises(ClusterError) as refused:
        client.connect("prod").get(PODS)
    monkeypatch.setattr(client, "BACKOFF_S", 0.001)
    server.fail("reset", times=100)
    with pytest.raises(ClusterError) as lost:
        client.connect("prod").get(PODS)
    for text in (str(refused.value), str(lost.value)):
        assert secret not in text
        assert "pa55word" not in text
        assert server.url in text


def test_a_plugin_of_the_kubeconfig_gives_the_token(kubeconfig: Path) -> None:
    config = yaml.safe_load(kubeconfig.read_text())
    version = "client.authentication.k8s.io/v1"
    told = json.dumps({"apiVersion": version, "kind": "ExecCredential", "status": {"token": ADMIN}})
    plugin = {"apiVersion": version, "command": "echo", "args": [told], "interactiveMode": "Never"}
    config["users"][0]["user"] = {"exec": plugin}
    kubeconfig.write_text(yaml.safe_dump(config))
    assert client.connect("prod").get(PODS)["kind"] == "PodList"
    plugin["command"] = "false"
    kubeconfig.write_text(yaml.safe_dump(config))
    with pytest.raises(ApiError, match=r"got no credentials.* log in for the context prod"):
        client.connect("prod").get(PODS)


def test_a_certificate_is_checked(server: ApiServer, kubeconfig: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    names = ["-subj", "/CN=double", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", *names, "-keyout", key, "-out", certificate]
    subprocess.run(made, check=True, capture_output=True)
    server.use_tls(certificate, key)
    config = yaml.safe_load(kubeconfig.read_text())
    cluster = config["clusters"][0]["cluster"]
    cluster["server"] = server.url
    kubeconfig.write_text(yaml.safe_dump(config))
    with pytest.raises(ClusterError, match=f"{server.url}: its certificate is not trusted .*prod"):
        client.connect("prod").get(PODS)
    cluster["certificate-authority-data"] = base64.b64encode(certificate.read_bytes()).decode()
    kubeconfig.write_text(yaml.safe_dump(config))
    assert client.connect("prod").get(PODS)["kind"] == "PodList"


# What people are told: by recording, the words that must be there.
WORDS = {
    "auth/401-bad-token": "does not accept these credentials",
    "auth/403-anonymous": "got no credentials",
    "auth/403-list-secrets": "alice may not list secrets in namespace team-a; auth can-i list secrets -n team-a",
    "auth/403-pod-exec": "may not create pods/exec in namespace team-a; can-i create pods --subresource=exec -n team-a",
    "auth/403-list-nodes": "may not list nodes at cluster scope; can-i list nodes --context prod",
    "auth/403-jobsets-no-rule": "may not list jobsets.jobset.x-k8s.io; or jobset.x-k8s.io is not installed",
    "auth/403-create-job-other-ns": "may not create jobs.batch in namespace rec-api",
    "discovery/list-of-absent-group": "serves no ray.io/v1: its operator (CRD) is not installed",
    "notfound/create-job-in-absent-namespace": "there is no namespace no-such; cluster.namespace",
    "notfound/create-in-terminating-namespace": "the cluster's policy forbids it; is being terminated",
    "jobs/quota-pod-403": "policy forbids it; exceeded quota: q",
    "jobs/psa-pod-403": "policy forbids it; violates PodSecurity",
    "invalid/pod-serviceaccount-missing": 'policy forbids it; serviceaccount "no-such" not found',
    "invalid/pytorchjob-name-dns1035": "webhook validator.pytorchjob.training-operator; denied it: metadata.name",
    "invalid/jobset-bad-successPolicy": "webhook vjobset.kb.io denied it: Internal error: invalid replicatedJob name",
    "invalid/trainjob-runtime-missing": "webhook validator.trainjob.trainer.kubeflow.org denied it; not found",
    "invalid/job-unknown-field-strict": 'is invalid: unknown field "spec.template.spec; "spec.bogus"',
    "invalid/job-many-causes": "is invalid: metadata.name; spec.parallelism: Invalid value; spec.completions",
    "invalid/job-bad-quantity": "is invalid; quantities must match",
    "invalid/pytorchjob-no-spec": "is invalid: spec.pytorchReplicaSpecs: Required value",
    "invalid/request-too-large-413": "too large",
    "invalid/pytorchjob-over-etcd-limit": "too large",
    "list/future-resourceVersion": "has a fault (504",
    "pods/eviction-429": "throttling",
}


@pytest.mark.parametrize("name", WORDS)
def test_an_answer_that_refuses_is_one_line(
    server: ApiServer, api: client.Api, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    request = recorded.answer(name)["request"]
    server.fail(recorded.raw(name), times=100)
    path = request["path"].split("?")[0]
    with pytest.raises(ClusterError) as error:
        api.post(path, {}, {}) if request["method"] == "POST" else api.get(path)
    text = str(error.value)
    assert [words for words in WORDS[name].split("; ") if words not in text] == [], text
    assert "\n" not in text
    assert len(text) < 1200


def test_what_is_no_api_server_is_said_so(server: ApiServer, api: client.Api) -> None:
    server.fail((200, {"Content-Type": "text/html"}, b"<html>log in</html>"))
    with pytest.raises(ClusterError, match="no JSON"):
        api.get(PODS)


def test_auto_takes_what_is_served(server: ApiServer, api: client.Api) -> None:
    assert choose(api) == "pytorchjob"
    assert served(api) == ["job", "jobset", "pytorchjob", "trainjob"]
    server.absent |= {"kubeflow.org", "trainer.kubeflow.org"}
    assert choose(api) == "job"
    assert served(api) == ["job", "jobset"]


def test_context_and_namespace_come_from_the_kubeconfig(
    kubeconfig: Path, tmp_path: Path, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.current(None, None) == ("prod", "default")
    other = write_kubeconfig(tmp_path / "other", server.url, namespace="team")
    assert client.current("prod", str(other)) == ("prod", "team")
    with pytest.raises(UserError, match=r"cluster.context=dev: .*it has: prod"):
        client.current("dev", None)
    with pytest.raises(UserError, match="no such file"):
        client.current(None, str(tmp_path / "absent"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    assert client.current(None, None) == ("", "default")
    with pytest.raises(ClusterError, match="no cluster is known"):
        client.connect("")
    kubeconfig.write_text("apiVersion: v1\nusers: [{name: u, user: {token: s3cret}}\n")
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    with pytest.raises(UserError, match="cannot be") as error:
        client.current(None, None)
    assert "s3cret" not in str(error.value)


def test_a_job_id_holds_any_context(tmp_path: Path) -> None:
    for context in ("arn:aws:eks:eu-1:12:cluster/gpu", "a%2Fb?c", "", "kind-kind"):
        job = JobId(context, "ns", "job", "n-12345678", "/home/me/kube config?")
        assert JobId.parse(str(job)) == job
        assert str(job).count("/") == 3
    assert JobId.parse("1234") is None


def collect(changes: Any, until: Callable[[watch.Change], bool]) -> list[watch.Change]:
    """What a watch gives, up to the change that is asked for."""
    got = []
    for change in changes:
        got.append(change)
        if until(change):
            return got
    raise AssertionError("the watch has ended")


def _is(kind: str, name: str = "") -> Callable[[watch.Change], bool]:
    return lambda change: change.kind == kind and change.item.get("metadata", {}).get("name", "") == name


def test_a_watch_goes_on_where_it_broke_off(server: ApiServer, api: client.Api) -> None:
    put_pods(server, 2)
    changes = watch.watch(api, POD, "default", "app.kubernetes.io/managed-by=llmops")
    assert [change.kind for change in collect(changes, _is("LISTED"))] == ["ADDED", "ADDED", "LISTED"]
    put_pods(server, 1)
    assert [change.kind for change in collect(changes, _is("MODIFIED", "p-0000"))] == ["MODIFIED"]
    for fault in ("reset", 503, 429):
        server.fail(fault)
    server.break_streams()
    server.store.drop(_pod_kind(), "default", "p-0001")
    assert [change.kind for change in collect(changes, _is("DELETED", "p-0001"))] == ["DELETED"]
    assert [request.verb for request in server.requests].count("list") == 1


def test_a_watch_that_has_expired_begins_anew(server: ApiServer, api: client.Api) -> None:
    put_pods(server, 2)
    changes = watch.watch(api, POD, "default", "app.kubernetes.io/managed-by=llmops")
    collect(changes, _is("LISTED"))
    server.store.drop(_pod_kind(), "default", "p-0001")
    server.store.forget()
    server.break_streams()
    got = collect(changes, _is("LISTED"))
    assert [(each.kind, each.item["metadata"]["name"]) for each in got[:-1]] == [
        ("ADDED", "p-0000"),
        ("DELETED", "p-0001"),
    ]
    assert [request.verb for request in server.requests].count("list") == 2


def test_a_watch_gives_up_and_says_so(server: ApiServer, api: client.Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GIVE_UP_S", 0.2)
    changes = watch.watch(api, POD, "default", "")
    collect(changes, _is("LISTED"))
    server.fail("reset", times=10_000)
    with pytest.raises(ClusterError, match="given up"):
        next(changes)


def test_a_watch_that_is_forbidden_ends_at_once(server: ApiServer, api: client.Api) -> None:
    server.users["admin-token"] = ("bob", [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}])
    changes = watch.watch(api, POD, "default", "")
    collect(changes, _is("LISTED"))
    with pytest.raises(ApiError, match="bob may not watch pods in namespace default"):
        next(changes)


def test_a_recorded_watch_is_followed_to_its_end(server: ApiServer, api: client.Api) -> None:
    """Bookmarks, deletions and all, as a real server sent them."""
    for name in ("timeout-end-bookmark", "job-foreground-delete.pods", "pytorchjob-restart-exitcode.pods"):
        told = recorded.watched(name)
        lines = "".join(json.dumps(event) + "\n" for event in told["events"]).encode()
        server.fail((200, {"Content-Type": "application/json"}, lines), test=lambda request: request.verb == "watch")
        ended = iter([False, True])
        got = list(watch.watch(api, POD, "default", "", lambda ended=ended: next(ended)))
        expected = [event["type"] for event in told["events"] if event["type"] != "BOOKMARK"]
        assert [change.kind for change in got] == ["LISTED", *expected]


def _pod_kind() -> Any:
    from tests.k8s.api.store import POD as KIND

    return KIND


def test_kinds_have_the_paths_that_were_recorded() -> None:
    paths = {recorded.answer(f"{name}/create")["request"]["path"] for name in ("pytorchjob", "jobset", "trainjob")}
    paths.add(recorded.answer("jobs/create-indexed")["request"]["path"])
    spaces = {path: path.split("/namespaces/")[1].split("/")[0] for path in paths}
    assert paths == {each.path(space) for each in WORKLOADS.values() for path, space in spaces.items()} & paths
