"""What llmops does with studies, as functions: beside :mod:`llmops.api`, which does it with runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops import api
from llmops.errors import UserError
from llmops.runs import records
from llmops.runs.store import default_runs_url, open_store

if TYPE_CHECKING:
    from llmops.sweep.launch import PreparedStudy
    from llmops.sweep.model import TrialRow
    from llmops.sweep.records import Study
    from llmops.sweep.resume import Plan


def prepare(
    overrides: Sequence[str] = (),
    *,
    backend: str | None = None,
    name: str | None = None,
    command: Sequence[str] = (),
    config_dir: Path | None = None,
    runs_url: str | None = None,
    trials: int | None = None,
    max_parallel: int | None = None,
    commands: Sequence[Sequence[str]] = (),
) -> PreparedStudy:
    """Read the space, check its points and the backend, without writing anything.

    ``commands``: whole command lines to choose from, as one more axis; ``command`` is one of them then. Raises
    :class:`UserError` for what cannot work.
    """
    from llmops.sweep import launch as sweeps
    from llmops.sweep.model import Axis

    full = api.all_overrides(overrides, backend, name, command)
    full += [f"sweep.trials={trials}"] if trials is not None else []
    full += [f"sweep.max_parallel={max_parallel}"] if max_parallel is not None else []
    axis = Axis(key="command", kind="choice", values=[list(each) for each in commands]) if commands else None
    return sweeps.prepare(full, config_dir, runs_url, axis)


def dry_run(prepared: PreparedStudy) -> str:
    """The script or objects that would be submitted, but for the random parts of their names."""
    from llmops.sweep import launch as sweeps

    return sweeps.dry_run(prepared)


def start(prepared: PreparedStudy, objects: Mapping[str, bytes] | None = None) -> Study:
    """Submit all trials of a prepared study. ``objects``: more that its jobs need."""
    from llmops.sweep import launch as sweeps

    return sweeps.start(prepared, objects)


def find(ref: str | None, runs_url: str | None = None) -> Study:
    """The study that ``ref`` means (name, id or unambiguous prefix); the newest one when it is None."""
    from llmops.sweep.records import load_study

    url = runs_url or default_runs_url()
    store = open_store(url)
    if ref is not None:
        return load_study(store.sub(records.find_study(url, ref)))
    ids = records.list_studies(store)
    if not ids:
        raise UserError(f"there are no studies in {url}; `llmops sweep` starts one")
    return load_study(store.sub(ids[-1]))


def trials(study: Study, with_points: bool = False) -> list[TrialRow]:
    """All trials of a study, as they are now; with their learning curves where asked for."""
    from llmops.sweep import status as sweeps

    reading = sweeps.read(sweeps.settle(adopt(study)), with_points)
    return reading.rows(api.survey([], reading.wanted)[1])


def describe(study: Study, rows: Sequence[TrialRow]) -> dict[str, Any]:
    """The stable JSON object of ``llmops sweep status --json``."""
    from llmops.sweep import report

    summary = report.summary(study.record, rows)
    return {"id": study.id, "name": study.record.name, "url": study.url, **summary, "trials": _plain(rows)}


def _plain(value: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


def adopt(study: Study) -> Study:
    """The study with jobs registered that were accepted without an answer."""
    from llmops.sweep.records import load_study

    lost = {each.tag: each for each in study.submissions if not each.job_id and not each.failed}
    for name in {each.scheduler for each in lost.values()}:
        mine = {tag: each.number for tag, each in lost.items() if each.scheduler == name}
        named = {tag: job_id for tag, number in mine.items() if (job_id := api.expected_job(study.store, number))}
        look = api.ask(name, list(named.values()), [tag for tag in mine if tag not in named])
        for tag, job_id in {**look.found, **api.those_there(named, look)}.items():
            records.register_job(study.store, lost[tag].number, job_id, "launcher")
    return load_study(study.store) if lost else study


def plan(study: Study, overrides: Sequence[str], add: int, allow_changes: bool = False) -> Plan:
    """Which trials a resume would run. Raises :class:`UserError` for changes, unless they are allowed."""
    from llmops.sweep import resume as sweeps

    if add < 0:
        raise UserError(f"--trials {add}: give how many trials to add, 0 or more")
    rows = trials(study)
    return sweeps.plan(find(study.id, records.root_of(study.url)), rows, overrides, add, allow_changes)


def resume(study: Study, plan: Plan, max_parallel: int | None = None) -> Study:
    """Submit what was planned."""
    from llmops.sweep import resume as sweeps

    return sweeps.resume(study, plan, max_parallel)


def cancel(study: Study, graceful: bool = False, wait: bool = True) -> dict[str, Any]:
    """End a study for good; what ``llmops status`` says of it then. ``wait``: as for :func:`llmops.api.cancel`."""
    from llmops.sweep import cancel as sweeps
    from llmops.sweep import status

    def live() -> dict[int, str]:
        states = ("running", "preempted")
        return {row.trial: row.job_id for row in trials(study) if row.state in states and row.job_id}

    sweeps.cancel_study(adopt(study), graceful, live())
    deadline = time.monotonic() + (api.SAVE_TIMEOUT_S if graceful else api.CANCEL_TIMEOUT_S)
    pause = 0.2
    while wait and live() and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
    return status.describe(find(study.id, records.root_of(study.url)), trials(study))


def is_study(ref: str, runs_url: str | None = None) -> bool:
    """Whether ``ref`` means a study, and no run."""
    return records.is_study(runs_url or default_runs_url(), ref)


def is_waiting(ref: str, runs_url: str | None = None) -> bool:
    """Whether ``ref`` means a trial that has not begun yet, as ``STUDY/12``."""
    study_ref, slash, number = ref.rpartition("/")
    if not slash or not number.isdigit():
        return False
    study = find(study_ref, runs_url)
    return int(number) in study.trials() and not study.trial_store(int(number)).exists("run.json")


def cancel_waiting(ref: str, runs_url: str | None = None) -> None:
    """Cancel a trial for which :func:`is_waiting` is true."""
    from llmops.sweep import cancel as sweeps

    study_ref, _, number = ref.rpartition("/")
    sweeps.cancel_waiting(find(study_ref, runs_url), int(number))
