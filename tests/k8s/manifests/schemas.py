"""Is an object valid? Against the schemas of a real API server, with every field that they do not know refused."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

DATA = Path(__file__).parents[1] / "data"
OLDEST, RECORDED = "1.29", "1.36"
CORE = {
    ("v1", "ConfigMap"): "io.k8s.api.core.v1.ConfigMap",
    ("v1", "Service"): "io.k8s.api.core.v1.Service",
    ("v1", "Namespace"): "io.k8s.api.core.v1.Namespace",
    ("v1", "ServiceAccount"): "io.k8s.api.core.v1.ServiceAccount",
    ("v1", "PersistentVolumeClaim"): "io.k8s.api.core.v1.PersistentVolumeClaim",
    ("v1", "Pod"): "io.k8s.api.core.v1.Pod",
    ("batch/v1", "Job"): "io.k8s.api.batch.v1.Job",
    ("rbac.authorization.k8s.io/v1", "Role"): "io.k8s.api.rbac.v1.Role",
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): "io.k8s.api.rbac.v1.RoleBinding",
    ("scheduling.k8s.io/v1", "PriorityClass"): "io.k8s.api.scheduling.v1.PriorityClass",
}
PACKAGED = {  # of which no schema was recorded
    ("apps/v1", "Deployment"),
    ("authorization.k8s.io/v1", "SelfSubjectAccessReview"),
    ("storage.k8s.io/v1", "StorageClass"),
    ("v1", "Node"),
    ("v1", "ResourceQuota"),
}
# Kinds of schedulers and monitors whose schemas are not at hand, as far as the templates use them.
OTHER = {
    "scheduling.volcano.sh/v1beta1": {"minMember": {"type": "integer", "minimum": 1}},
    "scheduling.x-k8s.io/v1alpha1": {"minMember": {"type": "integer", "minimum": 1}},
    "monitoring.coreos.com/v1": {
        "selector": {"type": "object"},
        "podTargetLabels": {"type": "array", "items": {"type": "string"}},
        "namespaceSelector": {"type": "object"},
        "podMetricsEndpoints": {"type": "array", "items": {"type": "object"}},
        "endpoints": {"type": "array", "items": {"type": "object"}},
        "groups": {"type": "array", "items": {"type": "object"}},
    },
}


def problems(item: dict[str, Any]) -> list[str]:
    """What an API server would say against ``item``; nothing when it is valid."""
    key = (item.get("apiVersion", ""), item.get("kind", ""))
    if key in PACKAGED:
        return _packaged(item)
    if key in CORE:
        return [*_errors(_core(CORE[key]), item), *_packaged(item)]
    schema = _crds().get(key) or _other(key[0])
    return [f"no schema for {key[0]} {key[1]}"] if schema is None else _errors(schema, item)


@functools.cache
def _crds() -> dict[tuple[str, str], Any]:
    found = {}
    for path in (DATA / "crds").glob("*.json.gz"):
        crd = json.loads(gzip.decompress(path.read_bytes()))
        for version, schema in crd["versions"].items():
            # The server checks the metadata of every object by its own rules.
            schema["properties"]["metadata"] = _core("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
            found[f"{crd['group']}/{version}", crd["kind"]] = _closed(schema)
    return found


def _other(api_version: str) -> dict[str, Any] | None:
    if api_version not in OTHER:
        return None
    text = {"type": "string"}
    metadata = _core("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
    spec = {"type": "object", "properties": OTHER[api_version], "additionalProperties": False}
    properties = {"apiVersion": text, "kind": text, "metadata": metadata, "spec": spec}
    return {"type": "object", "properties": properties, "additionalProperties": False}


@functools.cache
def _core(name: str) -> dict[str, Any]:
    schemas = json.loads(gzip.decompress((DATA / "openapi" / "schemas.json.gz").read_bytes()))
    return {**_closed(_inlined(schemas, schemas[name])), "$id": f"urn:{name}"}


def _inlined(schemas: dict[str, Any], value: Any) -> Any:
    if isinstance(value, dict):
        if "$ref" in value:
            return _inlined(schemas, schemas[value["$ref"].rsplit("/", 1)[1]])
        return {key: _inlined(schemas, item) for key, item in value.items()}
    return [_inlined(schemas, item) for item in value] if isinstance(value, list) else value


def _closed(schema: Any) -> Any:
    """With unknown fields refused, as by a strict server, wherever the schema does not let them through."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: item if key in ("enum", "default", "required") else _closed(item) for key, item in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    open_ = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_:
        closed["additionalProperties"] = False
    return closed


def _unique(validator: Any, keys: list[str], items: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    seen = [tuple(item.get(key) for key in keys) for item in items if isinstance(item, dict)]
    for value in {value for value in seen if seen.count(value) > 1}:
        yield jsonschema.ValidationError(f"two items have {keys} {value}")


_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"x-kubernetes-list-map-keys": _unique})


def _errors(schema: dict[str, Any], item: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in _Validator(schema).iter_errors(item)]


def _packaged(item: dict[str, Any]) -> list[str]:
    """The oldest release that is promised, and the one that the recordings are of."""
    found = []
    for version in (OLDEST, RECORDED):
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {error.message}")
    return found
