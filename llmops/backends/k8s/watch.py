"""A list that stays true: one list, then one watch, which is opened again wherever it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llmops.backends.k8s.client import Api, backoff, lines
from llmops.backends.k8s.explain import ApiError, Unanswered, one_line
from llmops.backends.k8s.resources import Resource
from llmops.errors import ClusterError

WATCH_S = 240  # the server ends a watch after that; one that has died is noticed a little later
MARGIN_S = 15
GIVE_UP_S = 300.0  # without one good answer
GOOD_S = 5.0  # a watch that lived so long was no failure


class Change(NamedTuple):
    """``kind``: ADDED, MODIFIED or DELETED; LISTED, without an item, after all that a list has given."""

    kind: str
    item: dict[str, Any]


class _Expired(Exception):
    """The server no longer has the changes since our resourceVersion."""


def watch(
    api: Api, resource: Resource, namespace: str, labels: str, ended: Callable[[], bool] = lambda: False
) -> Iterator[Change]:
    """All objects as ADDED, one LISTED, then each change; the same again after the server has lost the thread (410).

    What went while nobody watched is told as DELETED, with no more than its metadata. Ends when ``ended()``, which is
    asked whenever a watch ends. Raises :class:`ClusterError` after :data:`GIVE_UP_S` without a good answer, or at once
    where the server refuses.
    """
    version, failures = "", 0
    known: dict[str, dict[str, Any]] = {}  # metadata by uid
    failing: float | None = None  # since when; a slow reader of our changes is no failure
    while not ended():
        began, why = time.monotonic(), ""
        try:
            if not version:
                items, version = api.list(resource, namespace, labels)
                failing = None
                before, known = known, {item["metadata"]["uid"]: item["metadata"] for item in items}
                yield from (Change("ADDED", item) for item in items)
                yield from (Change("DELETED", {"metadata": old}) for uid, old in before.items() if uid not in known)
                yield Change("LISTED", {})
            for change in _stream(api, resource, namespace, labels, version):
                failures, failing = 0, None
                metadata = change.item["metadata"]
                version = str(metadata["resourceVersion"])
                if change.kind == "BOOKMARK":  # of an object it has only the version
                    continue
                if change.kind == "DELETED":
                    known.pop(metadata["uid"], None)
                else:
                    known[metadata["uid"]] = metadata
                yield change
            failing = None
        except _Expired:
            version = ""
        except ApiError as error:
            if error.status != 410 and error.status != 429 and error.status < 500:
                raise
            version, why = "" if error.status == 410 else version, str(error)
        except Unanswered as error:
            why = str(error)
        if why:
            failing = failing or time.monotonic()
            if time.monotonic() - failing > GIVE_UP_S:
                raise ClusterError(f"{why}; the watch of {resource.plural} was given up after {GIVE_UP_S:.0f} s")
        if time.monotonic() - began < GOOD_S:
            failures += 1
            time.sleep(backoff(failures))


def _stream(api: Api, resource: Resource, namespace: str, labels: str, version: str) -> Iterator[Change]:
    query = {
        "watch": "1",
        "labelSelector": labels,
        "resourceVersion": version,
        "timeoutSeconds": WATCH_S,
        "allowWatchBookmarks": "true",
    }
    answer = api.stream(resource.path(namespace), query, WATCH_S + MARGIN_S)
    try:
        for line in lines(answer):
            try:
                event = json.loads(line)
            except ValueError as error:
                raise Unanswered(f"{api.server}: the watch broke off inside a line") from error
            item = event["object"]
            if event["type"] == "ERROR":
                if item.get("code") == 410:
                    raise _Expired
                raise Unanswered(f"{api.server}: {one_line(str(item.get('message')))}")
            yield Change(event["type"], item)
    finally:
        answer.close()
