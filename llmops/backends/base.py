"""The verbs of a backend. Each backend is one module with these functions in a class; none imports another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmops.job import JobSpec, JobView


class Rejected(Exception):
    """The scheduler refused the job for good: there is none, and sending the same again would not help."""


class Ambiguous(Exception):
    """The scheduler did not answer in time: there may be a job, now or later. It must not be sent again."""


@dataclass(frozen=True)
class Submission:
    """What is handed to the scheduler."""

    spec: JobSpec
    agent: Path | None  # the supervisor, where the run store is a folder; else it is inside what is submitted
    text: str  # as rendered, and as it lies in the run directory
    hidden_env: Sequence[str]  # names that must not be inherited: the values of secrets travel by file


@dataclass(frozen=True)
class Look:
    """One look at a scheduler: ``views`` by job id, those of ``found`` included; ``found``: job ids by tag."""

    views: dict[str, JobView]
    found: dict[str, str]


@dataclass(frozen=True)
class ArrayLimits:
    """How many elements an array may have, and how many jobs the cluster holds; None for no limit."""

    elements: int | None = None
    jobs: int | None = None


class Backend(Protocol):
    """Where jobs run."""

    name: str
    text_name: str  # the file in the run directory that keeps what was submitted
    own_image: bool  # jobs run in an image: this machine's interpreter, folders and secrets mean nothing there

    def check(self, cluster: Any, run_url: str) -> None:
        """Refuse, before anything is written, what the scheduler would refuse or leave pending for ever."""

    def options(self, cluster: Any, spec_values: Mapping[str, Any]) -> dict[str, Any]:
        """The backend's own part of ``JobSpec.options``."""

    def render(self, cluster: Any, spec: JobSpec, agent: Path | None) -> str:
        """The text that will be submitted. ``agent``: see :class:`Submission`."""

    def submit(self, submission: Submission) -> str:
        """Submit and return the job id. Raises :class:`Rejected` or :class:`Ambiguous`."""

    def look(self, job_ids: Sequence[str], tags: Sequence[str] = ()) -> Look:
        """Views of any number of jobs, and jobs by tag, with at most one query of each kind for all of them."""

    def find(self, tag: str) -> str | None:
        """The job that carries this tag. Raises :class:`ClusterError` when the scheduler does not answer."""

    def array_limits(self, cluster: Any, parallel: int | None) -> ArrayLimits:
        """Of this cluster, as it is now. ``parallel``: elements at a time that were asked for.

        Raises :class:`UserError` for what no array can be there, and :class:`ClusterError` when it does not answer.
        """

    def element(self, job_id: str, index: int) -> str:
        """The job id of one element of an array, for :meth:`look` and :meth:`cancel`."""

    def cancel(self, job_ids: Sequence[str], graceful: bool) -> None:
        """Ask for the jobs to end; their intent is recorded already."""
