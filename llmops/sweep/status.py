"""How a study's trials are doing: results where there are some, else their runs and one look at the scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import msgspec

from llmops import backends
from llmops.errors import ClusterError, UserError
from llmops.job import JobView
from llmops.monitor.describe import EMPTY
from llmops.runs import records as runs
from llmops.runs.model import Run, Submission
from llmops.runs.state import derive_state
from llmops.sweep import objective, points, records
from llmops.sweep.model import Outcome, Result, TrialRow

OUTCOMES: tuple[str, ...] = get_args(Outcome)
READERS = 16  # runs that are read at a time where each object costs a round trip
RERUN = ("failed", "cancelled")  # outcomes after which a trial may have gone on since


@dataclass(frozen=True)
class Element:
    """What of the scheduler a trial is: element ``index`` of a submission of its study."""

    submission: Submission
    index: int
    cancelled: bool = False  # before it began

    @property
    def job_id(self) -> str | None:
        """None where the submission has no job, or it is not known."""
        job_id = self.submission.job_id
        return None if job_id is None else backends.load(self.submission.scheduler).element(job_id, self.index)


def elements(study: records.Study) -> dict[int, Element]:
    """The newest element of each trial."""
    found: dict[int, Element] = {}
    cancelled = records.load_cancelled(study)
    for submission in study.submissions:
        for index, trial in enumerate(runs.unpack(submission.record.trials)):
            found[trial] = Element(submission, index, (submission.number, trial) in cancelled)
    return found


@dataclass(frozen=True)
class Reading:
    """A study and its runs as they were read; what they say of trials depends on what the schedulers say of their jobs.

    ``wanted``: ids of the jobs that trials without a result may have, by backend.
    """

    study: records.Study
    with_points: bool
    live: list[int]  # trials that have no result of their newest life
    loaded: dict[int, Run]
    newest: dict[int, Element]
    wanted: dict[str, list[str]]

    def rows(self, views: Mapping[str, JobView]) -> list[TrialRow]:
        """One row a trial, in order. ``views`` by job id, of those that were ``wanted``."""
        study, sweep, live = self.study, self.study.record.sweep, set(self.live)
        found = []
        for trial in study.trials():
            run, result = self.loaded.get(trial), None if trial in live else study.results[trial]
            wanted = run is not None and run.record is not None and (self.with_points or result is None)
            series = objective.series(run, sweep) if run is not None and wanted else []
            row = _row(study, result) if result else _open_row(study, trial, self.newest.get(trial), run, views, series)
            found.append(msgspec.structs.replace(row, points=series if self.with_points else []))
        return found


def read(study: records.Study, with_points: bool = False) -> Reading:
    """Read what rows need. ``with_points``: also the objective's values over the steps of each."""
    newest = elements(study)
    begun = {int(name.rsplit(".", 1)[1]) for name in study.store.list("trials") if name.rsplit(".", 1)[-1].isdigit()}
    trials = study.trials()
    live = [trial for trial in trials if _is_open(study, trial, trial in begun)]
    again = set(live)
    chosen = [trial for trial in trials if trial in begun and (with_points or trial in again)]
    loaded = dict(zip(chosen, _load(study, chosen), strict=True))
    wanted: dict[str, dict[str, None]] = {}
    for trial in live:
        element, run = newest.get(trial), loaded.get(trial)
        if element and element.job_id:
            wanted.setdefault(element.submission.scheduler, {})[element.job_id] = None
        if run and run.job_id:
            wanted.setdefault(run.scheduler, {})[run.job_id] = None
    jobs = {name: list(job_ids) for name, job_ids in wanted.items()}
    return Reading(study, with_points, live, loaded, newest, jobs)


def _is_open(study: records.Study, trial: int, begun: bool) -> bool:
    """Whether the trial has no result, or has gone on after the one that it has."""
    result = study.results.get(trial)
    if result is None:
        return True
    newest = elements_of(study, trial)
    if newest and newest[-1].record.created > result.time:
        return True
    if result.outcome not in RERUN or not begun:
        return False
    return runs.next_submission(study.trial_store(trial)) - 1 > result.submission


def elements_of(study: records.Study, trial: int) -> list[Submission]:
    """The study's submissions that have run this trial, oldest first."""
    return [each for each in study.submissions if any(first <= trial <= last for first, last in each.record.trials)]


def _load(study: records.Study, trials: Sequence[int]) -> list[Run]:
    if study.store.local_path is not None:
        return [records.load_trial(study, trial) for trial in trials]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda trial: records.load_trial(study, trial), trials))


def _open_row(
    study: records.Study,
    trial: int,
    element: Element | None,
    run: Run | None,
    views: Mapping[str, JobView],
    series: Sequence[tuple[int, float]],
) -> TrialRow:
    """A trial that has no result of its newest life."""
    params = run.record.params if run and run.record else _known(study, trial)
    base = TrialRow(trial=trial, id=runs.trial_id(study.id, trial), state="unknown", params=params)
    submitted = element.submission if element else None
    # A life that the study has asked for, and that the run has not begun.
    waiting = (
        run is None
        or not run.submissions
        or (
            submitted is not None
            and all((each.record.study_submission or 0) < submitted.number for each in run.submissions)
            and submitted.record.created > run.submissions[-1].record.created
        )
    )
    if waiting or run is None:
        state, reason, job_id = _waiting(element, views)
        return msgspec.structs.replace(base, state=state, reason=reason, job_id=job_id)
    ended = objective.result_of(run, trial, study.record.sweep, params)
    if ended is not None:
        return _row(study, ended)
    job_id = run.job_id or (element.job_id if element else None)
    state, reason = derive_state(run, views.get(job_id or ""))
    value, step = objective.final(series, study.record.sweep)
    seen = {"state": state, "reason": reason, "job_id": job_id, "value": value, "step": step}
    return msgspec.structs.replace(base, **seen, attempts=len(run.attempts))


def _waiting(element: Element | None, views: Mapping[str, JobView]) -> tuple[str, str, str | None]:
    if element is None:
        return "unknown", "it was never submitted", None
    submission, job_id = element.submission, element.job_id
    if submission.failed:
        return "failed", f"{submission.backend} refused it: {submission.failed.error}", None
    if job_id is None:
        return "unknown", "its submission was interrupted", None
    view = views.get(job_id)
    cancelled = submission.intent is not None
    if element.cancelled:
        return "cancelled", "before it began", job_id
    if view is None or view.state == "unreachable":
        return "unknown", view.reason if view else "", job_id
    if view.state in ("pending", "running", "completing"):
        pooled = submission.backend == "local" or view.state == "pending"
        return "pending", "stopping" if cancelled else view.reason if pooled else "starting", job_id
    if cancelled or view.state == "cancelled":
        return "cancelled", "before it began", job_id
    return "failed", f"its job ended before it began: {view.reason or view.state}", job_id


def _known(study: records.Study, trial: int) -> dict[str, Any]:
    """The point of a trial that has not begun; empty where its sampler will choose, or the space was changed."""
    if trial >= study.record.trials:
        return {}
    return points.point(study.record.axes, study.record.sweep, trial) or {}


def _row(study: records.Study, result: Result) -> TrialRow:
    return TrialRow(
        trial=result.trial,
        id=runs.trial_id(study.id, result.trial),
        state=result.outcome,
        value=result.value,
        step=result.step,
        params=result.params,
        seconds=result.seconds,
        attempts=result.attempts,
        reason=result.reason,
    )


def settle(study: records.Study, heal: bool = True) -> records.Study:
    """Record results that no job lived to record. Returns the study as it is then.

    ``heal``: also tell samplers of those that they have not heard of, which takes as long as importing them.
    """
    from llmops.sweep.optimizer import Optimizer, needed

    begun = [trial for trial in study.trials() if trial not in study.results]
    fresh: dict[int, Result] = {}
    for trial, run in zip(begun, _load(study, begun), strict=True):
        if run.record is None:
            continue
        result = objective.result_of(run, trial, study.record.sweep, run.record.params)
        if result is not None and records.write_result(study.store, result):
            fresh[trial] = result
    if needed(study.record.sweep) and (heal or fresh):
        try:
            Optimizer.open(study).heal({**study.results, **fresh})
        except UserError as error:
            if not fresh:  # nothing that its samplers would miss
                return study
            raise ClusterError(f"{study.id}: results are recorded, but its samplers were not told: {error}") from error
    return records.load_study(study.store)


def describe(study: records.Study, rows: Sequence[TrialRow]) -> dict[str, Any]:
    """The study as one line among runs: the keys of a run's object of ``llmops status --json``, and ``trials``.

    ``step`` and ``max_steps`` count trials, and ``loss`` is the best value.
    """
    counts = Counter(row.state for row in rows)
    over = sum(counts[state] for state in OUTCOMES)
    finite = [row.value for row in rows if row.value is not None and row.state in ("complete", "timeout")]
    best = (min if study.record.sweep.direction == "minimize" else max)(finite, default=None)
    record = study.record
    return {
        **EMPTY,
        "id": study.id,
        "name": record.name,
        "kind": "study",
        "owner": record.owner,
        "backend": record.backend,
        "job_ids": [each.job_id for each in study.submissions if each.job_id],
        "state": _state(counts, over, len(rows)),
        "reason": ", ".join(f"{count} {state}" for state, count in counts.most_common()),
        "step": over,
        "max_steps": len(rows),
        "loss": best,
        "recent_losses": finite,
        "nodes": record.nodes,
        "ranks_per_node": record.ranks_per_node,
        "created": record.created,
        "url": study.url,
        "error": next((each.failed.error for each in study.submissions if each.failed), None),
        "trials": dict(counts),
    }


def describe_damaged(url: str, problem: str) -> dict[str, Any]:
    """The line of a study that cannot be read."""
    study = url.rstrip("/").rsplit("/", 1)[-1]
    return {
        **EMPTY,
        "id": study,
        "name": study,
        "kind": "study",
        "reason": problem,
        "url": url,
        "problems": [problem],
        "trials": {},
    }


def _state(counts: Counter[str], over: int, total: int) -> str:
    """A study runs while one of its trials does, and is finished when all have ended in one way or another."""
    if over < total:
        return next((state for state in ("running", "preempted", "pending") if counts[state]), "unknown")
    for state in ("failed", "cancelled"):
        if counts[state] == total:
            return state
    return "finished"
