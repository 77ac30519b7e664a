"""What a cluster must run, in terms that no backend owns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

JobState = Literal["pending", "running", "completing", "finished", "failed", "cancelled", "gone", "unreachable"]


@dataclass(frozen=True)
class RetryPolicy:
    """When a failure is tried again. Preemptions and time limits are not failures and are not counted."""

    max_no_progress: int  # consecutive failed attempts that committed no new step
    max_failures: int  # failed attempts in the life of a submission
    backoff_s: float  # before the second attempt; doubles each time
    backoff_max_s: float


@dataclass(frozen=True)
class StopPolicy:
    """How long a stop request may take."""

    save_s: float  # how long the ranks need to save their state
    local_grace_s: float  # deadline where no scheduler sets one
    signal: str | None  # also sent to the top process of a program that takes no part in the control directory
    hang_s: float  # a rank whose heartbeat is older is hung; 0 turns the check off


@dataclass(frozen=True)
class Array:
    """A job of many elements that run alike, each of which is one trial of the study at ``run_url``."""

    trials: list[list[int]]  # spans of the trials' numbers; an element's index counts them in this order
    size: int
    parallel: int | None  # elements at a time; None leaves it to the backend


@dataclass(frozen=True)
class JobSpec:
    """Everything that the supervisor needs. Written to ``job/NNNN/spec.json``; holds no secret, only their names."""

    run_id: str
    name: str
    submission: int
    tag: str  # unique per submission; also the scheduler's job name
    backend: str
    run_url: str
    nodes: int
    ranks_per_node: int
    command: list[str]
    kind: Literal["llm", "command"]
    python: str
    env: dict[str, str]
    secrets: list[str]
    threads_per_rank: int
    code_archive: str | None
    retry: RetryPolicy
    stop: StopPolicy
    format: int = 1
    options: dict[str, Any] = field(default_factory=dict)  # of the backend
    array: Array | None = None  # then this is no run's, but what the runs of a study have in common
    metrics: dict[str, Any] = field(default_factory=dict)  # the section of the config
    notify: dict[str, Any] = field(default_factory=dict)  # the section of the config; no secret, only their names
    study: dict[str, Any] | None = None  # of a run that is a trial: url, trial, submission

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the supervisor reads it back without this class."""
        return asdict(self)


@dataclass(frozen=True)
class JobView:
    """What a scheduler says of one job. ``gone``: it knows nothing of it. ``unreachable``: it did not answer."""

    job_id: str
    state: JobState
    reason: str = ""  # in words, for people
    start_time: float | None = None  # epoch seconds, when known
    images: tuple[str, ...] = ()  # what the tag of its image was resolved to, by digest
