"""A study goes on: trials that failed or vanished run again, a bounded number of times, and more may be added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from llmops import launch
from llmops.config import groups
from llmops.config.compose import Composed
from llmops.config.recompose import apply, recompose
from llmops.errors import UserError
from llmops.runs import records as runs
from llmops.runs.store import open_store
from llmops.sweep import compose, points, records, space, status
from llmops.sweep.launch import batches, check_backend, submit
from llmops.sweep.model import Axis, Changes, TrialRow

AGAIN = ("failed", "cancelled", "unknown")


@dataclass(frozen=True)
class Plan:
    """What a resume would submit."""

    again: list[int]  # trials that ran before
    new: list[int]  # trials that are added
    given_up: list[int]  # those that failed as often as the study allows
    composed: Composed  # of the study, with what was changed
    changes: Changes | None  # where trials will not be comparable with those before

    @property
    def trials(self) -> list[int]:
        """All, in order."""
        return [*self.again, *self.new]


def plan(
    study: records.Study, rows: Sequence[TrialRow], overrides: Sequence[str], add: int, allow_changes: bool
) -> Plan:
    """Which trials would run: those that ended without a value or never ran, and ``add`` new ones.

    Overrides of where and how trials run are always taken. Raises :class:`UserError` for others, and for a space that
    is not the study's, unless ``allow_changes``; and where the space has no more points.
    """
    asked = space.parse(overrides, groups.read(None).options())
    bases, composed = _changed(study, asked.fixed)
    axes = space.shuffle(asked, study.record.sweep.seed) or study.record.axes
    differs = "another space" if axes != study.record.axes else ""
    differs = differs or ("another base configuration" if bases.digest() != study.record.base_digest else "")
    if differs and not allow_changes:
        raise UserError(
            f"{study.id}: this is {differs} than the study's, whose trials could not be compared with the new ones; "
            "start another study, or say --allow-changes"
        )
    again: list[int] = []
    given_up: list[int] = []
    for row in rows:
        if row.state in AGAIN:
            tried = len(status.elements_of(study, row.trial))
            (again if tried <= composed.config.sweep.max_reruns else given_up).append(row.trial)
    first = max(study.trials(), default=-1) + 1
    changes = Changes(axes=axes, first=first if axes != study.record.axes else 0, bases=bases.found)
    _check_room(study, axes, first - changes.first, add)
    for trial in range(first, first + add):
        values = points.point(axes, study.record.sweep, trial - changes.first)
        for each in [values] if values is not None else points.corners(axes) if trial == first else []:
            bases.config(axes, each)
    return Plan(again, list(range(first, first + add)), given_up, composed, changes if differs else None)


def resume(study: records.Study, plan: Plan, max_parallel: int | None) -> records.Study:
    """Submit what was planned."""
    root = open_store(runs.root_of(study.url))
    prepared = launch.prepare(plan.composed, root.url, again=True)
    base = launch.Prepared(**{**vars(prepared), "run_id": study.id, "name": study.record.name})
    code = study.record.code
    archive = f"{root.job_url}/{runs.archive_path(code.sha256)}" if code else None
    spec = launch.stored_spec(study.store, study.submissions[-1].number) if study.submissions else None
    work_dir = (spec or {}).get("options", {}).get("work_dir")
    parallel = max_parallel or plan.composed.config.sweep.max_parallel
    most = check_backend(base, len(plan.trials), parallel)
    origin = launch.Origin(archive, work_dir, parallel=parallel, python=(spec or {}).get("python"))
    submit(base, study.store, batches(plan.trials, most), origin, plan.changes)
    return records.load_study(study.store)


def _changed(study: records.Study, overrides: Sequence[str]) -> tuple[compose.Bases, Composed]:
    """The study's bases and its configuration with values changed."""
    bases = compose.Bases.from_bytes(study.store.get("bases.json"))
    text = study.store.get("config.yaml").decode()
    composed = recompose(text, overrides)
    for base in bases.found.values():
        apply(base, overrides)
    searching = msgspec.structs.replace(composed.config.sweep, max_parallel=None, max_reruns=0)
    if searching != msgspec.structs.replace(study.record.sweep, max_parallel=None, max_reruns=0):
        raise UserError(f"{study.id}: how a study chooses and compares its trials cannot change; start another one")
    return bases, composed


def _check_room(study: records.Study, axes: Sequence[Axis], first: int, add: int) -> None:
    most = space.size(axes)
    if add and most is not None and study.record.sweep.sampler in ("grid", "random") and first + add > most:
        raise UserError(f"--trials {add}: the space has {most} points, and {first} of them are in the study already")
    if first + add > points.MAX_TRIALS:
        raise UserError(f"--trials {add}: {points.MAX_TRIALS:,} trials are the most, and the study has {first:,}")
