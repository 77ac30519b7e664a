"""Logs of pods: merged, followed over broken connections, and the odd answers that a real server gave."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from llmops.backends.k8s import client, logs
from llmops.backends.k8s.client import Api
from llmops.backends.k8s.explain import ApiError
from llmops.backends.k8s.logs import PodLine, follow, tail
from llmops.backends.k8s.resources import POD_LABEL, JobId
from tests.k8s.api import recorded
from tests.k8s.api.server import ApiServer
from tests.k8s.api.store import POD

JOB = JobId("prod", "default", "job", "run-0a1b2c3d")
LABELS = {"app.kubernetes.io/managed-by": "llmops", POD_LABEL["job"]: JOB.name}


def put_pod(server: ApiServer, name: str, phase: str = "Running", **state: Any) -> None:
    state = state or {"running": {}}
    container = {"name": "node", "image": "i:1", "state": state, "lastState": {}}
    pod = {"metadata": {"name": name, "labels": LABELS}, "spec": {"containers": [{"name": "node"}]}}
    status = {"phase": phase, "containerStatuses": [container]}
    known = server.store.objects.get((POD, "default", name))
    if known:
        pod["metadata"] = {**known["metadata"]}
    server.store.put({"apiVersion": "v1", "kind": "Pod", **pod, "status": status})


def stamped(second: int, text: str, fraction: str = ".5") -> bytes:
    return f"2026-11-22T12:00:{second:02d}{fraction}Z {text}\n".encode()


def put_recorded(server: ApiServer, name: str) -> str:
    """A recorded pod, as one of the job's. Returns its name."""
    pod = recorded.body(f"pods/{name}")
    server.store.put({**pod, "metadata": {**pod["metadata"], "namespace": "default", "labels": LABELS}})
    return str(pod["metadata"]["name"])


@pytest.mark.parametrize("ending", ["succeeded", "running"])
def test_the_last_lines_of_each_pod(server: ApiServer, api: Api, ending: str) -> None:
    for name in ("b", "a"):
        put_pod(server, name, "Running" if ending == "running" else "Succeeded")
        server.log(name, *(stamped(second, f"{name}{second}") for second in range(5)))
    assert list(tail(api, JOB, 2)) == [PodLine("a", "a3"), PodLine("a", "a4"), PodLine("b", "b3"), PodLine("b", "b4")]
    assert len(list(tail(api, JOB))) == 10


# What is said of a pod whose log cannot be had: the recorded pod, the recorded answer, the words.
ODD = [
    ("pending-unsched-gpu", "logs/waiting-unscheduled", "no output: unschedulable: 0/2 nodes"),
    ("waiting-ImagePullBackOff", "logs/waiting-ImagePullBackOff", "no output yet: its image localhost/nope:1 cannot"),
    ("waiting-CreateContainerConfigError", "logs/waiting-CreateContainerConfigError", "no output yet: its container"),
    ("pending-ContainerCreating", "logs/waiting-ContainerCreating", "no output yet: starting"),
    ("init-failed", "logs/after-init-failed", "no output yet: exit code 4"),
    ("failed-StartError", "logs/StartError", "no output: its command cannot be started"),
    ("succeeded", "logs/gone-pod", "the pod is gone, and its log with it"),
    ("succeeded", "logs/previous-collected-200", "its container was removed from the node"),
    ("succeeded", "logs/container-unspecified", "no log: the API server says that it is invalid: a container name"),
]


@pytest.mark.parametrize(("pod", "answer", "words"), ODD)
def test_what_has_no_log_is_explained(server: ApiServer, api: Api, pod: str, answer: str, words: str) -> None:
    put_recorded(server, pod)
    server.fail(recorded.raw(answer), path="/log$")
    (line,) = tail(api, JOB, 10)
    assert line.note
    assert line.text.startswith(f"({words}"), line.text


def test_a_log_that_is_forbidden_is_an_error(server: ApiServer, api: Api) -> None:
    put_recorded(server, "running")
    server.fail(recorded.raw("logs/as-alice-403"), path="/log$")
    with pytest.raises(ApiError, match=r"alice may not get pods/log in namespace rec-logs.* --subresource=log"):
        list(tail(api, JOB))


def test_any_bytes_are_lines(server: ApiServer, api: Api) -> None:
    """Not UTF-8, colours, progress bars, and no newline at the end: as recorded."""
    for name in ("logs/binary", "logs/full"):
        server.store.objects.clear()
        put_recorded(server, "running")
        server.fail(recorded.raw(name), path="/log$")
        lines = [line.text for line in tail(api, JOB)]
        assert "".join(lines).replace("\r", "") == recorded.answer(name)["body_text"].replace("\n", "").replace(
            "\r", ""
        )


class Followed:
    """Lines as a terminal takes them: so many, and then more."""

    def __init__(self, lines: Iterator[PodLine]) -> None:
        self.lines = lines

    def take(self, count: int) -> list[tuple[str, str]]:
        return [(line.pod, line.text) for line in itertools.islice(self.lines, count)]


def test_following_gives_each_line_once_over_broken_connections(server: ApiServer, api: Api) -> None:
    put_pod(server, "a")
    server.log("a", stamped(0, "old"), stamped(1, "first"), stamped(1, "second"))
    over = threading.Event()
    followed = Followed(follow(api, JOB, over.is_set, n=2, wait_s=0.1))
    assert followed.take(2) == [("a", "first"), ("a", "second")]
    server.fail("reset", times=2, path="/log$")
    server.break_streams()
    server.log("a", stamped(1, "second"), stamped(2, "third", ".25"), stamped(2, "fourth"))
    assert followed.take(3) == [("a", "second"), ("a", "third"), ("a", "fourth")]
    server.break_streams()
    server.log("a", stamped(3, "last"))
    put_pod(server, "a", "Succeeded", terminated={"exitCode": 0})
    over.set()
    assert followed.take(9) == [("a", "last")]
    assert [request.verb for request in server.requests].count("list") == 1


def test_new_pods_are_followed_and_waiting_ones_explained_once(server: ApiServer, api: Api) -> None:
    over = threading.Event()
    followed = Followed(follow(api, JOB, over.is_set, wait_s=0.1))
    name = put_recorded(server, "waiting-ErrImageNeverPull")
    ((pod, text),) = followed.take(1)
    assert (pod, "cannot be pulled (ErrImageNeverPull)" in text) == (name, True)
    put_recorded(server, "waiting-ErrImageNeverPull")
    put_pod(server, "b", "Pending", waiting={"reason": "ContainerCreating"})
    put_pod(server, "b")
    server.log("b", stamped(0, "hello"))
    assert followed.take(1) == [("b", "hello")]
    server.store.drop(POD, "default", "b")
    over.set()
    assert followed.take(9) == []


def test_a_pod_that_was_replaced_under_its_name_is_followed_anew(server: ApiServer, api: Api) -> None:
    """As a PyTorchJob does it."""
    put_pod(server, "w")
    server.log("w", stamped(0, "one"))
    over = threading.Event()
    followed = Followed(follow(api, JOB, over.is_set, wait_s=0.1))
    assert followed.take(1) == [("w", "one")]
    with server.store.changed:
        server.store.drop(POD, "default", "w")
        server.logs["w"] = []
    put_pod(server, "w")
    server.log("w", stamped(1, "two"))
    assert followed.take(1) == [("w", "two")]
    server.store.forget()  # the watch begins anew, and nothing is read twice
    server.break_streams()
    server.log("w", stamped(2, "three"))
    assert followed.take(1) == [("w", "three")]
    over.set()
    server.store.drop(POD, "default", "w")
    assert followed.take(9) == []


def test_a_thousand_pods_cost_one_list_and_one_watch(
    server: ApiServer, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_FOLLOWED", 4)
    for index in range(1000):
        put_pod(server, f"p-{index:04d}")
        server.logs[f"p-{index:04d}"] = [stamped(0, "up")]
    over = threading.Event()
    followed = Followed(follow(api, JOB, over.is_set, wait_s=0.2))
    lines = followed.take(5)
    assert sorted(text for _, text in lines)[1:] == ["up"] * 4
    assert any("more than 4 pods run" in text for _, text in lines)
    server.break_streams()
    put_pod(server, "p-0000")
    server.log("p-0000", stamped(1, "more"))
    assert followed.take(1) == [("p-0000", "more")]
    followed.lines.close()  # type: ignore[attr-defined]
    verbs = [request.resource + " " + request.verb for request in server.requests]
    assert verbs.count("/pods list") == 1000 / client.PAGE
    assert verbs.count("/pods watch") <= 2
    assert len(verbs) < 20


def test_a_watch_that_is_forbidden_ends_following(server: ApiServer, api: Api) -> None:
    server.users["admin-token"] = ("bob", [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}])
    with pytest.raises(ApiError, match="bob may not watch pods"):
        list(follow(api, JOB, lambda: False, wait_s=0.1))
