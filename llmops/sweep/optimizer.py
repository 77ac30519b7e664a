"""Samplers and pruners of a study, asked and told by its trials, each from its own job. Nobody coordinates them.

The storage's order of trials decides: of those that carry a trial's number, in its newest life, the first counts.
Optuna is imported where it is used, since most studies need none of it.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmops.config.schema import SweepConfig
from llmops.errors import ClusterError, UserError
from llmops.sweep.model import Axis, Result, StudyRecord
from llmops.sweep.pruners import distribution, inward, outward, pruner, sampler
from llmops.sweep.records import Study

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

TRIAL, LIFE, AFTER, SUBMISSION = "trial", "life", "after", "submission"  # user attributes of an Optuna trial
_Made = TypeVar("_Made")

OPEN_TRIES = 5  # two processes that create the tables of a database at once get in each other's way
PAUSE_S = 0.2  # between the first two; grows


def needed(sweep: SweepConfig) -> bool:
    """Do trials learn from each other? If not, nothing of this module is needed."""
    return sweep.sampler in ("tpe", "cmaes") or sweep.pruner.name != "none"


class Optimizer:
    """All methods may be called again, by anybody, at any time. They raise ``UserError`` and ``ClusterError``."""

    def __init__(self, record: StudyRecord, storage: BaseStorage, study_id: int, where: str) -> None:
        from optuna.study import Study as OptunaStudy

        self._record, self._storage, self._id, self._where = record, storage, study_id, where
        self._space = {axis.key: distribution(axis) for axis in record.axes}
        self._study = OptunaStudy(record.id, storage, pruner=pruner(record))

    @classmethod
    def open(cls, study: Study) -> Optimizer:
        """The study as its storage has it; created on first use."""
        _silent_optuna()
        sweep = study.record.sweep
        where = sweep.storage or f"{study.url}/journal"
        with _one_line(where):
            storage = _storage(study)
            return cls(study.record, storage, _study_id(storage, study.record), where)

    def ask(self, trial: int, fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The trial's parameters by axis key: ``fixed``, or those of its earlier life, or new ones.

        They are chosen before the trial is created, and created with it: there is no trial with half of them.
        """
        with _one_line(self._where):
            current = self._current(trial)
            if current is None or current.state.name == "FAIL":
                current = self._create(trial, current, fixed)
            return self._params(current)

    def report(self, trial: int, step: int, value: float) -> None:
        """An intermediate value, which may be NaN. The first one of a step counts, and none after the trial's end."""
        from optuna.exceptions import UpdateFinishedTrialError

        with _one_line(self._where), contextlib.suppress(UpdateFinishedTrialError):  # told by another process
            current = self._current(trial)
            if current is not None and current.state.name == "RUNNING" and step not in current.intermediate_values:
                self._storage.set_trial_intermediate_value(current._trial_id, step, float(value))

    def should_prune(self, trial: int) -> bool:
        """Does the pruner want the trial to end, from what was reported?"""
        from optuna.exceptions import UpdateFinishedTrialError

        with _one_line(self._where):
            current = self._current(trial)
            if current is None or current.state.name != "RUNNING":
                return current is not None and current.state.name == "PRUNED"
            try:
                return bool(self._study.pruner.prune(self._study, current))
            except UpdateFinishedTrialError:  # told by another process while the pruner looked
                return False

    def tell(self, result: Result) -> None:
        """How the trial ended. The first result of each life counts."""
        with _one_line(self._where):
            current = self._current(result.trial)
            if current is None and result.params.keys() == self._space.keys():
                current = self._create(result.trial, None, result.params)
            if current is not None:
                self._tell(current, result)

    def heal(self, results: Mapping[int, Result]) -> None:
        """Tell results of trials that the storage takes for running: their jobs died before they could."""
        with _one_line(self._where):
            running = {
                number: current for number, current in self._currents().items() if current.state.name == "RUNNING"
            }
            for number in sorted(results.keys() & running.keys()):
                self._tell(running[number], results[number])

    # Trials of the storage

    def _current(self, trial: int) -> FrozenTrial | None:
        return self._currents().get(trial)

    def _currents(self) -> dict[int, FrozenTrial]:
        """What counts for each number. Those that lost a race are told so, if whoever made them could not."""
        from optuna.trial import TrialState

        found: dict[int, FrozenTrial] = {}
        lost: list[FrozenTrial] = []
        for each in self._storage.get_all_trials(self._id, deepcopy=False):
            number, life = each.user_attrs.get(TRIAL), each.user_attrs.get(LIFE, 0)
            if number is None:
                continue  # somebody else's, in a database that is shared
            held = found.get(number)
            if held is None or held.user_attrs.get(LIFE, 0) < life:
                found[number] = each
            elif not each.state.is_finished():
                lost.append(each)
        for each in lost:
            self._finish(each, TrialState.FAIL, None)
        return found

    def _create(self, trial: int, before: FrozenTrial | None, fixed: Mapping[str, Any] | None) -> FrozenTrial:
        from optuna.trial import TrialState, create_trial

        attributes: dict[str, Any] = {TRIAL: trial, LIFE: 0}
        system: dict[str, Any] = {}
        if before is not None:
            attributes = {
                TRIAL: trial,
                LIFE: before.user_attrs.get(LIFE, 0) + 1,
                AFTER: before.user_attrs.get(SUBMISSION, -1),
            }
            params, system = dict(before.params), dict(before.system_attrs)
            # The rungs of asha belong to the life that reached them.
            system = {key: value for key, value in system.items() if not key.startswith("completed_rung_")}
        else:
            known = fixed or {}
            params = {axis.key: inward(axis, known[axis.key]) for axis in self._axes if axis.key in known}
            if params.keys() != self._space.keys():
                sampled, system = self._sample(trial)
                params = {**sampled, **params}
        try:
            template = create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=self._space,
                user_attrs=attributes,
                system_attrs=system,
            )
        except ValueError as error:
            raise UserError(f"trial {trial}: not a point of the study: {error}") from error
        self._storage.create_new_trial(self._id, template_trial=template)
        current = self._current(trial)
        if current is None:
            raise ClusterError(f"{self._where}: trial {trial} was stored, and is not there")
        return current

    @property
    def _axes(self) -> list[Axis]:
        return self._record.axes

    def _sample(self, trial: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """New parameters, and what the sampler noted with them; from a copy in memory, which a sampler may write to."""
        from optuna.storages import InMemoryStorage
        from optuna.study import create_study

        copy = create_study(
            storage=InMemoryStorage(),
            study_name=self._record.id,
            direction=self._record.sweep.direction,
            sampler=sampler(self._record, self._space, trial),
            pruner=pruner(self._record),
        )
        copy.add_trials(self._storage.get_all_trials(self._id, deepcopy=False))
        asked = copy.ask(self._space)
        frozen = asked.storage.get_trial(asked._trial_id)
        return dict(frozen.params), dict(frozen.system_attrs)

    def _tell(self, current: FrozenTrial, result: Result) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        if current.state.is_finished() or result.submission <= current.user_attrs.get(AFTER, -1):
            return
        state, value = _state(result, self._record.sweep.direction)
        with contextlib.suppress(UpdateFinishedTrialError):  # told by another process
            # Read by the next life, which must not take this result for its own.
            self._storage.set_trial_user_attr(current._trial_id, SUBMISSION, result.submission)
        self._finish(current, state, value)

    def _finish(self, each: FrozenTrial, state: Any, value: float | None) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        with contextlib.suppress(UpdateFinishedTrialError):  # told by another process
            self._storage.set_trial_state_values(each._trial_id, state, None if value is None else [value])

    def _params(self, each: FrozenTrial) -> dict[str, Any]:
        return {axis.key: outward(axis, self._space[axis.key], each.params[axis.key]) for axis in self._axes}


def _state(result: Result, direction: str) -> tuple[Any, float | None]:
    """The state of an Optuna trial and its value. What is not a number counts as the worst, so that it is avoided."""
    from optuna.trial import TrialState

    worst = math.inf if direction == "minimize" else -math.inf
    if result.outcome in ("failed", "cancelled"):
        return TrialState.FAIL, None
    if result.outcome == "pruned" or (result.outcome == "timeout" and result.value is None):
        return TrialState.PRUNED, result.value
    if result.outcome == "nan" or result.value is None:
        return TrialState.COMPLETE, worst
    return TrialState.COMPLETE, result.value


# The storage


def database_url(storage: str) -> str:
    """The URL that ``sweep.storage`` means. Raises ``UserError`` where it is unset, or says what is to stay secret."""
    try:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError
    except ImportError as error:
        raise _missing(error) from error

    named = storage.removeprefix("env:") if storage.startswith("env:") else None
    if named is not None and not os.environ.get(named):
        raise UserError(f"sweep.storage={storage}: {named} is not set here; export it, and list it under secrets")
    text = os.environ[named] if named is not None else storage
    try:
        url = make_url(text)
    except ArgumentError as error:
        hint = "write dialect://host/name, or env:NAME of a variable that holds that"
        raise UserError(f"sweep.storage: no URL of a database; {hint}") from error
    if named is None and (url.password or any("password" in key or key == "pwd" for key in url.query)):
        raise UserError("sweep.storage has a password in it; put the URL into a variable and write env:NAME")
    path = url.database or ""
    if url.get_backend_name() == "sqlite" and not Path(path).is_absolute():
        raise UserError(
            f"sweep.storage: sqlite needs an absolute path, since trials run in other folders: sqlite:////home/…, "
            f"not {path or ':memory:'}"
        )
    return text


def _storage(study: Study) -> BaseStorage:
    wanted = study.record.sweep.storage
    if wanted is None:
        from optuna.storages import JournalStorage

        from llmops.sweep.journal import StoreJournal

        return JournalStorage(StoreJournal(study.store.sub("journal")))
    from optuna.storages import RDBStorage, get_storage

    url = database_url(wanted)
    options = {"connect_args": {"timeout": 30}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return get_storage(_again(lambda: RDBStorage(url, engine_kwargs=options)))
    except ImportError as error:
        raise UserError(f"sweep.storage: {_brief(error)}; install the driver of this database") from error


def _again(make: Callable[[], _Made]) -> _Made:
    """What fails when another process creates the same tables at the same moment."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    for tried in range(1, OPEN_TRIES):
        try:
            return make()
        except (StorageInternalError, SQLAlchemyError):
            time.sleep(PAUSE_S * tried)
    return make()


def _study_id(storage: BaseStorage, record: StudyRecord) -> int:
    """The study of that name; made if there is none, by whoever is first."""
    from optuna.exceptions import DuplicatedStudyError
    from optuna.study import StudyDirection

    try:
        return int(storage.get_study_id_from_name(record.id))
    except KeyError:
        direction = StudyDirection.MINIMIZE if record.sweep.direction == "minimize" else StudyDirection.MAXIMIZE
    try:
        return int(storage.create_new_study([direction], record.id))
    except DuplicatedStudyError:
        return int(storage.get_study_id_from_name(record.id))


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    """``ClusterError`` for what a database says. ``where`` never holds a password: ``database_url`` sees to that."""
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

    try:
        yield
    except UpdateFinishedTrialError as error:
        # A request whose answer was lost arrived after all, when the trial had ended; Optuna complains of it once.
        raise ClusterError(f"{where}: an earlier request came too late; try again") from error
    except StorageInternalError as error:
        raise ClusterError(f"{where}: the database did not answer as it should: {_brief(error)}") from error
    except Exception as error:
        if not type(error).__module__.startswith("sqlalchemy"):  # imported only where there is a database
            raise
        raise ClusterError(f"{where}: the database did not answer as it should: {_brief(error)}") from error


def _brief(error: BaseException) -> str:
    cause = error.__cause__ if error.__cause__ is not None else error
    return " ".join(str(cause).split())[:300] or type(cause).__name__


def _missing(error: ImportError) -> UserError:
    return UserError(f"what this study needs is not installed ({error}); pip install 'llmops[sweep]'")


def _silent_optuna() -> None:
    """Import Optuna, and keep its remarks out of the output of jobs."""
    try:
        import cmaes  # type: ignore[import-untyped]  # noqa: F401 - so that what is missing is said at once
        import optuna
    except ImportError as error:
        raise _missing(error) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module=r"optuna\.")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
