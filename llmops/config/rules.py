"""Rules that a type cannot say. Each refusal names the key, the value and the remedy."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.data.prepare.options import check as check_preparation
from llm.eval.options import check as check_evaluation
from llm.eval.options import check_tasks
from llm.utils.config import ConfigError
from llm.utils.config import check as check_training
from llmops.agent.torchrun import is_torchrun
from llmops.config import k8s_rules, notify_rules
from llmops.config.overrides import ENV_NAME
from llmops.config.schema import (
    K8sCluster,
    LocalCluster,
    RunConfig,
    SlurmCluster,
    TorchxCluster,
    time_limit_seconds,
    trains,
    warning_seconds,
    world_size,
)
from llmops.errors import UserError
from llmops.ssh import address

# The supervisor sets these for every rank.
RESERVED_ENV = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    }
)
COMMENT_BYTES = 1024  # SLURM refuses longer ones
SIGNAL_S_MAX = 65535  # of sbatch --signal
# sbatch options that the launcher gives itself, each with what to set instead.
TAKEN_OPTIONS = {
    "--account": "cluster.account", "-A": "cluster.account",
    "--array": None, "-a": None,
    "--chdir": None, "-D": None,
    "--comment": "cluster.comment",
    "--constraint": "cluster.constraint", "-C": "cluster.constraint",
    "--cpus-per-task": "cluster.cpus_per_rank", "-c": "cluster.cpus_per_rank",
    "--dependency": "cluster.dependency", "-d": "cluster.dependency",
    "--error": None, "-e": None,
    "--exclude": "cluster.exclude", "-x": "cluster.exclude",
    "--exclusive": "cluster.exclusive",
    "--export": "env and secrets",
    "--export-file": "env and secrets",
    "--gpus-per-node": "cluster.gpus_per_node",
    "--gres": "cluster.gres",
    "--job-name": "name", "-J": "name",
    "--mail-type": "cluster.mail_type",
    "--mail-user": "cluster.mail_user",
    "--mem": "cluster.mem",
    "--mem-per-cpu": "cluster.mem_per_cpu",
    "--no-requeue": None,
    "--nodelist": "cluster.nodelist", "-w": "cluster.nodelist",
    "--nodes": "cluster.nodes", "-N": "cluster.nodes",
    "--ntasks": "cluster.ranks_per_node", "-n": "cluster.ranks_per_node",
    "--ntasks-per-node": "cluster.ranks_per_node",
    "--open-mode": None,
    "--output": None, "-o": None,
    "--parsable": None,
    "--partition": "cluster.partition", "-p": "cluster.partition",
    "--qos": "cluster.qos", "-q": "cluster.qos",
    "--requeue": None,
    "--reservation": "cluster.reservation",
    "--signal": "cluster.signal_s",
    "--test-only": None,
    "--time": "cluster.time", "-t": "cluster.time",
    "--wait": None, "-W": None,
    "--wrap": "command",
}  # fmt: skip


def check(config: RunConfig) -> None:
    """Refuse a configuration that cannot run. Raises :class:`UserError`."""
    for key, value in _walk(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: must be a finite number")
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{key}={value!r}: a NUL character can be in no argument or file name; remove it")
    if config.name is not None and (not config.name.strip() or not config.name.isprintable() or len(config.name) > 100):
        raise UserError(f"name={config.name!r}: must be 1 to 100 printable characters")
    for key in ("runs_url", "code.root", "cluster.python"):
        _refuse_empty(key, _get(config, key))
    if isinstance(config.cluster, SlurmCluster) and config.cluster.host is not None:
        address.parse(config.cluster.host, "cluster.host")
    _check_environment(config)
    _check_stop(config)
    _check_metrics(config)
    notify_rules.check(config)
    if config.command:
        if not config.command[0]:
            raise UserError("command: its first word, the program, is empty")
        if config.cluster.ranks_per_node > 1 and is_torchrun(config.command):
            raise UserError(
                f"cluster.ranks_per_node={config.cluster.ranks_per_node} would start so many of "
                f"{Path(config.command[0]).name} on each node, which starts workers of its own: set "
                "cluster.ranks_per_node=1 and --nproc-per-node"
            )
        if config.task != "train":
            raise UserError(f"task={config.task} and a command of your own: leave one of them out")
    elif config.task == "prepare_data":
        _check_prepare(config)
    elif config.task == "eval":
        _check_evaluation(config)
    elif config.task == "serve":
        _check_serving(config)
    else:
        try:
            check_training(config, world_size(config))
        except ConfigError as error:
            raise UserError(str(error)) from error
        _check_float8(config)
        _check_tasks(config)
    if config.task not in ("eval", "serve") and (config.run is not None or config.step != "newest" or config.follow):
        raise UserError(
            "run, step and follow say what is evaluated or served: add task=eval or serve, or leave them out"
        )
    if isinstance(config.cluster, SlurmCluster):
        _check_slurm(config, config.cluster)
    elif isinstance(config.cluster, K8sCluster):
        k8s_rules.check(config, config.cluster)
    elif isinstance(config.cluster, TorchxCluster):
        _check_torchx(config, config.cluster)
    else:
        _check_local(config, config.cluster)


def _check_float8(config: RunConfig) -> None:
    train, hardware = config.train, config.hardware
    if train.float8 == "off" or train.float8_emulate or hardware is None or hardware.float8_tflops is not None:
        return
    raise UserError(
        f"train.float8={train.float8}: hardware={hardware.name} has no float8 products; set train.float8=off, or "
        "hardware.float8_tflops if it does"
    )


def _check_prepare(config: RunConfig) -> None:
    try:
        check_preparation(config.prepare)
    except ConfigError as error:
        raise UserError(str(error)) from error
    named = [("input", each) for each in config.prepare.input] + [("output", str(config.prepare.output))]
    if "/" in config.prepare.tokenizer:
        named.append(("tokenizer", config.prepare.tokenizer))
    for key, value in named:
        if "://" not in value and not value.startswith("/"):
            raise UserError(f"prepare.{key}={value}: a job runs in a folder of its own; give an absolute path or a URL")


def _check_evaluation(config: RunConfig) -> None:
    if not config.run:
        raise UserError("task=eval needs run=NAME, the run whose checkpoints are evaluated; `llmops status` lists them")
    try:
        check_evaluation(config, world_size(config))
    except ConfigError as error:
        raise UserError(str(error)) from error
    folder = config.eval.task_dir
    if folder is not None and not folder.startswith("/"):
        raise UserError(f"eval.task_dir={folder}: a job runs in a folder of its own; give an absolute path")


def _check_serving(config: RunConfig) -> None:
    if not config.run:
        raise UserError("task=serve needs run=NAME, the run whose model is served; `llmops status` lists them")
    if config.step == "every" or config.follow:
        raise UserError("task=serve: one checkpoint is served; give step=N or step=newest, and no follow")
    if world_size(config) > 1:
        raise UserError(
            f"task=serve runs as one process, and the cluster has {world_size(config)} ranks: set cluster.nodes=1 and "
            "cluster.ranks_per_node=1"
        )
    name = config.serve.api_key_env
    if name is not None and name not in config.secrets:
        raise UserError(f"serve.api_key_env={name}: the job gets its value by secrets=[{name}]")


def _check_tasks(config: RunConfig) -> None:
    """Of a training: what follows its commits is checked with it, or not at all."""
    if config.eval.every == "never":
        return
    try:
        check_tasks(config.eval)
    except ConfigError as error:
        raise UserError(str(error)) from error


def _check_environment(config: RunConfig) -> None:
    for name in [*config.env, *config.secrets]:
        where = "env" if name in config.env else "secrets"
        if not ENV_NAME.fullmatch(name):
            raise UserError(f"{where}: {name!r} is not the name of an environment variable; use letters, digits and _")
        if name.startswith("LLMOPS_") or name in RESERVED_ENV:
            instead = "set train.threads_per_rank instead" if name == "OMP_NUM_THREADS" else "use another name"
            raise UserError(f"{where}: {name} is set by llmops itself for every rank; {instead}")
    both = sorted(set(config.env) & set(config.secrets))
    if both:
        raise UserError(f"env.{both[0]} is also in secrets: keep it in secrets only, env is written to the run")


def _check_metrics(config: RunConfig) -> None:
    metrics = config.metrics
    _refuse_empty("metrics.host", metrics.host)
    if metrics.port == 65535:
        raise UserError("metrics.port=65535: the next one is the trainer's, and there is none; choose a lower one")
    gateway = metrics.pushgateway
    if gateway is not None and not re.fullmatch(r"https?://[^\s/]+\S*", gateway):
        raise UserError(f"metrics.pushgateway={gateway}: not a URL; give one such as http://pushgateway:9091")


def _check_stop(config: RunConfig) -> None:
    name = config.stop.signal
    if name is not None:
        if name not in signal.Signals.__members__:
            raise UserError(f"stop.signal={name}: no signal has this name; use one such as SIGTERM or SIGUSR1")
        if name in ("SIGKILL", "SIGSTOP"):
            raise UserError(f"stop.signal={name}: a program cannot handle it; use one such as SIGTERM or SIGUSR1")
    if config.retry.backoff_s > config.retry.backoff_max_s:
        raise UserError(
            f"retry.backoff_s={config.retry.backoff_s:g} is more than retry.backoff_max_s="
            f"{config.retry.backoff_max_s:g}: lower the first or raise the second"
        )


def _check_local(config: RunConfig, cluster: LocalCluster) -> None:
    if cluster.nodes != 1:
        raise UserError(
            f"cluster.nodes={cluster.nodes}: cluster=local is one machine; use cluster.ranks_per_node, or "
            "cluster=slurm or cluster=k8s"
        )
    if trains(config) and config.stop.local_grace_s < config.checkpoint.save_seconds:
        raise UserError(
            f"stop.local_grace_s={config.stop.local_grace_s:g} leaves less than checkpoint.save_seconds="
            f"{config.checkpoint.save_seconds:g} to save: raise the first or lower the second"
        )


def _check_torchx(config: RunConfig, cluster: TorchxCluster) -> None:
    for key in ("scheduler", "image", "python", "resource"):
        _refuse_empty(f"cluster.{key}", getattr(cluster, key))
    if cluster.scheduler is None:
        raise UserError("cluster.scheduler is not set: name one of TorchX's, as -o scheduler=aws_batch")
    sized = [key for key in ("cpus_per_node", "gpus_per_node", "memory_mb") if getattr(cluster, key) is not None]
    if cluster.resource is not None and sized:
        raise UserError(f"cluster.resource={cluster.resource} says what a node has: leave cluster.{sized[0]} out")
    if cluster.image is not None and (hidden := [*config.secrets, *notify_rules.secret_names(config.notify)]):
        raise UserError(
            f"secrets: {hidden[0]} cannot travel into an image through TorchX, whose requests others may read: let "
            "the scheduler or the image have it"
        )
    if trains(config) and cluster.grace_s - 5 < config.checkpoint.save_seconds:
        raise UserError(
            f"cluster.grace_s={cluster.grace_s} leaves less than checkpoint.save_seconds="
            f"{config.checkpoint.save_seconds:g} and 5 s for the way out: raise the first or lower the second"
        )


def _check_slurm(config: RunConfig, cluster: SlurmCluster) -> None:
    for key, value in _walk(cluster, "cluster."):
        if isinstance(value, str) and not key.startswith("cluster.setup"):
            _refuse_empty(key, value)
            if re.search(r"[\x00-\x1f\x7f]", value):
                raise UserError(f"{key}={value!r}: line breaks and control characters do not fit an sbatch option")
    _check_time(config, cluster)
    for key, text in (("cluster.mem", cluster.mem), ("cluster.mem_per_cpu", cluster.mem_per_cpu)):
        if text is not None and not re.fullmatch(r"\d+(\.\d+)?[KMGT]?B?", text, re.IGNORECASE):
            raise UserError(f"{key}={text}: expected a size such as 64G, or a number of MB")
    if cluster.mem is not None and cluster.mem_per_cpu is not None:
        raise UserError(
            f"cluster.mem={cluster.mem} and cluster.mem_per_cpu={cluster.mem_per_cpu}: set only one of them"
        )
    if cluster.gpus_per_node is not None and re.search(r"\bgpu\b", cluster.gres or ""):
        raise UserError(
            f"cluster.gres={cluster.gres} and cluster.gpus_per_node={cluster.gpus_per_node} both ask for GPUs: set one"
        )
    if cluster.comment is not None and len(cluster.comment.encode()) > COMMENT_BYTES:
        raise UserError(f"cluster.comment: {len(cluster.comment.encode())} bytes; SLURM takes {COMMENT_BYTES} at most")
    if cluster.mail_type is not None and re.search(r"[^A-Za-z0-9_,]", cluster.mail_type):
        raise UserError(f"cluster.mail_type={cluster.mail_type}: expected names such as END,FAIL")
    for option in cluster.extra:
        _check_extra(option)
    _check_container(cluster)


def _check_time(config: RunConfig, cluster: SlurmCluster) -> None:
    warning = warning_seconds(config)
    if warning > SIGNAL_S_MAX:
        raise UserError(f"cluster.signal_s={warning}: SLURM takes {SIGNAL_S_MAX} seconds at most")
    try:
        limit = time_limit_seconds(cluster.time)
    except ValueError as error:
        raise UserError(
            f'cluster.time={cluster.time}: expected minutes, "hours:minutes:seconds" or "days-hours:minutes:seconds", '
            "above zero"
        ) from error
    if limit is not None and warning >= limit:
        raise UserError(
            f"cluster.time={cluster.time} is {limit} s, but the run is warned {warning} s before it ends, to save: "
            "raise cluster.time, or lower cluster.signal_s (by default checkpoint.save_seconds + 90)"
        )
    if trains(config) and cluster.signal_s is not None and cluster.signal_s < config.checkpoint.save_seconds:
        raise UserError(
            f"cluster.signal_s={cluster.signal_s} leaves less than checkpoint.save_seconds="
            f"{config.checkpoint.save_seconds:g} to save: raise the first or lower the second"
        )


def _check_extra(option: str) -> None:
    if not option.startswith("-"):
        raise UserError(f"cluster.extra: {option!r} is not an sbatch option; write it as --name=value")
    flag = option.split("=", 1)[0].split()[0]
    name = flag if flag.startswith("--") else flag[:2]
    if name in TAKEN_OPTIONS:
        instead = TAKEN_OPTIONS[name]
        raise UserError(f"cluster.extra: llmops sets {name} itself; {f'use {instead}' if instead else 'remove it'}")


def _check_container(cluster: SlurmCluster) -> None:
    container = cluster.container
    if container.runtime == "none":
        for key in ("image", "mounts", "args"):
            if getattr(container, key):
                raise UserError(
                    f"cluster.container.{key} is set but cluster.container.runtime=none would ignore it: "
                    "set the runtime to pyxis or apptainer"
                )
        return
    if container.image is None:
        raise UserError(f"cluster.container.runtime={container.runtime} needs cluster.container.image: set it")
    for mount in container.mounts:
        if not re.fullmatch(r"/[^,:]*:/[^,:]*(:[^,:]+)?", mount):
            raise UserError(f"cluster.container.mounts: {mount!r} is not of the form /host/path:/container/path")


def _refuse_empty(key: str, value: Any) -> None:
    if value == "":
        raise UserError(f"{key} is empty: give it a value, or null to leave the choice open")


def _get(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _walk(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a struct, with its dotted key."""
    if hasattr(value, "__struct_fields__"):
        items: Any = ((name, getattr(value, name)) for name in value.__struct_fields__)
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = ((f"{index}", item) for index, item in enumerate(value))
    else:
        yield prefix.removesuffix("."), value
        return
    for name, item in items:
        yield from _walk(item, f"{prefix}{name}.")
