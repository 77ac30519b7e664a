"""What a study's directory says, as types. ``records`` reads and writes them.

::

    <runs_url>/<study id>/
        study.json            what is searched, and how trials are compared; never changes
        bases.json            the configuration that trials change, once for each choice of groups
        job/0000/ …           submissions, as in a run's directory; each is one array of trials
        job/0001/changes.json what the trials that it adds have other than the study
        results/0012-0000.json  how a trial ended, in the life that its run's submission 0000 gave it
        trials/<trial id>/    ordinary run directories, made by each trial's first attempt
        journal/              what samplers and pruners know, where the study needs them
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from llm.utils.structs import ready
from llmops.config.schema import SweepConfig
from llmops.runs.model import Code

FORMAT = 1
# A trial that is none of these is not over. ``nan``: its objective was no finite number, which counts as the worst.
Outcome = Literal["complete", "pruned", "nan", "timeout", "failed", "cancelled"]


class Axis(msgspec.Struct, frozen=True, kw_only=True):
    """One dimension of the space: a key of the configuration, or a group, and what it may be."""

    key: str
    kind: Literal["choice", "range", "interval"]
    group: bool = False
    values: list[Any] = []  # of a choice or range, in order
    low: float | None = None  # of an interval, both ends included; of a range, its first and last value
    high: float | None = None
    step: float | None = None  # of a range
    log: bool = False
    integer: bool = False


class StudyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``study.json``: what the study is. Never changes."""

    id: str
    name: str
    owner: str
    host: str
    created: float  # epoch seconds
    backend: str
    kind: Literal["llm", "command"]
    command: list[str]
    axes: list[Axis]
    sweep: SweepConfig
    trials: int  # at first; `sweep resume --trials` adds some
    base_digest: str  # of bases.json
    nodes: int
    ranks_per_node: int
    max_steps: int | None = None
    code: Code | None = None
    version: str = ""
    format: int = FORMAT


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """``job/NNNN/changes.json``: what the trials that a submission adds have other than the study."""

    axes: list[Axis]
    first: int  # number of the first trial of these axes
    bases: dict[str, dict[str, Any]]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """``results/<trial>-<submission>.json``: how a trial ended."""

    trial: int
    outcome: Outcome
    time: float
    value: float | None = None  # of the objective; None where there is none, or it is not finite
    step: int | None = None  # of the last value
    attempts: int = 0
    seconds: float = 0.0  # that its attempts ran, in all
    reason: str = ""  # in words
    submission: int = 0  # the run's own newest one, which this is the result of
    params: dict[str, Any] = {}  # by axis key


class TrialRow(msgspec.Struct, frozen=True, kw_only=True):
    """A trial as people look at it: the result where there is one, else what its run and its scheduler say."""

    trial: int
    id: str
    state: str  # an Outcome, or where it is not over: pending, running, preempted, unknown
    value: float | None = None
    step: int | None = None
    params: dict[str, Any] = {}  # by axis key; empty before the first attempt of a trial whose point is not known yet
    seconds: float = 0.0
    attempts: int = 0
    reason: str = ""
    job_id: str | None = None
    points: list[tuple[int, float]] = []  # step and objective, where they were asked for


class TrialSpec(msgspec.Struct, frozen=True, kw_only=True):
    """``study`` in the ``spec.json`` of a trial's submission: which trial this run is."""

    url: str  # of the study
    trial: int
    submission: int  # of the study


ready(StudyRecord, Changes, Result, TrialSpec)
