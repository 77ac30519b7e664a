"""What a run directory says, as types. ``records`` reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import msgspec

from llm.utils.structs import ready
from llmops.runs.store import Store

FORMAT = 1
Reason = Literal["finished", "preempted", "timeout", "failed", "hung", "node_failure", "cancelled"]
Next = Literal["requeue", "retry", "end", "wait"]


class Code(msgspec.Struct, frozen=True):
    """The code snapshot that every attempt runs from."""

    sha256: str
    git_commit: str | None = None
    dirty: bool = False


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``run.json``: what the run is. Never changes."""

    id: str
    name: str
    owner: str
    host: str
    created: float  # epoch seconds
    backend: str
    kind: str
    command: list[str]
    nodes: int
    ranks_per_node: int
    max_steps: int | None = None
    code: Code | None = None
    parent: str | None = None  # of a trial: its study
    cloned_from: str | None = None  # id of the run whose configuration this one began with
    params: dict[str, Any] = {}  # of a trial: where it is in the study's space, by axis key
    version: str = ""
    format: int = FORMAT


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``job.json``: the one job id that may run a submission."""

    job_id: str
    by: Literal["launcher", "job"]
    time: float


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """``failed.json``: the scheduler refused the submission."""

    error: str
    time: float


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """``intent.json``: the submission must not run again."""

    intent: Literal["end"] = "end"
    graceful: bool
    by: str
    time: float
    outcome: str = ""  # of a trial that its study stops: pruned, nan or timeout
    reason: str = ""  # of that, in words


class SubmissionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``submission.json``: written before the scheduler is called."""

    number: int
    tag: str
    backend: str
    created: float
    config: str = "config.yaml"
    trials: list[list[int]] = []  # of a study's submission: spans of the trials that its array runs, in its order
    study_submission: int | None = None  # of a trial's: which submission of its study started it
    login: str | None = None  # host on which its scheduler is asked, where the run's own place does not say


class AttemptStart(msgspec.Struct, frozen=True, kw_only=True):
    """``start.json``: who claimed the attempt, and the commit it resumes from."""

    number: int
    submission: int
    job_id: str
    hosts: list[str]
    time: float
    restart: int = 0
    resume_from: str | None = None
    resume_step: int = 0  # the last step that the commit holds; 0 from scratch
    resume_path: str | None = None  # where a program that is not ours said that its state is


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """The stop request that ended an attempt."""

    cause: str
    requested: float | None = None
    deadline: float | None = None


class AttemptEnd(msgspec.Struct, frozen=True, kw_only=True):
    """``end.json``: why the attempt ended, and what the supervisor decided."""

    time: float
    reason: Reason
    next: Next
    exit_codes: dict[str, int | None] = {}  # of each rank
    first_step: int | None = None
    last_step: int | None = None
    saved: bool = False  # every rank said that its state is saved
    error: str | None = None  # the last lines of the rank that failed
    failed_rank: int | None = None
    failed_host: str | None = None
    stop: Stop | None = None
    detail: str | None = ""


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """``image.json``: what the image's tag meant when its pods ran, as first seen."""

    digests: list[str]
    time: float


@dataclass(frozen=True)
class Submission:
    """One hand-over to a scheduler. A resume is a new one."""

    record: SubmissionRecord
    job: JobRecord | None = None
    failed: Failed | None = None
    intent: Intent | None = None
    image: Image | None = None
    login: str | None = None  # host on which this machine asks the scheduler; None for its own commands

    @property
    def number(self) -> int:
        return self.record.number

    @property
    def tag(self) -> str:
        return self.record.tag

    @property
    def backend(self) -> str:
        return self.record.backend

    @property
    def scheduler(self) -> str:
        """What :func:`llmops.backends.load` opens to ask for its job: ``slurm``, or ``slurm@login.example.org``."""
        return f"{self.backend}@{self.login}" if self.login and self.backend == "slurm" else self.backend

    @property
    def job_id(self) -> str | None:
        return self.job.job_id if self.job else None


@dataclass(frozen=True)
class Attempt:
    """One execution of the run."""

    start: AttemptStart
    end: AttemptEnd | None = None

    @property
    def number(self) -> int:
        return self.start.number


@dataclass(frozen=True)
class Run:
    """A run directory as it was when it was read."""

    store: Store
    id: str
    record: RunRecord | None
    submissions: list[Submission]
    attempts: list[Attempt]
    problems: list[str] = field(default_factory=list)  # what is missing or damaged, for people
    read: Store | None = None  # its files as they were then, where many runs were read at once

    @property
    def seen(self) -> Store:
        """For reading on about the moment at which the run was read."""
        return self.read or self.store

    @property
    def name(self) -> str:
        return self.record.name if self.record else self.id

    @property
    def backend(self) -> str:
        """Of the newest submission: a resume may go elsewhere."""
        if self.submissions:
            return self.submissions[-1].backend
        return self.record.backend if self.record else ""

    @property
    def scheduler(self) -> str:
        """Where the newest submission's job is asked for."""
        return self.submissions[-1].scheduler if self.submissions else self.backend

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def newest(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def job_ids(self) -> list[str]:
        """Job ids of all submissions, oldest first."""
        return [submission.job_id for submission in self.submissions if submission.job_id]

    @property
    def job_id(self) -> str | None:
        """The job of the newest submission."""
        return self.submissions[-1].job_id if self.submissions else None

    @cached_property
    def by_number(self) -> dict[int, Attempt]:
        return {attempt.number: attempt for attempt in self.attempts}


ready(RunRecord, JobRecord, Failed, Intent, SubmissionRecord, AttemptStart, AttemptEnd, Image)
