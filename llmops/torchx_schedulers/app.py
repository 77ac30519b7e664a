"""A TorchX ``AppDef`` as a run: one role, of which each replica is a node with one process of ours."""

from __future__ import annotations

import re
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import yaml
from torchx.specs import AppDef, BindMount, Resource, RetryPolicy, Role, VolumeMount, macros
from torchx.version import TORCHX_IMAGE

from llmops import launch
from llmops.config.compose import load_config
from llmops.config.overrides import assign
from llmops.config.schema import CLUSTERS
from llmops.errors import UserError
from llmops.runs import records
from llmops.runs.model import Run

ROLE_NAME = "TORCHX_ROLE_NAME"  # in the run's environment: what its only role is called
_INSTANCE_TYPE = "node.kubernetes.io/instance-type"  # as TorchX's named resources have it
_FROM_ROLE = ("nodes", "ranks_per_node", "cpus_per_rank", "gpus_per_node", "mem", "cpus", "memory", "image")


def options(backend: str) -> Iterator[tuple[str, Any]]:
    """Keys of ``cluster`` that can be given as ``-cfg key=value``, each with its type: all that are no sections.

    What the role says is not among them.
    """
    for field in msgspec.structs.fields(CLUSTERS[backend]):
        kind = field.type
        if field.name in _FROM_ROLE:
            continue
        if kind in (bool, list[str], dict[str, str]):
            yield field.name, kind
            continue
        parts = {getattr(each, "__origin__", each) for each in (kind, *get_args(kind))}
        if parts & {list, dict}:
            continue
        if parts & {str, Literal}:
            yield field.name, str
        elif int in parts:
            yield field.name, int


def prepare(backend: str, app: AppDef, cfg: Mapping[str, Any]) -> launch.Prepared:
    """The run that ``app`` describes, checked; nothing is written. Raises :class:`UserError` for what cannot work."""
    role = _only_role(app)
    name = launch.check_name(app.name)
    # The command may hold the app's id, so that is chosen before anything is composed.
    run_id = records.new_run_id(name, time.time())
    overrides = [f"cluster={cfg.get('cluster') or backend}", assign("name", name)]
    overrides += _from_cfg(backend, cfg)
    overrides += _from_role(backend, role, cfg)
    overrides += _program(role, run_id)
    overrides += [f"{key}={value}" for key, value in (cfg.get("set") or {}).items()]
    config_dir = Path(cfg["config_dir"]) if cfg.get("config_dir") else None
    composed = load_config(overrides, config_dir)
    if not isinstance(composed.config.cluster, CLUSTERS[backend]):
        raise UserError(f"cluster={cfg.get('cluster')}: is for another backend than {backend}; choose one for it")
    return replace(launch.prepare(composed, cfg.get("runs_url")), run_id=run_id)


def _only_role(app: AppDef) -> Role:
    if len(app.roles) != 1:
        names = ", ".join(role.name for role in app.roles)
        raise UserError(
            f"{app.name} has {len(app.roles)} roles ({names}): a run has one; submit each as an app of its own"
        )
    role = app.roles[0]
    if role.min_replicas is not None and role.min_replicas != role.num_replicas:
        raise UserError(
            f"role {role.name}: min_replicas={role.min_replicas} of {role.num_replicas} asks for a job of changing "
            "size, which a run has not; give one number of nodes, as -j 2x1"
        )
    if role.max_retries and role.num_replicas > 1 and role.retry_policy != RetryPolicy.APPLICATION:
        raise UserError(
            f"role {role.name}: retry_policy={role.retry_policy.value}: all nodes of a run start again together; use "
            f"{RetryPolicy.APPLICATION.value}"
        )
    if role.resource.devices:
        devices = ", ".join(role.resource.devices)
        raise UserError(f"role {role.name}: devices ({devices}) have no place in a run; leave them out")
    return role


def _from_cfg(backend: str, cfg: Mapping[str, Any]) -> Iterator[str]:
    for key, kind in options(backend):
        value = cfg.get(key)
        if value is None:
            continue
        if kind == dict[str, str]:
            yield from (assign(f"cluster.{key}.{name}", text) for name, text in value.items())
        else:
            yield assign(f"cluster.{key}", value)


def _from_role(backend: str, role: Role, cfg: Mapping[str, Any]) -> Iterator[str]:
    """Nodes, resources, image, mounts, retries. What a role says nothing of is left to the cluster's defaults."""
    resource = role.resource
    yield assign("cluster.nodes", role.num_replicas)
    yield assign("cluster.ranks_per_node", 1)
    if resource.gpu > 0 and backend != "local":
        yield assign("cluster.gpus_per_node", resource.gpu)
    if backend == "slurm":
        yield from [assign("cluster.cpus_per_rank", resource.cpu)] if resource.cpu > 0 else []
        yield from [assign("cluster.mem", f"{resource.memMB}M")] if resource.memMB > 0 else []
    elif backend == "k8s":
        yield from [assign("cluster.cpus", str(resource.cpu))] if resource.cpu > 0 else []
        yield from [assign("cluster.memory", f"{resource.memMB}Mi")] if resource.memMB > 0 else []
        yield assign("cluster.image", role.image)
        if _INSTANCE_TYPE in resource.capabilities:
            yield assign(f"cluster.node_selector.{_INSTANCE_TYPE}", str(resource.capabilities[_INSTANCE_TYPE]))
    if backend != "k8s" and role.image not in ("", TORCHX_IMAGE):
        raise UserError(
            f"role {role.name}: image={role.image}: {backend} runs in the nodes' own environment; leave it out, or "
            "name a container in a cluster configuration of your own (-cfg config_dir=DIR,cluster=NAME)"
        )
    if role.mounts:
        yield f"cluster.mounts=[{','.join(_mount(backend, mount) for mount in role.mounts)}]"
    # TorchX's number counts: so many retries after a failure, whether there was progress or not. Preemptions never do.
    yield assign("retry.max_failures", role.max_retries)
    yield assign("retry.max_no_progress", role.max_retries + 1)


def _mount(backend: str, mount: Any) -> str:
    kinds = {BindMount: ("host_path", "src_path"), VolumeMount: ("pvc", "src")}
    if backend != "k8s" or type(mount) not in kinds:
        what = type(mount).__name__
        raise UserError(f"{what} of {mount.dst_path}: {backend} mounts no such thing; remove it from the role's mounts")
    key, source = kinds[type(mount)]
    parts = {"path": mount.dst_path, key: getattr(mount, source)}
    values = ",".join(assign(name, text).replace("=", ":", 1) for name, text in parts.items())
    return f"{{{values},read_only:{str(mount.read_only).lower()}}}"


def _program(role: Role, run_id: str) -> Iterator[str]:
    """Command and environment with TorchX's macros filled in.

    A replica's number is known on its node alone: where it is used, a shell fills it in, whatever the program is.
    """
    here = f"replica-{uuid.uuid4().hex}"
    filled = macros.Values(img_root=".", app_id=run_id, replica_id=here, rank0_env="MASTER_ADDR").apply(role)
    command, env = [filled.entrypoint, *filled.args], {ROLE_NAME: role.name, **filled.env}
    late = {name: text for name, text in env.items() if here in text}
    deaf = _is_torchrun(command)
    if deaf:
        env.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGHUP,SIGQUIT")
    if deaf or late or any(here in word for word in command):
        words = ["trap '' TERM USR1 USR2;"] if deaf else []
        words += [f"export {name}={_shell(text, here)};" for name, text in late.items()]
        line = " ".join([*words, "exec", *(_shell(word, here) for word in command)])
        command = ["/bin/sh", "-c", line, *(["torchrun"] if deaf else [])]  # the shell's $0, by which it is known
    yield assign("command", command)
    threads = env.get("OMP_NUM_THREADS", "")
    if re.fullmatch(r"[1-9]\d{0,5}", threads):  # it has a key of its own
        yield assign("train.threads_per_rank", int(threads))
        del env["OMP_NUM_THREADS"]
    yield from (assign(f"env.{name}", text) for name, text in env.items() if name not in late)
    # As TorchX does: what is in the current folder is what the program finds around it.
    if any(Path.cwd().iterdir()):
        yield assign("code.root", str(Path.cwd()))


def _is_torchrun(command: Sequence[str]) -> bool:
    """Whether it is torchrun, as ``dist.ddp`` starts it.

    Some clusters signal all processes of a job. A torchrun that hears that kills its workers before they have saved: so
    it starts deaf, and the workers look at the control directory.
    """
    program, *rest = command
    in_shell = Path(program).name in ("bash", "sh") and rest[:1] == ["-c"]
    return Path(program).name == "torchrun" or (in_shell and rest[1:2] != [] and rest[1].split()[:1] == ["torchrun"])


def _shell(word: str, here: str) -> str:
    return '"$NODE_RANK"'.join(shlex.quote(part) if part else "" for part in word.split(here)) or "''"


def role_of(run: Run) -> Role:
    """The role of a run, as far as its configuration tells; also of one that TorchX did not submit."""
    config = _config(run)
    command: Sequence[str] = config.get("command") or ["python3", "-m", "llm.train"]
    cluster, env = config.get("cluster") or {}, dict(config.get("env") or {})
    record = run.record
    memory = str(cluster.get("mem") or cluster.get("memory") or "")
    found = re.fullmatch(r"(\d+)(?:M|Mi)", memory)
    cpus = str(cluster.get("cpus_per_rank") or cluster.get("cpus") or "")
    return Role(
        name=env.pop(ROLE_NAME, run.name),
        image=str(cluster.get("image") or ""),
        entrypoint=command[0],
        args=list(command[1:]),
        env=env,
        num_replicas=record.nodes if record else 1,
        max_retries=int((config.get("retry") or {}).get("max_failures", 0)),
        resource=Resource(
            cpu=int(cpus) if cpus.isdigit() else -1,
            gpu=int(cluster.get("gpus_per_node") or 0),
            memMB=int(found[1]) if found else -1,
        ),
    )


def _config(run: Run) -> dict[str, Any]:
    name = run.submissions[-1].record.config if run.submissions else "config.yaml"
    try:
        value = yaml.safe_load(run.store.get(name))
    except (FileNotFoundError, yaml.YAMLError):  # a damaged run is still one: its state says so
        return {}
    return value if isinstance(value, dict) else {}
