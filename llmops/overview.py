"""All runs and studies at once, for tables, dashboards and accounts.

One look at each scheduler for all of them; runs that are over are remembered, and not read again.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmops import api, studies
from llmops.errors import UserError
from llmops.monitor import goodput as accounting
from llmops.monitor.describe import Described, describe_run
from llmops.monitor.memory import Known, Memory
from llmops.monitor.timeline import Span
from llmops.runs import records
from llmops.runs.model import Run
from llmops.runs.state import DONE
from llmops.runs.store import Store, default_runs_url, open_store

Progress = Callable[[int, int], object]  # how many of how many have been read


@dataclass(frozen=True)
class Wanted:
    """Which runs are shown; all of them unless something is set. ``since``: submitted after, in epoch seconds."""

    states: frozenset[str] = frozenset()
    name: str | None = None  # a glob, or a part of the name or id
    owner: str | None = None
    since: float | None = None

    def matches(self, item: Known | Described) -> bool:
        """Whether a run is one of them."""
        glance = _glance(item)
        if self.states and glance.state not in self.states:
            return False
        if self.owner is not None and glance.owner != self.owner:
            return False
        if self.since is not None and glance.created < self.since:
            return False
        if self.name is None:
            return True
        pattern = self.name if any(sign in self.name for sign in "*?[") else f"*{self.name}*"
        return any(fnmatch.fnmatchcase(text, pattern) for text in (glance.name, glance.id))


class _Glance(NamedTuple):
    """What can be seen of a run without decoding the rest of what is remembered."""

    created: float
    id: str
    name: str
    owner: str | None
    state: str


def _glance(item: Known | Described) -> _Glance:
    if isinstance(item, Known):
        return _Glance(item.created or 0.0, item.id, item.name, item.owner, item.state)
    return _Glance(item["created"] or 0.0, item["id"], item["name"], item["owner"], item["state"])


@dataclass(frozen=True)
class Overview:
    """What is shown, oldest first, and how many more runs that are over would be."""

    rows: list[Described]
    omitted: int = 0


def overview(
    refs: Sequence[str] = (),
    runs_url: str | None = None,
    wanted: Wanted = Wanted(),
    over: int | None = None,
    progress: Progress | None = None,
) -> Overview:
    """The named runs and studies, or all of them, as :func:`llmops.api.describe` has them.

    A study is one of them, whatever the number of its trials. ``over``: the newest so many of those that are over, and
    all others.
    """
    url = runs_url or default_runs_url()
    store = open_store(url)
    if refs:
        named = {ref: records.find_study(url, ref) for ref in refs if records.is_study(url, ref)}
        runs = [records.find_run(url, ref) for ref in refs if ref not in named]
        fresh = _read(store, runs, list(named.values()))
        rows: list[Known | Described] = [described for described, _ in fresh if wanted.matches(described)]
        return _shown(rows, over)
    memory = Memory(store.url)
    remembered, fresh = _all(store, memory, records.list_ids(store), records.list_studies(store), progress)
    rows = [known for known in remembered if wanted.matches(known)]
    rows += [described for described, _ in fresh if wanted.matches(described)]
    return _shown(rows, over)


def trials(study: str, runs_url: str | None = None, wanted: Wanted = Wanted()) -> Overview:
    """The trials of a study that have begun, each as a run."""
    url = runs_url or default_runs_url()
    store = open_store(url)
    ids = records.list_trials(store, records.find_study(url, study))
    fresh = _read(store, records.load_runs(store, ids), [])
    return _shown([described for described, _ in fresh if wanted.matches(described)], None)


@dataclass(frozen=True)
class Spent:
    """A run, and how it has spent its time."""

    described: Described
    spans: list[Span]


def spent(refs: Sequence[str] = (), runs_url: str | None = None, progress: Progress | None = None) -> list[Spent]:
    """Timelines of the named runs and of all trials of the named studies, or of all that there are."""
    url = runs_url or default_runs_url()
    store = open_store(url)
    if not refs:
        ids = records.list_ids(store)
        chosen = records.list_studies(store)
    else:
        named = {ref: records.find_study(url, ref) for ref in refs if records.is_study(url, ref)}
        ids = [records.find_run(url, ref).id for ref in refs if ref not in named]
        chosen = list(named.values())
    for study in chosen:
        ids = [*ids, *records.list_trials(store, study)]
    remembered, fresh = _all(store, Memory(store.url), ids, [], progress, forget=False)
    found = [Spent(known.described(), known.timeline()) for known in remembered]
    return found + [Spent(described, spans) for described, spans in fresh]


def _all(
    store: Store,
    memory: Memory,
    ids: Sequence[str],
    study_ids: Sequence[str],
    progress: Progress | None,
    forget: bool = True,
) -> tuple[list[Known], list[tuple[Described, list[Span]]]]:
    """What is remembered of these runs and studies, and the others, read anew."""
    marks = records.marks(store)  # before anything is read: who resumes a run meanwhile leaves one more
    known = {name: entry for name in (*ids, *study_ids) if (entry := memory.valid(name, marks[name])) is not None}
    remembered = [entry for entry in known.values() if entry.settled]
    settled = {entry.id for entry in remembered}
    unknown = [run_id for run_id in ids if run_id not in settled]
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(unknown))

    runs = records.load_runs(store, unknown, count)
    fresh = _read(store, runs, [study for study in study_ids if study not in settled])
    now = time.time()
    certain = {run.id for run in runs if api.over_for_good(run)}
    for described, spans in fresh:
        if described["state"] in DONE:
            sure = described["id"] in certain or "trials" in described
            memory.learn(described, spans, marks[described["id"]], sure, now)
        else:
            memory.forget([described["id"]])
    if forget:
        there = {*ids, *study_ids}
        memory.forget([name for name in memory.known if name not in there and records.path_of(name) == name])
    memory.save()
    return remembered, fresh


def _read(store: Store, runs: Sequence[Run], study_ids: Iterable[str]) -> list[tuple[Described, list[Span]]]:
    """Runs and studies with one look at each scheduler."""
    found_studies = list(study_ids)
    if not found_studies:
        return _describe(store, api.survey(runs, {})[0])
    from llmops.sweep import status as sweeps
    from llmops.sweep.records import load_study

    readings, damaged = [], []
    for study in found_studies:
        try:
            readings.append(sweeps.read(sweeps.settle(studies.adopt(load_study(store.sub(study))), heal=False)))
        except UserError as error:  # one damaged study must not hide all others
            damaged.append(sweeps.describe_damaged(f"{store.url}/{study}", str(error)))
    asked: dict[str, list[str]] = {}
    for reading in readings:
        for name, job_ids in reading.wanted.items():
            asked.setdefault(name, []).extend(job_ids)
    found, views = api.survey(runs, asked)
    described = _describe(store, found)
    described += [(sweeps.describe(reading.study, reading.rows(views)), []) for reading in readings]
    return described + [(each, []) for each in damaged]


def _describe(store: Store, found: Sequence[api.Status]) -> list[tuple[Described, list[Span]]]:
    now = time.time()

    def describe(status: api.Status) -> tuple[Described, list[Span]]:
        return describe_run(status.run, status.job, now)

    return records.each(store, found, describe)


def _shown(rows: Sequence[Known | Described], over: int | None) -> Overview:
    """In order of submission; of those that are over, the newest."""
    ordered = sorted(rows, key=lambda item: _glance(item)[:2])
    omitted = 0
    if over is not None:
        ended = [item for item in ordered if _glance(item).state in DONE]
        omitted = max(len(ended) - over, 0)
        left_out = {id(item) for item in ended[:omitted]}
        ordered = [item for item in ordered if id(item) not in left_out]
    return Overview([item.described() if isinstance(item, Known) else item for item in ordered], omitted)


BY = ("run", "study", "user", "backend", "week")


def goodput(
    refs: Sequence[str] = (),
    runs_url: str | None = None,
    wanted: Wanted = Wanted(),
    by: str = "run",
    since: float = 0.0,
    until: float = float("inf"),
    price: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Where the node-hours of runs and trials went between two moments: ``groups`` by one of :data:`BY`, and ``total``.

    ``price``: of an hour of one rank, which is an hour of a GPU where each rank has one.
    """
    accounts: dict[str, list[accounting.Account]] = {}
    counted: set[str] = set()
    for each in spent(refs, runs_url, progress):
        run = each.described
        if not wanted.matches(run):
            continue
        size = (run["nodes"] or 1, run["ranks_per_node"] or 1)
        if accounting.account(each.spans, *size, since, until).runs:
            counted.add(run["id"])
        if by == "week":
            for name, first, following in accounting.weeks_of(each.spans):
                part = accounting.account(each.spans, *size, max(first, since), min(following, until))
                accounts.setdefault(name, []).append(part)
        else:
            key = {"run": run["id"], "study": run["parent"], "user": run["owner"], "backend": run["backend"]}[by]
            part = accounting.account(each.spans, *size, since, until)
            accounts.setdefault(key or "none", []).append(part)
    groups = [_row(name, accounting.total(parts), price) for name, parts in sorted(accounts.items())]
    whole = _row("total", accounting.total(part for parts in accounts.values() for part in parts), price)
    return {"by": by, "groups": [row for row in groups if row["runs"]], "total": {**whole, "runs": len(counted)}}


def _row(name: str, account: accounting.Account, price: float | None) -> dict[str, Any]:
    hours = account.held_rank_s / 3600
    return {
        "name": name,
        "runs": account.runs,
        "node_hours": account.total_s / 3600,
        "rank_hours": hours,
        "goodput": account.goodput,
        "shares": account.shares(),
        **({} if price is None else {"cost": hours * price}),
    }
