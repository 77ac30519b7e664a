"""The typed configuration of a run: what a user may set, with its type and default.

Rules that span several keys are in :mod:`llmops.config.rules`; ``conf/`` lists every key with a comment.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llm.estimate.hardware import HardwareConfig
from llm.inference.serving import ServeConfig
from llm.utils.config import (
    CheckpointConfig,
    DataConfig,
    DistConfig,
    EvalConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrepareConfig,
    ProfileConfig,
    TrainConfig,
)
from llm.utils.structs import ready

Multiplier = Annotated[int, Meta(ge=1, le=100_000)]
Port = Annotated[int, Meta(ge=1, le=65535)]


class CodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of the working tree travels with the run."""

    enabled: bool = True
    root: str | None = None
    max_mb: PositiveFloat = 100.0
    exclude: list[str] = []


class RetryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a failure is tried again."""

    max_no_progress: PositiveInt = 3
    max_failures: NonNegativeInt = 20
    backoff_s: NonNegativeFloat = 2.0
    backoff_max_s: NonNegativeFloat = 60.0


class StopConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a stop request may take, and when a silent rank counts as hung."""

    local_grace_s: PositiveFloat = 120.0
    signal: str | None = None
    hang_s: NonNegativeFloat = 1800.0


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run's jobs serve to Prometheus. ``None`` leaves a choice to the job."""

    enabled: bool = True
    host: str | None = None
    port: Port | None = None
    pushgateway: str | None = None


Event = Literal["finished", "failed", "crash_loop", "preempted"]


class EmailConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a notification is sent as mail. ``password`` is the name of a variable, as in ``env:SMTP_PASSWORD``."""

    to: list[str] = []
    sender: str | None = None
    host: str = "localhost"
    port: Port = 25
    tls: Literal["none", "starttls", "tls"] = "none"
    user: str | None = None
    password: str | None = None


class NotifyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whom a run tells when something happens to it. ``webhook`` is the name of a variable, as in ``env:SLACK_URL``."""

    events: list[Event] = msgspec.field(default_factory=lambda: ["finished", "failed", "crash_loop", "preempted"])
    webhook: str | None = None
    email: EmailConfig = EmailConfig()
    command: list[str] = []
    preemptions: PositiveInt = 5
    window_h: PositiveFloat = 24.0
    every_minutes: NonNegativeFloat = 10.0


class ContainerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The container that the job's program runs in."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    image: str | None = None
    mounts: list[str] = []
    args: list[str] = []


class PrunerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which trials of a sweep are stopped early. Steps are training steps."""

    name: Literal["none", "median", "asha", "hyperband"] = "none"
    min_step: NonNegativeInt = 0
    startup_trials: NonNegativeInt = 5
    reduction_factor: Annotated[int, Meta(ge=2)] = 3


class SweepConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How `llmops sweep` chooses, compares and limits the trials of a study. A plain run has no use for it."""

    sampler: Literal["grid", "random", "tpe", "cmaes"] = "grid"
    trials: PositiveInt | None = None
    max_parallel: PositiveInt | None = None
    seed: NonNegativeInt = 0
    objective: str = "eval/loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    reduce: Literal["last", "best", "mean"] = "last"
    mean_of: PositiveInt = 10
    report_every: PositiveInt | None = None
    stop_on_nan: bool = True
    trial_minutes: PositiveFloat | None = None
    max_reruns: NonNegativeInt = 2
    storage: str | None = None
    pruner: PrunerConfig = PrunerConfig()


class LocalCluster(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="backend", tag="local"
):
    """Processes on this machine."""

    nodes: PositiveInt = 1
    ranks_per_node: Multiplier = 1
    python: str | None = None


class SlurmCluster(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="backend", tag="slurm"
):
    """One SLURM job. ``None`` leaves a choice to the cluster."""

    host: str | None = None
    nodes: Multiplier = 1
    ranks_per_node: Multiplier = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: NonNegativeInt | None = None
    gres: str | None = None
    cpus_per_rank: PositiveInt | None = None
    mem: str | None = None
    mem_per_cpu: str | None = None
    time: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    mail_user: str | None = None
    mail_type: str | None = None
    comment: str | None = None
    dependency: str | None = None
    container: ContainerConfig = ContainerConfig()
    setup: list[str] = []
    extra: list[str] = []
    signal_s: PositiveInt | None = None
    log_dir: str | None = None
    template: str | None = None
    python: str | None = None


class Mount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A volume in every pod. Exactly one of ``pvc`` to ``memory`` says what it is; sizes may be empty for no limit."""

    path: str
    name: str | None = None
    pvc: str | None = None
    host_path: str | None = None
    config_map: str | None = None
    secret: str | None = None
    empty_dir: str | None = None
    memory: str | None = None
    read_only: bool = False
    sub_path: str | None = None


MOUNT_SOURCES = ("pvc", "host_path", "config_map", "secret", "empty_dir", "memory")


class SecretKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One value inside a Kubernetes Secret."""

    secret: str
    key: str


class SecurityConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the container may do. The defaults pass Kubernetes' "restricted" Pod Security Standard."""

    non_root: bool = True
    run_as_user: NonNegativeInt | None = 65534
    run_as_group: NonNegativeInt | None = None
    fs_group: NonNegativeInt | None = None
    read_only_root: bool = True
    drop_capabilities: bool = True
    add_capabilities: list[str] = []
    no_privilege_escalation: bool = True
    seccomp: bool = True
    privileged: bool = False


class K8sCluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="backend", tag="k8s"):
    """One workload of a Kubernetes cluster, with one pod per node. ``None`` leaves a choice to the cluster."""

    nodes: Multiplier = 1
    ranks_per_node: Multiplier = 1
    workload: Literal["auto", "job", "jobset", "pytorchjob", "trainjob"] = "auto"
    context: str | None = None
    namespace: str | None = None
    kubeconfig: str | None = None
    image: str | None = None
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    image_pull_secrets: list[str] = []
    python: str | None = None
    work_dir: str | None = None
    gpus_per_node: NonNegativeInt | None = None
    gpu_resource: str = "nvidia.com/gpu"
    cpus: str | None = None
    memory: str | None = None
    ephemeral_storage: str | None = None
    resources: dict[str, str] = {}
    shm: str | None = None
    mounts: list[Mount] = []
    secret_env: dict[str, SecretKey] = {}
    config_env: list[str] = []
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] = {}
    topology_spread: list[dict[str, Any]] = []
    priority_class: str | None = None
    queue: str | None = None
    scheduler: str | None = None
    gang: Literal["none", "volcano", "coscheduling"] = "none"
    service_account: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    security: SecurityConfig = SecurityConfig()
    host_network: bool = False
    grace_s: PositiveInt | None = None
    wait_s: PositiveInt = 1800
    active_deadline_s: PositiveInt | None = None
    ttl_s: NonNegativeInt | None = None
    patches: dict[str, dict[str, Any]] = {}
    template: str | None = None


class TorchxCluster(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="backend", tag="torchx"
):
    """One app of a TorchX scheduler, with one replica per node. ``None`` leaves a choice to the scheduler."""

    nodes: Multiplier = 1
    ranks_per_node: Multiplier = 1
    scheduler: str | None = None
    options: dict[str, str] = {}
    image: str | None = None
    cpus_per_node: PositiveInt | None = None
    gpus_per_node: NonNegativeInt | None = None
    memory_mb: PositiveInt | None = None
    resource: str | None = None
    mounts: list[str] = []
    max_retries: NonNegativeInt = 0
    grace_s: PositiveInt = 30
    wait_s: PositiveInt = 1800
    python: str | None = None


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole run. ``command`` is empty for the built-in programs, of which ``task`` chooses one."""

    name: str | None = None
    runs_url: str | None = None
    task: Literal["train", "prepare_data", "eval", "serve"] = "train"
    run: str | None = None
    step: PositiveInt | Literal["newest", "every"] = "newest"
    follow: bool = False
    command: list[str] = []
    secrets: list[str] = []
    env: dict[str, str] = {}
    code: CodeConfig = CodeConfig()
    retry: RetryConfig = RetryConfig()
    stop: StopConfig = StopConfig()
    metrics: MetricsConfig = MetricsConfig()
    notify: NotifyConfig = NotifyConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    lora: LoraConfig = LoraConfig()
    sweep: SweepConfig = SweepConfig()
    cluster: LocalCluster | SlurmCluster | K8sCluster | TorchxCluster
    model: ModelConfig
    train: TrainConfig
    dist: DistConfig
    data: DataConfig
    prepare: PrepareConfig = PrepareConfig()
    eval: EvalConfig
    serve: ServeConfig = ServeConfig()
    checkpoint: CheckpointConfig
    hardware: HardwareConfig | None = None


CLUSTERS: dict[str, type[LocalCluster] | type[SlurmCluster] | type[K8sCluster] | type[TorchxCluster]] = {
    "local": LocalCluster,
    "slurm": SlurmCluster,
    "k8s": K8sCluster,
    "torchx": TorchxCluster,
}


def backend(config: RunConfig) -> str:
    """The name of the backend that ``config.cluster`` is for, one of :data:`CLUSTERS`."""
    return next(name for name, struct in CLUSTERS.items() if isinstance(config.cluster, struct))


def trains(config: RunConfig) -> bool:
    """Is this a run of the built-in trainer?"""
    return not config.command and config.task == "train"


def world_size(config: RunConfig) -> int:
    """Number of ranks over all nodes."""
    return config.cluster.nodes * config.cluster.ranks_per_node


def warning_seconds(config: RunConfig) -> int:
    """Seconds before a SLURM time limit at which the scheduler warns the job, so that it saves and is requeued."""
    if isinstance(config.cluster, SlurmCluster) and config.cluster.signal_s is not None:
        return config.cluster.signal_s
    return math.ceil(config.checkpoint.save_seconds) + 90


def pod_grace_seconds(cluster: K8sCluster, save_s: float) -> int:
    """Seconds between the request to a pod to end and its being killed; ``save_s``: ``checkpoint.save_seconds``."""
    return cluster.grace_s if cluster.grace_s is not None else math.ceil(save_s) + 30


def time_limit_seconds(text: str | None) -> int | None:
    """A time limit as sbatch reads it, in seconds; ``None`` for no limit of the run's own.

    Forms: ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``, ``days-hours:minutes``,
    ``days-hours:minutes:seconds``, ``UNLIMITED``. Raises :class:`ValueError` for anything else.
    """
    if text is None or text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise ValueError(text)
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, *[*numbers, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError(text)
    return total


ready(RunConfig)
