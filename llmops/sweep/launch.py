"""From the command line of a sweep to its jobs: everything that cannot work is said before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmops import __version__, launch
from llmops.config import groups
from llmops.config.compose import finish
from llmops.config.schema import RunConfig
from llmops.errors import UserError
from llmops.runs import records as runs
from llmops.runs.store import Store
from llmops.sweep import compose, objective, points, records, space
from llmops.sweep.model import Axis, Changes, StudyRecord
from llmops.sweep.optimizer import database_url, needed

CHECKED = 10_000  # points of a grid or random study that are checked one by one before anything is submitted


@dataclass(frozen=True)
class PreparedStudy:
    """A study that could be submitted: nothing is written yet."""

    base: launch.Prepared  # its first configuration, under the study's own id
    record: StudyRecord
    bases: compose.Bases
    most: int | None  # elements of an array

    @property
    def parallel(self) -> int | None:
        """Trials at a time."""
        return self.record.sweep.max_parallel


def prepare(
    overrides: Sequence[str], config_dir: Path | None, runs_url: str | None, commands: Axis | None = None
) -> PreparedStudy:
    """Read the space, compose its bases, check its points and ask the backend.

    ``commands``: an axis whose values are whole command lines, for those who make them themselves. Raises
    :class:`UserError` for what cannot work, with the number of trials that it would have made.
    """
    found = space.parse(overrides, groups.read(config_dir).options())
    swept = found.axes if commands is None else [*found.axes, commands]
    bases = compose.compose(swept, found.fixed, config_dir)
    first = finish(next(iter(bases.found.values())), "the sweep")
    config = first.config
    axes = [*space.shuffle(found, config.sweep.seed), *([commands] if commands else [])]
    trials = points.total(axes, config.sweep)
    try:
        check(config, axes, bases, trials)
        full = first._replace(yaml_text=compose.text(first))
        prepared = launch.prepare(full, runs_url)
        most = check_backend(prepared, trials, config.sweep.max_parallel)
    except UserError as error:
        raise UserError(f"{error} (nothing was submitted of {trials:,} trials)") from error
    study = launch.Prepared(**{**vars(prepared), "run_id": runs.study_id(prepared.run_id)})
    record = StudyRecord(
        id=study.run_id,
        name=study.name,
        owner=study.owner,
        host=study.host,
        created=study.created,
        backend=study.backend.name,
        kind="command" if config.command else "llm",
        command=list(config.command),
        axes=axes,
        sweep=config.sweep,
        trials=trials,
        base_digest=bases.digest(),
        nodes=config.cluster.nodes,
        ranks_per_node=config.cluster.ranks_per_node,
        max_steps=None if config.command else config.train.max_steps,
        version=__version__,
    )
    ready = PreparedStudy(study, record, bases, most)
    dry_run(ready)  # what a template of the user's own gets wrong is said now, before anything is written
    return ready


def check(config: RunConfig, axes: Sequence[Axis], bases: compose.Bases, trials: int) -> None:
    """Refuse points that no run could be at, and settings of the study that contradict each other."""
    sweep = config.sweep
    if config.eval.every != "never":
        raise UserError(f"eval.every={config.eval.every}: trials are not followed; evaluate the best one afterwards")
    if config.task != "train":
        raise UserError(f"task={config.task}: a sweep compares trainings; submit this as a run")
    try:
        objective.check(sweep.objective)
    except ValueError as error:
        raise UserError(f"sweep.objective={sweep.objective}: {error}") from error
    if sweep.objective == objective.NONE and needed(sweep):
        raise UserError("sweep.objective=none: samplers that learn and pruners compare trials by one; name it")
    if sweep.storage is not None:
        database_url(sweep.storage)
    if not config.command and sweep.objective.startswith("eval/"):
        if not config.eval.batches:
            raise UserError(
                f"sweep.objective={sweep.objective}: eval.batches=0 turns evaluation off; set it, or take step/loss"
            )
        if sweep.pruner.name != "none" and not config.eval.every_steps:
            raise UserError(
                f"sweep.pruner.name={sweep.pruner.name}: there is only one {sweep.objective}, at the end of a trial; "
                "set eval.every_steps, or sweep.objective=step/loss"
            )
    if sweep.sampler == "cmaes" and all(axis.kind == "choice" for axis in axes):
        raise UserError("sweep.sampler=cmaes: it moves along intervals and ranges, and there is none; use sweep=tpe")
    known = [points.point(axes, sweep, trial) for trial in range(min(trials, CHECKED))]
    for values in known if known[0] is not None else points.corners(axes):
        bases.config(axes, values or {})


def check_backend(prepared: launch.Prepared, trials: int, parallel: int | None) -> int | None:
    """How many of the trials one array may hold; None for all.

    ``parallel``: trials at a time that were asked for. Raises :class:`UserError` for what the cluster cannot run.
    """
    limits = prepared.backend.array_limits(prepared.config.cluster, parallel)
    if limits.jobs is not None and trials > limits.jobs:
        raise UserError(
            f"{trials:,} trials are more than the {limits.jobs:,} jobs that the cluster holds at a time (MaxJobCount); "
            "sweep fewer values"
        )
    return limits.elements


def dry_run(prepared: PreparedStudy) -> str:
    """What would be submitted, but for the random parts of its names; the first script of several."""
    base = prepared.base
    origin = launch.dry_origin(base)
    batch = batches(range(prepared.record.trials), prepared.most)[0]
    full = launch.Origin(origin.archive, trials=batch, parallel=prepared.parallel)
    spec = launch.job_spec(base, 0, launch.new_tag(base.run_id, 0), "config.yaml", full)
    return base.backend.render(base.config.cluster, spec, launch.agent_path(base))


def batches(trials: Sequence[int], most: int | None) -> list[Sequence[int]]:
    """One array for all trials, or as few as the cluster allows, of ``most`` elements each."""
    step = most or len(trials)
    return [trials[start : start + step] for start in range(0, len(trials), step)]


def start(prepared: PreparedStudy, objects: Mapping[str, bytes] | None = None) -> records.Study:
    """Write the study, with further ``objects`` that its jobs need, and submit its trials."""
    base = prepared.base
    code, archive = launch.snapshot(base)
    record = msgspec.structs.replace(prepared.record, code=code)
    store = records.create_study(base.runs.url, record, base.composed.yaml_text.encode(), prepared.bases.to_bytes())
    launch.write_objects(store, objects or {})
    arrays = batches(range(record.trials), prepared.most)
    submit(base, store, arrays, launch.Origin(archive, parallel=prepared.parallel))
    return records.load_study(store)


def submit(
    base: launch.Prepared,
    study: Store,
    arrays: Sequence[Sequence[int]],
    origin: launch.Origin,
    changes: Changes | None = None,
) -> None:
    """Hand trials to the scheduler, one submission an array. ``study``: its directory."""
    number = runs.next_submission(study)
    for trials in arrays:
        if changes is not None:
            records.write_changes(study, number, changes)
        launch.submit(base, study, number, "config.yaml", dataclasses.replace(origin, trials=trials))
        number += 1
