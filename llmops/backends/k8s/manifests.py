"""From a JobSpec to the objects that are created: templates filled in, patched, checked, and written as YAML."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmops import agent_zip
from llmops.backends.k8s import arrays
from llmops.backends.k8s.resources import ARRAY, ARRAY_LABEL, WORKLOADS
from llmops.config.schema import K8sCluster, Mount, pod_grace_seconds
from llmops.errors import UserError
from llmops.job import JobSpec
from llmops.render import render_template

RESTARTS = 1000  # the controllers' own bound; the run's is in the run store
METRICS_PORT = 9400  # of a node's exporter, where metrics.port says nothing; the next one is the trainer's
STARTS = 10  # of one trial, whose study shall not wait for days for one that never starts
NAME_CHARS = 30  # of an object's name before its 8 hex digits: controllers add to it, and 63 is the limit
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
SCHEDULERS = {"volcano": "volcano", "coscheduling": "scheduler-plugins-scheduler"}
POD_GROUPS = {"volcano": "scheduling.volcano.sh/v1beta1", "coscheduling": "scheduling.x-k8s.io/v1alpha1"}
# What some YAML parser or other reads as no text when it is not quoted.
_PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null|nan|inf)\Z)[A-Za-z/][\w./-]*", re.IGNORECASE | re.ASCII)


def object_name(spec_tag: str, run_id: str) -> str:
    """The name of the objects of one submission: at most 39 of ``[a-z0-9-]``, with a letter first.

    It ends with the tag's own 8 hex digits, so no other submission has it.
    """
    return f"{_slug(run_id)}-{spec_tag.rpartition('.')[2]}"


def run_label(run_id: str) -> str:
    """The value of the label ``llmops.run``: the run's id, or where that cannot be a label something as unique."""
    if LABEL_VALUE.fullmatch(run_id):
        return run_id
    return f"{_slug(run_id)}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


def labels(run_id: str, submission: int) -> dict[str, str]:
    """What every object of a submission is labelled with."""
    return {
        "app.kubernetes.io/managed-by": "llmops",
        "llmops.run": run_label(run_id),
        "llmops.submission": str(submission),
    }


def render(cluster: K8sCluster, spec: JobSpec, agent: Path | None) -> str:
    """The objects as YAML, in the order in which they are created; the workload is the last.

    ``agent``: the supervisor's file, in a folder that the pods mount; without one it travels in a ConfigMap. Raises
    :class:`UserError` for a template or a patch that gives no such objects.
    """
    workload, name = str(spec.options["workload"]), str(spec.options["name"])
    own = labels(spec.run_id, spec.submission)
    shared = {**cluster.labels, **own}
    trainjob = workload == "trainjob"
    array = spec.array if workload == ARRAY else None
    trials = array.size if array else None
    parallel = min(array.parallel or array.size, array.size) if array else None
    gang = None if cluster.gang == "none" else cluster.gang
    values = {
        "name": name,
        "namespace": spec.options["namespace"],
        "nodes": spec.nodes,
        "spec": spec,
        "cluster": cluster,
        "labels": own,
        "trials": trials,
        "parallel": parallel,
        "workload_labels": {
            **shared,
            **({"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}),
            **({ARRAY_LABEL: str(trials)} if trials else {}),
        },
        "annotations": cluster.annotations or None,
        "workload_annotations": {**arrays.admission(cluster, parallel or 1), **cluster.annotations} or None,
        "suspend": True if cluster.queue else None,
        # A pod that dies with its supervisor is a failure that its run counts; some more may not even start.
        "restarts": RESTARTS if trials is None else spec.retry.max_failures + STARTS,
        "agent": None if agent is not None else base64.b64encode(agent_zip.build()[1]).decode(),
        # A TrainJob's operator makes the group itself, when its runtime says so.
        "pod_group": POD_GROUPS[gang] if gang and not trainjob else None,
        "pod_group_policy": {gang: {}} if gang else None,
        "job_labels": {**own, "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"} if trainjob else own,
        "runtime_labels": {**own, "trainer.kubeflow.org/framework": "torch"},
        "job_deadline_s": None if trainjob else cluster.active_deadline_s,
        "pod": _pod(cluster, spec, agent, shared, gang if not trainjob else None),
    }
    text = render_template(f"{workload}.yaml.j2", cluster.template, values)
    source = cluster.template or f"{workload}.yaml.j2"
    objects = [_merge(item, cluster.patches.get(item["kind"], {})) for item in _parse(text, source)]
    _check(objects, WORKLOADS["job" if workload == ARRAY else workload].kind, values, source, cluster)
    if trials:
        arrays.check(objects[-1], trials, source, cluster)
    return dump(objects)


def dump(objects: list[dict[str, Any]]) -> str:
    """YAML that any parser, of YAML 1.1 or 1.2, reads as the same objects."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Text that might be taken for something else is quoted; nothing is written as a reference."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Dumper, value: str) -> yaml.ScalarNode:
        style = None if _PLAIN.fullmatch(value) else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)

    Dumper.add_representer(str, text)
    return str(
        yaml.dump_all(
            objects, Dumper=Dumper, explicit_start=True, sort_keys=False, allow_unicode=True, width=sys.maxsize
        )
    )


def load(text: str) -> list[dict[str, Any]]:
    """The objects in ``text``, in order."""
    import yaml

    return [item for item in yaml.safe_load_all(text) if item is not None]


def literal(text: str) -> str:
    """``text`` for a place in which Kubernetes expands ``$(NAME)``, so that it arrives as it is.

    It reads ``$$`` as ``$`` and takes what follows another ``$`` for one byte, which breaks other letters.
    """
    return text.replace("$", "$$")


def _slug(run_id: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", run_id.lower()).lstrip("-0123456789")
    return slug[:NAME_CHARS].strip("-") or "run"


def _pod(
    cluster: K8sCluster, spec: JobSpec, agent: Path | None, shared: Mapping[str, str], gang: str | None
) -> dict[str, Any]:
    """What the pod's template says, computed."""
    group = {"scheduling.x-k8s.io/pod-group": spec.options["name"]} if gang == "coscheduling" else {}
    noted = {"scheduling.k8s.io/group-name": spec.options["name"]} if gang == "volcano" else {}
    ports = _metrics_ports(spec)
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": str(ports[0])} if ports else {}
    volumes, volume_mounts = _volumes(cluster, None if agent is not None else f"{spec.options['name']}-agent")
    program = "/llmops/agent.pyz" if agent is None else str(agent)
    what = "--run" if spec.array is None else "--study"
    command = [spec.python, program, "k8s", what, spec.run_url, "--submission", str(spec.submission)]
    # Pods of other runs must not decide where this one's go.
    ours = {"matchLabels": labels(spec.run_id, spec.submission)}
    return {
        # How many pods there are tells a monitor whether this one may be another than that of rank 0.
        "labels": {**shared, **group, "llmops.nodes": str(spec.nodes)},
        "annotations": {**scraped, **cluster.annotations, **noted} or None,
        "grace_s": math.ceil(spec.options.get("grace_s") or pod_grace_seconds(cluster, spec.stop.save_s)),
        "token": None if cluster.service_account else False,
        "host_network": True if cluster.host_network else None,
        "dns_policy": "ClusterFirstWithHostNet" if cluster.host_network else None,
        "scheduler": cluster.scheduler or SCHEDULERS.get(cluster.gang),
        "topology_spread": [{"labelSelector": ours, **each} for each in cluster.topology_spread] or None,
        "image_pull_secrets": [{"name": name} for name in cluster.image_pull_secrets] or None,
        "security": _pod_security(cluster),
        "container_security": _container_security(cluster),
        "command": [literal(word) for word in command],
        "env": _environment(cluster, spec),
        "ports": [
            {"name": name, "containerPort": port}
            for name, port in zip(("metrics", "metrics-train"), ports, strict=False)
        ]
        or None,
        "env_from": [{"configMapRef": {"name": name}} for name in cluster.config_env] or None,
        "resources": _resources(cluster),
        "volumes": volumes,
        "volume_mounts": volume_mounts,
    }


def _metrics_ports(spec: JobSpec) -> tuple[int, ...]:
    """Of the node's exporter and of rank 0; none where nothing is served, or on ports that nobody knows yet."""
    port = spec.metrics.get("port") or spec.options.get("metrics_port")
    return (int(port), int(port) + 1) if port and spec.metrics.get("enabled") else ()


def _environment(cluster: K8sCluster, spec: JobSpec) -> list[dict[str, Any]]:
    plain = {"PYTHONUNBUFFERED": "1"}
    if spec.array is not None and spec.options["workload"] != ARRAY:
        plain["LLMOPS_ELEMENT"] = "0"  # all pods are nodes of one trial, whatever index their controller gives them
    if cluster.security.read_only_root or cluster.security.run_as_user is not None:
        plain["HOME"] = "/tmp"  # noqa: S108  (in the pod: the image's may be nobody's to write)
    plain = {**plain, **spec.env}
    secrets = cluster.secret_env
    return [
        *({"name": name, "value": literal(text)} for name, text in plain.items() if name not in secrets),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": value.secret, "key": value.key}}}
            for name, value in secrets.items()
        ),
    ]


def _resources(cluster: K8sCluster) -> dict[str, Any] | None:
    """Requested is what may be used: such a pod is the last to be evicted, and devices take nothing else."""
    wanted = {"cpu": cluster.cpus, "memory": cluster.memory, "ephemeral-storage": cluster.ephemeral_storage}
    if cluster.gpus_per_node:
        wanted[cluster.gpu_resource] = str(cluster.gpus_per_node)
    wanted = {**{name: text for name, text in wanted.items() if text is not None}, **cluster.resources}
    return {"requests": wanted, "limits": wanted} if wanted else None


def _volumes(cluster: K8sCluster, agent: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes and where they are mounted: the user's, and ``/tmp`` and ``/dev/shm`` where the user has none there.

    ``agent``: the ConfigMap with the supervisor, if it is in one.
    """
    taken = {mount.path for mount in cluster.mounts}
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    if "/tmp" not in taken:  # noqa: S108
        volumes.append({"name": "tmp", "emptyDir": {}})
        mounts.append({"name": "tmp", "mountPath": "/tmp"})  # noqa: S108
    if "/dev/shm" not in taken:  # noqa: S108  (in a container it has 64 MB, too little for data loaders and NCCL)
        volumes.append({"name": "shm", "emptyDir": _empty_dir(cluster.shm, "Memory")})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108
    if agent is not None:
        volumes.append({"name": "agent", "configMap": {"name": agent}})
        mounts.append({"name": "agent", "mountPath": "/llmops", "readOnly": True})
    for index, mount in enumerate(cluster.mounts):
        name = mount.name or f"mount-{index}"
        volumes.append({"name": name, **_source(mount)})
        kept = mount.read_only or mount.config_map is not None or mount.secret is not None
        place = {"name": name, "mountPath": mount.path, "readOnly": True if kept else None, "subPath": mount.sub_path}
        mounts.append(place)
    return volumes, mounts


def _source(mount: Mount) -> dict[str, Any]:
    if mount.pvc is not None:
        return {"persistentVolumeClaim": {"claimName": mount.pvc}}
    if mount.host_path is not None:
        return {"hostPath": {"path": mount.host_path}}
    if mount.config_map is not None:
        return {"configMap": {"name": mount.config_map}}
    if mount.secret is not None:
        return {"secret": {"secretName": mount.secret}}
    if mount.empty_dir is not None:
        return {"emptyDir": _empty_dir(mount.empty_dir, None)}
    return {"emptyDir": _empty_dir(mount.memory, "Memory")}


def _empty_dir(size: str | None, medium: str | None) -> dict[str, Any]:
    return {"medium": medium, "sizeLimit": size or None}


def _pod_security(cluster: K8sCluster) -> dict[str, Any] | None:
    security = cluster.security
    group = security.fs_group if security.fs_group is not None else security.run_as_user
    values: dict[str, Any] = {
        "runAsNonRoot": True if security.non_root else None,
        "runAsUser": security.run_as_user,
        "runAsGroup": security.run_as_group,
        "fsGroup": group,
        # Without this every file of a large volume is changed at every start.
        "fsGroupChangePolicy": "OnRootMismatch" if group is not None else None,
        "seccompProfile": {"type": "RuntimeDefault"} if security.seccomp else None,
    }
    return values if any(value is not None for value in values.values()) else None


def _container_security(cluster: K8sCluster) -> dict[str, Any] | None:
    security = cluster.security
    drop, add = ["ALL"] if security.drop_capabilities else None, security.add_capabilities or None
    values: dict[str, Any] = {
        "allowPrivilegeEscalation": False if security.no_privilege_escalation else None,
        "readOnlyRootFilesystem": True if security.read_only_root else None,
        "capabilities": {"drop": drop, "add": add} if drop or add else None,
        "privileged": True if security.privileged else None,
    }
    return values if any(value is not None for value in values.values()) else None


def _parse(text: str, source: str) -> list[dict[str, Any]]:
    import yaml

    try:
        found = [_without_null(item) for item in yaml.safe_load_all(text) if item is not None]
    except yaml.YAMLError as error:
        raise UserError(f"{source}: what it gives is not YAML ({' '.join(str(error).split())}); correct it") from error
    for item in found:
        if not isinstance(item, dict) or not isinstance(item.get("kind"), str):
            raise UserError(f"{source}: one of its documents is no Kubernetes object; give each a kind, and metadata")
    return found


def _without_null(value: Any) -> Any:
    """Null means left out, to Kubernetes too."""
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _merge(value: Any, patch: Mapping[str, Any]) -> Any:
    """JSON merge patch (RFC 7396)."""
    result = dict(value) if isinstance(value, dict) else {}
    for name, item in patch.items():
        if item is None:
            result.pop(name, None)
        else:
            result[name] = _merge(result.get(name), item) if isinstance(item, dict) else item
    return result


def _check(
    objects: list[dict[str, Any]], kind: str, values: Mapping[str, Any], source: str, cluster: K8sCluster
) -> None:
    """What is found again by name and labels must have them, whatever template and patches are in use."""
    if not objects or objects[-1]["kind"] != kind:
        raise UserError(f"{source}: its last object must be the {kind}, whose creation starts the run")
    for item in objects:
        where = f"cluster.patches.{item['kind']}" if item["kind"] in cluster.patches else source
        metadata = item.get("metadata")
        if not isinstance(metadata, dict):
            raise UserError(f"{where}: the {item['kind']} has no metadata; give it name, namespace and labels")
        name = values["name"]
        if metadata.get("name") not in (name, f"{name}-agent") or metadata.get("namespace") != values["namespace"]:
            raise UserError(f"{where}: the {item['kind']} must keep its name {name} and namespace, to be found again")
        found = metadata.get("labels")
        has = found if isinstance(found, dict) else {}
        for label, text in values["labels"].items():
            if has.get(label) != text:
                raise UserError(f"{where}: the {item['kind']} must keep its label {label}: {text}, to be found again")
