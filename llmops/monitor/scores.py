"""Scores of a run's checkpoints in tasks, as evaluations have written them beside the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm.eval.results import FOLDER, Place, Result, decode, places
from llmops.monitor.describe import finite
from llmops.runs import records
from llmops.runs.lineage import segments
from llmops.runs.model import Run
from llmops.runs.store import open_store

KEPT = 10_000  # results that are remembered: they never change
_read: dict[str, Result] = {}

Score = dict[str, Any]  # step, task, metric, value, stderr, higher_is_better, time, by


def scores(run: Run) -> list[Score]:
    """Those of commits that count, by step, task and metric. Of a task evaluated in two ways, the newest."""
    counted = segments(run)
    if not counted:  # no supervisor started it
        return list(_rows(_results(run, lambda _: True)))

    def counts(place: Place) -> bool:
        commit = place.commit
        return any(
            segment.attempt == commit.attempt
            and segment.first_step - 1 <= commit.step <= (segment.last_step or commit.step)
            for segment in counted
        )

    return list(_rows(_results(run, counts)))


def newest(run_url: str) -> list[Score]:
    """The scores of the last step that has any, without looking at which attempts count."""
    run = records.load_run(open_store(run_url))
    found = scores(run)
    last: dict[tuple[str, str], Score] = {(each["task"], each["metric"]): each for each in found}
    return list(last.values())


def _results(run: Run, wanted: Any) -> Iterable[Result]:
    there = {name: place for name, place in places(run.store.list(FOLDER)).items() if wanted(place)}
    paths = [f"{FOLDER}/{name}" for name in there]
    fresh = [path for path in paths if f"{run.url}/{path}" not in _read]
    for path, data in zip(fresh, records.read_many(run.store, fresh), strict=True):
        result = decode(data) if data is not None else None
        if result is not None:
            if len(_read) >= KEPT:
                _read.clear()
            _read[f"{run.url}/{path}"] = result
    return [_read[f"{run.url}/{path}"] for path in paths if f"{run.url}/{path}" in _read]


def _rows(results: Iterable[Result]) -> Iterable[Score]:
    found: dict[tuple[int, str, str], Score] = {}
    for result in sorted(results, key=lambda each: (each.step, each.task, each.time)):
        for metric, value in result.scores.items():
            found[result.step, result.task, metric] = {
                "step": result.step,
                "task": result.task,
                "metric": metric,
                "value": finite(value),
                "stderr": finite(result.stderr.get(metric)),
                "higher_is_better": result.higher_is_better.get(metric),
                "time": result.time,
                "by": result.by,
            }
    return found.values()


def by_step(found: Sequence[Mapping[str, Any]], steps: int) -> tuple[list[int], dict[tuple[str, str], list[Any]]]:
    """The last ``steps`` steps that have scores, and of each task and metric its score at each of them, or None."""
    shown = sorted({each["step"] for each in found})[-steps:]
    table: dict[tuple[str, str], list[Any]] = {}
    for each in found:
        row = table.setdefault((each["task"], each["metric"]), [None] * len(shown))
        if each["step"] in shown:
            row[shown.index(each["step"])] = each
    return shown, table
