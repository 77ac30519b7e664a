"""What an API server keeps: objects with their versions, and the changes that watches are told."""

from __future__ import annotations

import base64
import copy
import json
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

Object = dict[str, Any]


class Kind(NamedTuple):
    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def named(self) -> str:
        """As messages have it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def custom(self) -> bool:
        return "." in self.group and not self.group.endswith(".k8s.io")

    def details(self, name: str = "") -> Object:
        return {
            **({"name": name} if name else {}),
            **({"group": self.group} if self.group else {}),
            "kind": self.plural,
        }


KINDS = [
    Kind("", "v1", "pods", "Pod"),
    Kind("", "v1", "events", "Event"),
    Kind("", "v1", "configmaps", "ConfigMap"),
    Kind("", "v1", "services", "Service"),
    Kind("", "v1", "secrets", "Secret"),
    Kind("", "v1", "namespaces", "Namespace", False),
    Kind("", "v1", "nodes", "Node", False),
    Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
    Kind("", "v1", "resourcequotas", "ResourceQuota"),
    Kind("storage.k8s.io", "v1", "storageclasses", "StorageClass", False),
    Kind("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", False),
    Kind("kueue.x-k8s.io", "v1beta2", "localqueues", "LocalQueue"),
    Kind("kueue.x-k8s.io", "v1beta1", "localqueues", "LocalQueue"),
    Kind("authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", False),
    Kind("batch", "v1", "jobs", "Job"),
    Kind("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob"),
    Kind("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet"),
    Kind("trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob"),
    Kind("trainer.kubeflow.org", "v1alpha1", "trainingruntimes", "TrainingRuntime"),
    Kind("scheduling.volcano.sh", "v1beta1", "podgroups", "PodGroup"),
    Kind("scheduling.x-k8s.io", "v1alpha1", "podgroups", "PodGroup"),
]
POD = KINDS[0]


class Refusal(Exception):
    """An answer with a Status."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None, **metadata: str) -> None:
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata,
            "status": "Failure",
            "message": message,
        }
        self.body |= {"reason": reason} if reason else {}
        self.body |= {"details": details} if details is not None else {}
        self.body["code"] = code


class Change(NamedTuple):
    version: int
    kind: Kind
    namespace: str
    event: str
    item: Object
    before: Object | None  # what it was, for selectors that it no longer fits


class Store:
    """Thread-safe; ``changed`` is notified at each change."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.objects: dict[tuple[Kind, str, str], Object] = {}
        self.history: list[Change] = []
        self.version = 1000
        self.compacted = 0  # changes up to this version are forgotten
        self.namespaces = {"default"}
        self.snapshots: dict[int, list[tuple[tuple[Kind, str, str], Object]]] = {}  # of lists in pages

    def put(self, item: Mapping[str, Any], namespace: str = "default") -> Object:
        """Write an object as a controller or node would."""
        kind = next(each for each in KINDS if (each.api_version, each.kind) == (item["apiVersion"], item["kind"]))
        with self.changed:
            new = copy.deepcopy(dict(item))
            self._complete(new, namespace if kind.namespaced else "")
            key = (kind, new["metadata"].get("namespace", ""), new["metadata"]["name"])
            before = self.objects.get(key)
            self._write(key, new, "MODIFIED" if before else "ADDED", before)
            return new

    def create(self, kind: Kind, namespace: str, body: Object, dry_run: bool) -> Object:
        name = body.get("metadata", {}).get("name")
        if namespace not in self.namespaces:
            message = f'namespaces "{namespace}" not found'
            raise Refusal(404, "NotFound", message, {"name": namespace, "kind": "namespaces"})
        with self.changed:
            there = self.objects.get((kind, namespace, name))
            if there is not None:
                gone = "object is being deleted: " if "deletionTimestamp" in there["metadata"] else ""
                message = f'{gone}{kind.named} "{name}" already exists'
                raise Refusal(409, "AlreadyExists", message, kind.details(name))
            new = copy.deepcopy(body)
            self._complete(new, namespace)
            if kind.plural == "jobs":
                new.setdefault("status", {})
                own = {"controller-uid": new["metadata"]["uid"], "job-name": name}
                own |= {f"batch.kubernetes.io/{key}": value for key, value in own.items()}
                new["metadata"]["labels"] = {**new["metadata"].get("labels", {}), **own}
            if dry_run:
                new["metadata"].pop("resourceVersion")
            else:
                self._write((kind, namespace, name), new, "ADDED", None)
            return new

    def get(self, kind: Kind, namespace: str, name: str) -> Object:
        try:
            return self.objects[kind, namespace, name]
        except KeyError:
            raise Refusal(404, "NotFound", f'{kind.named} "{name}" not found', kind.details(name)) from None

    def merge(self, kind: Kind, namespace: str, name: str, patch: Object) -> Object:
        with self.changed:
            before = self.get(kind, namespace, name)
            wanted = patch.get("metadata", {}).get("resourceVersion")
            if wanted not in (None, before["metadata"]["resourceVersion"]):
                message = (
                    f'Operation cannot be fulfilled on {kind.named} "{name}": the object has been modified; '
                    "please apply your changes to the latest version and try again"
                )
                raise Refusal(409, "Conflict", message, kind.details(name))
            new = _merged(before, patch)
            self._write((kind, namespace, name), new, "MODIFIED", before)
            return new

    def delete(self, kind: Kind, namespace: str, name: str, policy: str | None) -> Object:
        """The answer: a Status when it is gone, else the object that waits for its dependents or its containers."""
        with self.changed:
            item = self.get(kind, namespace, name)
            uid = item["metadata"]["uid"]
            policy = policy or ("Orphan" if kind.plural == "jobs" else "Background")
            waits = policy == "Foreground" or (kind == POD and item.get("status", {}).get("phase") == "Running")
            if policy != "Orphan":
                for (its, place, other), each in list(self.objects.items()):
                    if any(owner["uid"] == uid for owner in each["metadata"].get("ownerReferences", [])):
                        self.delete(its, place, other, "Background")
            if waits:
                if "deletionTimestamp" not in item["metadata"]:
                    gone = {"deletionTimestamp": now(), "deletionGracePeriodSeconds": 0 if kind != POD else 30}
                    gone |= {"finalizers": ["foregroundDeletion"]} if kind != POD else {}
                    self._write((kind, namespace, name), _merged(item, {"metadata": gone}), "MODIFIED", item)
                    self._collect()
                return self.objects.get((kind, namespace, name), item)
            self.drop(kind, namespace, name)
            if kind == POD:  # told as it last was
                return _merged(item, {"metadata": {"deletionTimestamp": now(), "deletionGracePeriodSeconds": 0}})
            details = {**kind.details(name), "uid": uid}
            return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def drop(self, kind: Kind, namespace: str, name: str) -> None:
        """Gone at once, as when a node has stopped a pod. An owner that waited for it goes, too."""
        with self.changed:
            item = self.objects.pop((kind, namespace, name))
            self._note(kind, namespace, "DELETED", item, item)
            self._collect()

    def forget(self) -> None:
        """Compact: who watches or pages from before is told 410."""
        with self.changed:
            self.version += 1
            self.compacted = self.version
            self.history.clear()
            self.snapshots.clear()
            self.changed.notify_all()

    def page(self, kind: Kind, namespace: str, query: Mapping[str, str]) -> Object:
        with self.changed:
            fits = selector(query, kind)
            limit, token = int(query.get("limit") or 0), query.get("continue", "")
            version, start = (self.version, "") if not token else _continue(token)
            if token and version not in self.snapshots:
                fresh = _token(self.version, start)
                message = "The provided continue parameter is too old to display a consistent list result. "
                raise Refusal(410, "Expired", message, **{"continue": fresh})
            source = self.snapshots[version] if token else list(self.objects.items())
            found = sorted(
                ((key, each) for key, each in source if key[:2] == (kind, namespace) and fits(each)), key=_name
            )
            found = [(key, each) for key, each in found if key[2] > start]
            metadata: Object = {"resourceVersion": str(version)}
            if limit and len(found) > limit:
                self.snapshots.setdefault(version, source)
                metadata["continue"] = _token(version, found[limit - 1][0][2])
                if not query.get("labelSelector"):
                    metadata["remainingItemCount"] = len(found) - limit
                found = found[:limit]
            items = [copy.deepcopy(each) for _, each in found]
            if not kind.custom:  # a list of a built-in kind does not name the kind of each
                items = [{k: v for k, v in each.items() if k not in ("kind", "apiVersion")} for each in items]
            return {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": metadata, "items": items}

    def _complete(self, item: Object, namespace: str) -> None:
        metadata = item.setdefault("metadata", {})
        if namespace:
            metadata.setdefault("namespace", namespace)
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", now())
        metadata.setdefault("generation", 1)
        metadata["resourceVersion"] = str(self.version)

    def _write(self, key: tuple[Kind, str, str], item: Object, event: str, before: Object | None) -> None:
        self.objects[key] = item
        self._note(key[0], key[1], event, item, before)

    def _note(self, kind: Kind, namespace: str, event: str, item: Object, before: Object | None) -> None:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.history.append(Change(self.version, kind, namespace, event, copy.deepcopy(item), copy.deepcopy(before)))
        self.changed.notify_all()

    def _collect(self) -> None:
        owners = {o["uid"] for each in self.objects.values() for o in each["metadata"].get("ownerReferences", [])}
        for key, each in list(self.objects.items()):
            if "foregroundDeletion" in each["metadata"].get("finalizers", []) and each["metadata"]["uid"] not in owners:
                self.drop(*key)


def selector(query: Mapping[str, str], kind: Kind) -> Any:
    """Whether an object fits labelSelector (``a=b``, ``a in (b,c)``) and fieldSelector (names, and those of events)."""
    labels = []
    for term in _terms(query.get("labelSelector") or ""):
        key, _, values = term.partition(" in ")
        labels.append(
            (key, set(values.strip("()").split(","))) if values else (term.split("=")[0], {term.split("=")[1]})
        )
    fields = [term.split("=", 1) for term in (query.get("fieldSelector") or "").split(",") if term]
    for name, _ in fields:
        if name not in ("metadata.name", "metadata.namespace") and kind.plural != "events":
            raise Refusal(400, "BadRequest", f"field label not supported: {name}")

    def fits(item: Object) -> bool:
        own = item["metadata"].get("labels") or {}
        return all(own.get(key) in values for key, values in labels) and all(_at(item, n) == v for n, v in fields)

    return fits


def _terms(text: str) -> list[str]:
    """Split at the commas outside of parentheses."""
    terms, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and not depth:
            terms.append("")
        else:
            terms[-1] += character
    return [term for term in terms if term]


def _at(item: Object, path: str) -> Any:
    for part in path.split("."):
        item = item.get(part, {})
    return item


def _name(found: tuple[tuple[Kind, str, str], Object]) -> str:
    return found[0][2]


def _merged(value: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = copy.deepcopy(value) if isinstance(value, dict) else {}
    for key, each in patch.items():
        if each is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), each)
    return merged


def _token(version: int, start: str) -> str:
    return base64.b64encode(json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": start}).encode()).decode()


def _continue(token: str) -> tuple[int, str]:
    try:
        value = json.loads(base64.b64decode(token))
        return int(value["rv"]), str(value["start"])
    except ValueError:
        raise Refusal(400, "BadRequest", "invalid continue token: continue key is not valid") from None


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
