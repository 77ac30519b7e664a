"""The double answers as a real API server did: the same status, kind, reason, message and fields."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.k8s.api import recorded
from tests.k8s.api.server import ADMIN, ApiServer
from tests.k8s.api.store import KINDS, Kind


def replay(server: ApiServer, recording: dict[str, Any]) -> tuple[int, str, dict[str, Any] | str]:
    """Send a recorded request to the double: status, content type, body."""
    tokens = {"admin": ADMIN, "alice": "alice-token", "token": "role-token", "anonymous": None}
    token = "wrong" if recording["status"] == 401 else tokens[recording["as"]]
    request = recording["request"]
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    headers = {"Content-Type": request.get("content_type", "application/json")}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    body = json.dumps(request["body"]) if "body" in request else None
    connection.request(request["method"], request["path"], body, headers)
    answer = connection.getresponse()
    text, kind = answer.read().decode(), answer.headers.get("Content-Type", "")
    connection.close()
    try:
        return answer.status, kind, json.loads(text)
    except ValueError:  # plain text, or the lines of a watch
        return answer.status, kind, text


def shape(body: Any) -> Any:
    """What must be the same: of a Status nearly all, of an object its identity, of a list what pages it."""
    if not isinstance(body, dict):
        return body
    if body["kind"] == "Status":
        details = {key: value for key, value in body.get("details", {}).items() if key != "uid"}
        shown = {key: body.get(key) for key in ("kind", "apiVersion", "status", "reason", "code")}
        return {**shown, "details": details, "metadata": sorted(body["metadata"]), "message": _message(body)}
    shown = {key: body.get(key) for key in ("kind", "apiVersion")}
    if "items" in body:
        metadata = sorted(key for key, value in body["metadata"].items() if value)  # CRDs' lists: continue ""
        names = [item["metadata"]["name"] for item in body["items"]]
        return {**shown, "metadata": metadata, "names": names, "typed": ["kind" in item for item in body["items"]]}
    if body["kind"] == "APIResourceList":
        return {**shown, "groupVersion": body["groupVersion"]}
    metadata = {key: value for key, value in body["metadata"].items() if key not in _OWN}
    return {**shown, "metadata": metadata, "fields": sorted(set(body) - {"status"}), "own": _own(body["metadata"])}


_OWN = ("uid", "resourceVersion", "creationTimestamp", "generation", "labels")
_OWN += ("deletionTimestamp", "deletionGracePeriodSeconds")


def _own(metadata: dict[str, Any]) -> list[str]:
    return sorted(key for key in _OWN if key in metadata) + sorted(metadata.get("labels", {}))


def _message(body: dict[str, Any]) -> str:
    """To the first point: what comes after is advice."""
    return str(body.get("message", "")).split(". ")[0].split(": continue key")[0]


_ALONE = """
    discovery/group-absent discovery/version-absent-of-present-group discovery/list-of-absent-group
    discovery/resource-absent-in-present-group discovery/resources-batch-v1 discovery/create-in-absent-group
    notfound/pod notfound/pytorchjob notfound/delete-job notfound/patch-job notfound/create-job-in-absent-namespace
    notfound/create-pytorchjob-in-absent-namespace notfound/dryrun-job-in-absent-namespace
    notfound/list-pods-in-absent-namespace notfound/log-of-absent-pod auth/401-bad-token auth/403-anonymous
    auth/403-list-secrets auth/403-jobsets-no-rule auth/403-create-job-other-ns auth/403-create-pytorchjob-other-ns
    auth/403-get-secret auth/403-absent-group auth/403-pod-exec auth/403-dryrun-needs-create
    auth/403-list-nodes auth/403-nonexistent-namespace list/empty list/empty-crd list/bad-resourceVersion
    watch/bad-resourceVersion
    pytorchjob/create jobset/create trainjob/create jobs/create-indexed
"""
ALONE = _ALONE.split()
# Requests in their order, and what is there before them.
SEQUENCES = {
    "names": ["jobs/create-indexed", "jobs/409-already-exists", "jobs/409-already-exists-dryrun"],
    "custom names": ["pytorchjob/create", "pytorchjob/409-already-exists", "pytorchjob/delete-background"],
    "background": ["jobs/create-indexed", "jobs/delete-background", "jobs/delete-background-after"],
    "foreground": [
        "jobs/delete-foreground",
        "jobs/delete-foreground-after",
        "jobs/create-during-foreground-delete",
        "GONE",
        "jobs/delete-foreground-gone",
    ],
    "pods": ["pods/delete-running", "pods/delete-pending", "pods/delete-pending-after"],
    "patches": ["patch/merge", "patch/merge-409-conflict", "patch/plain-json-415"],
    "custom patches": ["patch/crd-merge-resume", "patch/crd-strategic-415"],
    "pages": ["list/limit-page1", "list/limit-page1-noselector"],
}


@pytest.fixture
def real(server: ApiServer) -> ApiServer:
    """The double with the users and namespaces that the recordings have."""
    server.users |= {"alice-token": ("alice", []), "role-token": ("token", [])}
    names = {*ALONE, *(name for steps in SEQUENCES.values() for name in steps)}
    paths = [recorded.answer(name)["request"]["path"] for name in names - {"GONE"}]
    spaces = {path.split("/namespaces/")[1].split("/")[0].split("?")[0] for path in paths if "/namespaces/" in path}
    server.store.namespaces |= spaces - {"no-such", "no-such-ns"}
    return server


@pytest.mark.parametrize("name", ALONE)
def test_one_request_is_answered_as_recorded(real: ApiServer, name: str) -> None:
    told = recorded.answer(name)
    status, kind, body = replay(real, told)
    assert (status, kind) == (told["status"], told["headers"].get("Content-Type", ""))
    assert shape(body) == shape(told.get("body", told.get("body_text")))


@pytest.mark.parametrize("name", SEQUENCES)
def test_requests_in_their_order_are_answered_as_recorded(real: ApiServer, name: str) -> None:
    _seed(real, SEQUENCES[name])
    for step in SEQUENCES[name]:
        if step == "GONE":  # what held the deletion back
            real.store.drop(KINDS[0], "rec-jobs", "held")
            continue
        told = recorded.answer(step)
        status, _, body = replay(real, told)
        assert (step, status, shape(body)) == (step, told["status"], shape(told.get("body", told.get("body_text"))))


def _seed(server: ApiServer, steps: list[str]) -> None:
    """What the first request of each object needs to be there."""
    if "jobs/delete-foreground" in steps:
        job = recorded.body("jobs/delete-foreground")
        for key in ("deletionTimestamp", "deletionGracePeriodSeconds", "finalizers"):
            job["metadata"] = {k: v for k, v in job["metadata"].items() if k != key}
        server.store.put(job)
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "fg", "uid": job["metadata"]["uid"]}
        pod = {"metadata": {"name": "held", "ownerReferences": [owner]}, "status": {"phase": "Running"}}
        server.store.put({"apiVersion": "v1", "kind": "Pod", **pod}, "rec-jobs")
    for step in steps:
        if "409-already" in step:
            request = recorded.answer(step)["request"]
            space = request["path"].split("/namespaces/")[1].split("/")[0]
            if space != "rec-two":
                server.store.put(request["body"], space)
        if step.startswith(("pods/delete-running", "pods/delete-pending", "patch/merge", "patch/crd-merge")):
            body = recorded.answer(step).get("body", {})
            if body.get("kind") not in (None, "Status"):
                drop = ("deletionTimestamp", "deletionGracePeriodSeconds", "annotations")
                metadata = {key: value for key, value in body["metadata"].items() if key not in drop}
                server.store.put({**body, "metadata": metadata})
    if "list/limit-page1" in steps:
        for index in range(9):
            meta = {"name": f"cm-{index}", "labels": {"k": "v"}}
            server.store.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}, "rec-page")


def _list(server: ApiServer, query: str) -> tuple[int, dict[str, Any]]:
    request = {"method": "GET", "path": f"/api/v1/namespaces/rec-page/configmaps?{query}"}
    status, _, body = replay(server, {"as": "admin", "status": 200, "request": request})
    assert isinstance(body, dict)
    return status, body


def test_pages_are_of_one_moment_until_they_expire(real: ApiServer) -> None:
    """As list/limit-page2, list/continue-expired-410 and list/continue-expired-inconsistent have it."""
    _seed(real, ["list/limit-page1"])
    _, first = _list(real, "limit=3&labelSelector=k%3Dv")
    real.store.drop(Kind("", "v1", "configmaps", "ConfigMap"), "rec-page", "cm-4")
    token = first["metadata"]["continue"]
    status, second = _list(real, f"limit=3&labelSelector=k%3Dv&continue={token}")
    assert shape(second) == shape(recorded.body("list/limit-page2"))
    real.store.forget()
    status, expired = _list(real, f"limit=3&labelSelector=k%3Dv&continue={token}")
    assert (status, shape(expired)) == (410, shape(recorded.body("list/continue-expired-410")))


WATCHES = ["gone-410-pods", "timeout-end", "timeout-end-bookmark", "no-resourceVersion"]


@pytest.mark.parametrize("name", WATCHES)
def test_a_watch_ends_as_recorded(real: ApiServer, name: str) -> None:
    told = recorded.watched(name)
    events = told["events"]
    for event in events:
        if event["type"] == "ADDED":
            real.store.put(event["object"])
    path = told["path"].split("&timeoutSeconds")[0].split("&resourceVersion")[0] + "&timeoutSeconds=0.2"
    if name == "gone-410-pods":
        real.store.forget()
        path += "&resourceVersion=1"
    elif name != "no-resourceVersion":
        path += f"&resourceVersion={real.store.version}"
    path += "&allowWatchBookmarks=true" if "bookmark" in name else ""
    _, _, text = replay(real, {"as": "admin", "status": 200, "request": {"method": "GET", "path": path}})
    lines = text.splitlines() if isinstance(text, str) else [json.dumps(text)]
    got = [json.loads(line) for line in lines]
    # How many bookmarks come depends on the clock.
    assert list(dict.fromkeys(map(_told, got))) == list(dict.fromkeys(map(_told, events)))


def _told(event: dict[str, Any]) -> tuple[Any, ...]:
    item = event["object"]
    return event["type"], item.get("kind"), item["metadata"].get("name"), item.get("code"), item.get("reason")


def test_what_leaves_a_selector_is_deleted_for_its_watch(real: ApiServer) -> None:
    told = recorded.watched("label-leaves-selector")
    first = told["events"][0]["object"]
    real.store.put(first)
    version, other = real.store.version, {**first, "metadata": {**first["metadata"], "labels": {"k": "other"}}}
    changed = {**first, "data": {"i": "9"}}
    for item in (other, first, changed, {**other, "data": {"i": "9"}}):
        real.store.put(item)
    path = (
        f"{told['path'].split('&timeoutSeconds')[0]}&labelSelector=k%3Dv&timeoutSeconds=0.2&resourceVersion={version}"
    )
    _, _, text = replay(real, {"as": "admin", "status": 200, "request": {"method": "GET", "path": path}})
    assert isinstance(text, str)
    assert [_kept(json.loads(line)) for line in text.splitlines()] == [_kept(event) for event in told["events"]]


def _kept(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["type"], event["object"]["metadata"]["labels"], event["object"]["data"]


REVIEWS = ["ssar-create-jobs-team-a", "ssar-create-jobs-rec-api", "ssar-create-jobsets-team-a", "ssar-subresource-log"]


@pytest.mark.parametrize("name", REVIEWS)
def test_a_review_of_rights_is_answered_as_recorded(real: ApiServer, name: str) -> None:
    """Alice's rules are those that the server itself listed, for this namespace."""
    rules = recorded.body("auth/ssrr")["status"]["resourceRules"]
    real.users["alice-token"] = ("alice", [{**rule, "namespace": "team-a"} for rule in rules])
    told = recorded.answer(f"auth/{name}")
    status, kind, body = replay(real, told)
    assert (status, kind) == (told["status"], told["headers"]["Content-Type"])
    assert isinstance(body, dict)
    for answer in (body, told["body"]):  # which binding allows it is the server's own
        answer.get("status", {}).pop("reason", None)
    assert body == told["body"]


def test_groups_and_version_are_told_as_recorded(real: ApiServer) -> None:
    _, _, apis = replay(real, recorded.answer("discovery/apis"))
    assert isinstance(apis, dict)
    told = {each["name"]: each for each in recorded.body("discovery/apis")["groups"]}
    mine = {each["name"]: each for each in apis["groups"]}
    both = mine.keys() & told.keys()
    assert {"batch", "kubeflow.org", "kueue.x-k8s.io", "storage.k8s.io", "scheduling.k8s.io"} <= both
    assert {name: mine[name] for name in both} == {name: told[name] for name in both}
    assert apis["kind"] == recorded.body("discovery/apis")["kind"]
    _, _, version = replay(real, recorded.answer("discovery/version"))
    assert isinstance(version, dict)
    assert version.items() <= recorded.body("discovery/version").items()
