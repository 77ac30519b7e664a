"""From rendered objects to a job: a dry run of everything first, the workload last, nothing left behind on failure."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.backends.base import Ambiguous, Rejected
from llmops.backends.k8s.client import TRIES, Api, backoff
from llmops.backends.k8s.explain import ApiError, Unanswered
from llmops.backends.k8s.resources import resource_of
from llmops.errors import ClusterError

STRICT = {"fieldManager": "llmops", "fieldValidation": "Strict"}  # an unknown field is an error, not a warning
DRY_RUN = {**STRICT, "dryRun": "All"}

Object = Mapping[str, Any]

_LOG = logging.getLogger(__name__)


def submit(api: Api, namespace: str, objects: Sequence[Object]) -> None:
    """Create the objects, the workload (the last one) included.

    All names are this submission's alone, so "already exists" means that an earlier answer was lost. Raises
    :class:`Rejected` when there is no workload, and nothing else that was made here; :class:`Ambiguous` when there may
    be one.
    """
    *others, workload = objects
    made: list[Object] = []
    # Trainer's webhook looks for the runtime that a TrainJob names, so its dry run comes after that was made.
    late = workload["kind"] == "TrainJob"
    try:
        for each in others if late else objects:
            _dry_run(api, namespace, each)
        for each in others:
            made.append(each)  # before the call: an answer that is lost may stand for an object
            _create_other(api, namespace, each)
        if late:
            _dry_run(api, namespace, workload)
    except ClusterError as error:
        raise Rejected(f"{error}{_remove(api, namespace, made)}") from error
    try:
        owner = _create_workload(api, namespace, workload)
    except ApiError as error:
        raise Rejected(f"{error}{_remove(api, namespace, made)}") from error
    except ClusterError as error:
        raise Ambiguous(str(error)) from error
    _own(api, namespace, owner, others)


def _dry_run(api: Api, namespace: str, item: Object) -> None:
    try:
        api.post(resource_of(item).path(namespace), item, DRY_RUN)
    except ApiError as error:
        if not _ours(error):
            raise


def _ours(error: ApiError) -> bool:
    """Whether the object is there already. One that is being deleted is not: its name is free again only later."""
    return error.status == 409 and error.reason == "AlreadyExists" and "being deleted" not in error.message


def _create_other(api: Api, namespace: str, item: Object) -> None:
    """Sent again when an answer is lost: under one name there can be only one, and that it exists is told."""
    path = resource_of(item).path(namespace)
    for attempt in range(1, TRIES + 1):
        try:
            api.post(path, item, STRICT)
            return
        except ApiError as error:
            if not _ours(error):
                raise
            return
        except Unanswered:
            if attempt == TRIES:
                raise
            time.sleep(backoff(attempt))


def _create_workload(api: Api, namespace: str, item: Object) -> Object:
    """Looked up by its name whenever an answer is lost; sent again only when it is not there.

    Returns the object as the server has it. Raises :class:`ApiError` when it was refused, and another
    :class:`ClusterError` when it is not known.
    """
    resource, name = resource_of(item), str(item["metadata"]["name"])
    for attempt in range(1, TRIES + 1):
        try:
            return api.post(resource.path(namespace), item, STRICT)
        except ApiError as error:
            if not _ours(error):
                if attempt > 1:  # the first may still be on its way
                    raise Unanswered(str(error)) from error
                raise
            return _existing(api, resource.path(namespace, name)) or item
        except Unanswered:
            found = _existing(api, resource.path(namespace, name))
            if found is not None:
                return found
            if attempt == TRIES:
                raise
            time.sleep(backoff(attempt))
    raise AssertionError("the last try returns or raises")


def _existing(api: Api, path: str) -> Object | None:
    try:
        return api.get(path)
    except ApiError as error:
        if error.status == 404:
            return None
        # It was sent, and whether it is there may not be asked.
        raise Unanswered(str(error)) from error


def _own(api: Api, namespace: str, owner: Object, others: Sequence[Object]) -> None:
    """Make the workload the owner of the others, so that they go when it goes. It runs without that, too."""
    uid = owner["metadata"].get("uid")
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": uid,
    }
    for each in others if uid else []:
        path = resource_of(each).path(namespace, each["metadata"]["name"])
        try:
            api.patch(path, {"metadata": {"ownerReferences": [reference]}})
        except ClusterError as error:
            kind, name = each["kind"], each["metadata"]["name"]
            _LOG.warning("%s %s will stay when the job is deleted: %s", kind, name, error)


def _remove(api: Api, namespace: str, made: Sequence[Object]) -> str:
    """Take away what was made for a workload that there is not. Returns what stayed, for people."""
    stayed = []
    for each in reversed(made):
        try:
            api.delete(resource_of(each).path(namespace, each["metadata"]["name"]), "Background")
        except ClusterError:
            stayed.append(f"{each['kind']} {each['metadata']['name']}")
    return f" (and these could not be removed again: {', '.join(stayed)})" if stayed else ""
