"""Reads and writes study directories. The only module that knows their paths."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import msgspec

from llmops.errors import UserError
from llmops.runs import records as runs
from llmops.runs.model import Run, Submission
from llmops.runs.store import Store, open_store
from llmops.sweep.model import FORMAT, Changes, Result, StudyRecord

_RESULT = re.compile(r"(\d{4,})-(\d{4,})\.json")


@dataclass(frozen=True)
class Study:
    """A study directory as it was when it was read."""

    store: Store
    record: StudyRecord
    submissions: list[Submission]
    results: dict[int, Result] = field(default_factory=dict)  # the newest of each trial that has ended

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def url(self) -> str:
        return self.store.url

    def trial_store(self, trial: int) -> Store:
        """The trial's run directory, which may not exist yet."""
        return self.store.sub(f"trials/{runs.trial_id(self.id, trial)}")

    def trials(self) -> list[int]:
        """Numbers of all trials that were ever asked for, in order."""
        found = {trial for submission in self.submissions for trial in runs.unpack(submission.record.trials)}
        return sorted(found or range(self.record.trials))


def create_study(runs_url: str, record: StudyRecord, config: bytes, bases: bytes) -> Store:
    """Make the study's directory, ``study.json`` last. Raises ``UserError`` when the id is taken."""
    store = open_store(runs_url).sub(record.id)
    done = store.create("config.yaml", config) and store.create("bases.json", bases)
    if not done or not store.create("study.json", runs.encode(record)):
        raise UserError(f"{store.url} exists already; studies are never overwritten")
    return store


def load_study(store: Store, with_results: bool = True) -> Study:
    """Read a study directory. Raises ``UserError`` for one that is none, or is damaged."""
    try:
        record = msgspec.json.decode(store.get("study.json"), type=StudyRecord)
    except FileNotFoundError as error:
        raise UserError(f"{store.url} is no study: it has no study.json") from error
    except msgspec.MsgspecError as error:
        raise UserError(f"{store.url}/study.json is damaged: {error}") from error
    if record.format > FORMAT:
        raise UserError(f"{store.url}/study.json: format {record.format} is newer than this llmops understands")
    run = runs.load_run(store)  # a study's submissions lie where a run's do
    return Study(store, record, run.submissions, load_results(store) if with_results else {})


def load_results(store: Store) -> dict[int, Result]:
    """The newest result of each trial that has ended. Damaged ones are left out: runs tell the same again."""
    newest: dict[int, tuple[int, str]] = {}
    for name in store.list("results"):
        found = _RESULT.fullmatch(name)
        if found:
            trial, submission = int(found[1]), int(found[2])
            newest[trial] = max(newest.get(trial, (-1, "")), (submission, name))
    results = {}
    for trial, data in zip(
        newest, runs.read_many(store, [f"results/{name}" for _, name in newest.values()]), strict=True
    ):
        try:
            results[trial] = msgspec.json.decode(data or b"", type=Result)
        except msgspec.MsgspecError:
            continue
    return results


def write_changes(store: Store, submission: int, changes: Changes) -> None:
    """Record what a submission's new trials have of their own. Raises ``UserError`` where somebody else was faster."""
    if not store.create(f"job/{submission:04d}/changes.json", runs.encode(changes)):
        raise UserError(f"{store.url} is being resumed by somebody else just now; see `llmops sweep status`")


def load_changes(store: Store, submission: int) -> Changes | None:
    """What a submission's new trials have of their own."""
    try:
        return msgspec.json.decode(store.get(f"job/{submission:04d}/changes.json"), type=Changes)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise UserError(f"{store.url}/job/{submission:04d}/changes.json is damaged: {error}") from error


def write_result(store: Store, result: Result) -> bool:
    """Record how a trial ended. False when that life of it has a result already."""
    return store.create(f"results/{result.trial:04d}-{result.submission:04d}.json", runs.encode(result))


def cancelled_folder(submission: int) -> str:
    """Where trials of a submission are named that must not begin."""
    return f"job/{submission:04d}/cancelled"


def load_cancelled(study: Study) -> set[tuple[int, int]]:
    """Submission and trial of those that were cancelled before they began."""
    found = set()
    for submission in study.submissions:
        names = study.store.list(cancelled_folder(submission.number))
        found |= {(submission.number, int(name.partition(".")[0])) for name in names}
    return found


def load_trial(study: Study, trial: int) -> Run:
    """The trial's run; a ``Run`` without a record before its first attempt."""
    return runs.load_run(study.trial_store(trial))
