"""What a Kubernetes cluster would refuse, or silently read as something else, told before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from llmops.config.overrides import ENV_NAME
from llmops.config.schema import MOUNT_SOURCES, K8sCluster, Mount, RunConfig, pod_grace_seconds, trains
from llmops.errors import UserError

# Names that give away a secret. On other backends their values would be in files that only their owner can read;
# here they would be readable for everyone who may look at the workload.
SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|KEY|PASSWD|CREDENTIALS?)$|PASSWORD$", re.IGNORECASE)
QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?\d+)?")
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
DNS_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL_PART = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
SECRET_KEY = re.compile(r"[-._A-Za-z0-9]{1,253}")
IMAGE = re.compile(
    r"(?=.{1,500}\Z)([A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:\w[\w.-]{0,127})?(@[a-z0-9+.-]+:[0-9a-fA-F]{32,})?"
)
ANNOTATION_BYTES = 256 * 1024  # of all together
# Labels and annotations that others put there, or that the launcher finds its objects by.
TAKEN_PREFIXES = ("batch.kubernetes.io/", "jobset.sigs.k8s.io/", "trainer.kubeflow.org/", "training.kubeflow.org/")
TAKEN_LABELS = {
    "app.kubernetes.io/managed-by": "remove it",
    "llmops.run": "remove it",
    "llmops.submission": "remove it",
    "llmops.nodes": "remove it",
    "kueue.x-k8s.io/queue-name": "use cluster.queue",
    "scheduling.x-k8s.io/pod-group": "use cluster.gang",
}
TAKEN_ANNOTATIONS = {"scheduling.k8s.io/group-name": "use cluster.gang"}
TAKEN_PATHS = ("/llmops", "/proc", "/sys", "/dev")
TAKEN_VOLUMES = ("agent", "tmp", "shm")
TOLERATION = {"key", "operator", "value", "effect", "tolerationSeconds"}
AFFINITY = {"nodeAffinity", "podAffinity", "podAntiAffinity"}
SPREAD = {"maxSkew", "topologyKey", "whenUnsatisfiable"}
KINDS = (
    "ConfigMap", "Service", "PodGroup", "Job", "JobSet", "PyTorchJob", "TrainingRuntime", "TrainJob",
)  # fmt: skip


def check(config: RunConfig, cluster: K8sCluster) -> None:
    """Refuse what cannot work. Raises :class:`UserError`."""
    if cluster.image is None:
        raise UserError("cluster.image is not set: name the container image that the pods run, as cluster.image=...")
    if not IMAGE.fullmatch(cluster.image):
        raise UserError(
            f"cluster.image={cluster.image!r}: not an image; expected one such as lab/train:1.0, in lower case"
        )
    for key in ("context", "kubeconfig", "python", "work_dir", "template"):
        if getattr(cluster, key) == "":
            raise UserError(f"cluster.{key} is empty: give it a value, or null to leave the choice open")
    if cluster.work_dir is not None and not cluster.work_dir.startswith("/"):
        raise UserError(f"cluster.work_dir={cluster.work_dir}: must be an absolute path in the image")
    _check_names(cluster)
    _check_quantities(cluster)
    _check_labels(cluster)
    for index, mount in enumerate(cluster.mounts):
        _check_mount(f"cluster.mounts[{index}]", mount)
    for what in ("path", "name"):
        values = [getattr(mount, what) for mount in cluster.mounts if getattr(mount, what) is not None]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise UserError(f"cluster.mounts: two of them have {what} {twice!r}; give each its own")
    _check_secrets(config, cluster)
    _check_placement(cluster)
    _check_security(cluster)
    if trains(config) and pod_grace_seconds(cluster, config.checkpoint.save_seconds) < config.checkpoint.save_seconds:
        raise UserError(
            f"cluster.grace_s={cluster.grace_s} leaves less than checkpoint.save_seconds="
            f"{config.checkpoint.save_seconds:g} to save: raise the first or lower the second"
        )
    if cluster.workload == "trainjob" and cluster.ttl_s is not None:
        raise UserError(
            f"cluster.ttl_s={cluster.ttl_s}: a TrainJob cannot remove itself after its end; set it to null, or choose "
            "cluster.workload=jobset"
        )
    for kind in cluster.patches:
        if kind not in KINDS:
            raise UserError(f"cluster.patches.{kind}: there is no such object; patches are for {', '.join(KINDS)}")


def _check_names(cluster: K8sCluster) -> None:
    if cluster.namespace is not None and not DNS_LABEL.fullmatch(cluster.namespace):
        raise UserError(
            f"cluster.namespace={cluster.namespace!r}: not a namespace's name; use lower-case letters, digits and '-'"
        )
    single = ("priority_class", "queue", "scheduler", "service_account")
    named = [(f"cluster.{key}", getattr(cluster, key)) for key in single]
    named += [("cluster.image_pull_secrets", name) for name in cluster.image_pull_secrets]
    named += [("cluster.config_env", name) for name in cluster.config_env]
    named += [(f"cluster.secret_env.{name}.secret", value.secret) for name, value in cluster.secret_env.items()]
    for index, mount in enumerate(cluster.mounts):
        named += [(f"cluster.mounts[{index}].{kind}", getattr(mount, kind)) for kind in ("pvc", "config_map", "secret")]
    for key, name in named:
        if name is not None and not DNS_NAME.fullmatch(name):
            raise UserError(
                f"{key}={name!r}: no object can have this name; use lower-case letters, digits, '-' and '.'"
            )


def _check_quantities(cluster: K8sCluster) -> None:
    for key in ("cpus", "memory", "ephemeral_storage", "shm"):
        text = getattr(cluster, key)
        if text is not None:
            _check_quantity(f"cluster.{key}", text, "96 or 500m" if key == "cpus" else "64Gi", zero=False)
    _check_key("cluster.gpu_resource", cluster.gpu_resource, "nvidia.com/gpu")
    keys = {"cpu": "cpus", "memory": "memory", "ephemeral-storage": "ephemeral_storage"}
    if cluster.gpus_per_node is not None:
        keys[cluster.gpu_resource] = "gpus_per_node"
    for name, text in cluster.resources.items():
        if name in keys:
            raise UserError(f"cluster.resources.{name}={text}: use cluster.{keys[name]} instead")
        _check_key("cluster.resources", name, "rdma/hca")
        _check_quantity(f"cluster.resources.{name}", text, "1")
        if "/" in name and not text.isdecimal():
            raise UserError(f"cluster.resources.{name}={text}: expected a whole number; devices cannot be shared")


def _check_quantity(key: str, text: str, example: str, zero: bool = True) -> None:
    found = QUANTITY.fullmatch(text)
    if found is None:
        close = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTP])i?b?", text, re.IGNORECASE)
        hint = f"did you mean {close[1]}{close[2].upper()}i?" if close else f"expected one such as {example}"
        raise UserError(f"{key}={text!r}: not a Kubernetes quantity; {hint}")
    if not zero and Decimal(found[1]) == 0:
        raise UserError(f"{key}={text}: must be more than zero; null leaves it open")
    if key != "cluster.cpus" and found[2] == "m":
        raise UserError(f"{key}={text}: m means thousandths of a byte; did you mean {found[1]}Mi?")


def _check_key(where: str, key: str, example: str) -> None:
    """``prefix/name``, as labels, annotations and resources are called."""
    prefix, slash, name = key.rpartition("/")
    if not LABEL_PART.fullmatch(name) or (slash and not DNS_NAME.fullmatch(prefix)):
        raise UserError(f"{where}: {key!r} cannot be a key; expected one such as {example}")


def _check_labels(cluster: K8sCluster) -> None:
    taken = {"labels": TAKEN_LABELS, "annotations": TAKEN_ANNOTATIONS, "node_selector": dict[str, str]()}
    for section, names in taken.items():
        items: Mapping[str, str] = getattr(cluster, section)
        for key, value in items.items():
            _check_key(f"cluster.{section}", key, "team or example.org/team")
            if key in names:
                raise UserError(f"cluster.{section}.{key}: llmops sets it itself; {names[key]}")
            if section != "node_selector" and key.startswith(TAKEN_PREFIXES):
                raise UserError(f"cluster.{section}.{key}: controllers set it themselves; remove it")
            if section != "annotations" and value and not LABEL_PART.fullmatch(value):
                raise UserError(
                    f"cluster.{section}.{key}={value!r}: not a label's value; use at most 63 letters, digits, '-', '_' "
                    "and '.', a letter or digit at both ends"
                )
    size = sum(len(f"{key}{value}".encode()) for key, value in cluster.annotations.items())
    if size > ANNOTATION_BYTES:
        raise UserError(f"cluster.annotations: {size} bytes; Kubernetes takes {ANNOTATION_BYTES} at most")


def _check_mount(key: str, mount: Mount) -> None:
    sources = [name for name in MOUNT_SOURCES if getattr(mount, name) is not None]
    choices = ", ".join(MOUNT_SOURCES)
    if not sources:
        raise UserError(f"{key} ({mount.path}) has no source: set one of {choices}")
    if len(sources) > 1:
        raise UserError(f"{key} ({mount.path}) has {' and '.join(sources)}: set only one of {choices}")
    if not re.fullmatch(r"/[^:\0]*[^:/\0]", mount.path) or _climbs(mount.path):
        raise UserError(f"{key}.path={mount.path!r}: expected an absolute path without ':' or '..', not / itself")
    inside = next((each for each in TAKEN_PATHS if mount.path == each or mount.path.startswith(f"{each}/")), None)
    if inside is not None and mount.path != "/dev/shm":  # noqa: S108  (a path in the pod)
        raise UserError(f"{key}.path={mount.path}: {inside} of a pod is taken; choose another path")
    if mount.name is not None and (not DNS_LABEL.fullmatch(mount.name) or mount.name in TAKEN_VOLUMES):
        raise UserError(
            f"{key}.name={mount.name!r}: not a volume's name; use lower-case letters, digits and '-', and none of "
            f"{', '.join(TAKEN_VOLUMES)}"
        )
    if mount.host_path is not None and (not mount.host_path.startswith("/") or _climbs(mount.host_path)):
        raise UserError(f"{key}.host_path={mount.host_path!r}: expected an absolute path of the node, without '..'")
    if mount.sub_path is not None and (not mount.sub_path or mount.sub_path.startswith("/") or _climbs(mount.sub_path)):
        raise UserError(f"{key}.sub_path={mount.sub_path!r}: expected a path inside the volume, such as data/corpus")
    for kind in ("empty_dir", "memory"):
        size = getattr(mount, kind)
        if size:
            _check_quantity(f"{key}.{kind}", size, '100Gi, or "" for no limit', zero=False)


def _climbs(path: str) -> bool:
    return ".." in path.split("/")


def _check_secrets(config: RunConfig, cluster: K8sCluster) -> None:
    for name, value in cluster.secret_env.items():
        if not ENV_NAME.fullmatch(name):
            raise UserError(f"cluster.secret_env: {name!r} is not the name of an environment variable")
        if name.startswith("LLMOPS_"):
            raise UserError(f"cluster.secret_env.{name}: llmops sets it itself; use another name")
        if not SECRET_KEY.fullmatch(value.key) or value.key in (".", ".."):
            raise UserError(f"cluster.secret_env.{name}.key={value.key!r}: not a key that a Secret can have")
        if name in config.env:
            raise UserError(f"env.{name} is also in cluster.secret_env: remove one of them")
    for name, text in config.env.items():
        if text and SECRET_NAME.search(name):
            raise UserError(
                f"env.{name} looks like a secret, and everybody who may see the pods could read it: put it into a "
                f"Secret and set cluster.secret_env.{name}={{secret: NAME, key: KEY}}, or call it something else"
            )
    for name in config.secrets:
        if name not in cluster.secret_env:
            raise UserError(
                f"secrets: {name} would have to be in the workload in clear text: put it into a Secret and set "
                f"cluster.secret_env.{name}={{secret: NAME, key: KEY}}"
            )


def _check_placement(cluster: K8sCluster) -> None:
    for index, toleration in enumerate(cluster.tolerations):
        key = f"cluster.tolerations[{index}]"
        _check_fields(key, toleration, TOLERATION)
        _check_choice(f"{key}.operator", toleration.get("operator"), ("Exists", "Equal", "Lt", "Gt"))
        _check_choice(f"{key}.effect", toleration.get("effect"), ("NoSchedule", "PreferNoSchedule", "NoExecute"))
        if toleration.get("operator") == "Exists" and toleration.get("value"):
            raise UserError(f"{key}.value={toleration['value']}: operator Exists takes no value; remove one of them")
    _check_fields("cluster.affinity", cluster.affinity, AFFINITY)
    for index, spread in enumerate(cluster.topology_spread):
        key = f"cluster.topology_spread[{index}]"
        for field in sorted(SPREAD - spread.keys()):
            raise UserError(f"{key} has no {field}: set maxSkew, topologyKey and whenUnsatisfiable")
        _check_choice(f"{key}.whenUnsatisfiable", spread["whenUnsatisfiable"], ("DoNotSchedule", "ScheduleAnyway"))


def _check_fields(key: str, section: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in section:
        if name not in known:
            raise UserError(f"{key}: there is no {name}; it takes {', '.join(sorted(known))}")


def _check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    if value is not None and value not in choices:
        raise UserError(f"{key}={value}: expected {' or '.join(choices)}")


def _check_security(cluster: K8sCluster) -> None:
    security = cluster.security
    if security.non_root and security.run_as_user == 0:
        raise UserError(
            "cluster.security.run_as_user=0 is root, which cluster.security.non_root=true refuses: set another user, "
            "or cluster.security.non_root=false"
        )
    if security.privileged and security.no_privilege_escalation:
        raise UserError(
            "cluster.security.privileged=true needs cluster.security.no_privilege_escalation=false: Kubernetes refuses "
            "both together"
        )
    if "SYS_ADMIN" in security.add_capabilities and security.no_privilege_escalation:
        raise UserError(
            "cluster.security.add_capabilities has SYS_ADMIN, which needs "
            "cluster.security.no_privilege_escalation=false: Kubernetes refuses both together"
        )
    for name in security.add_capabilities:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or name.startswith("CAP_"):
            raise UserError(
                f"cluster.security.add_capabilities: {name!r} is no capability; write IPC_LOCK, not CAP_..."
            )
