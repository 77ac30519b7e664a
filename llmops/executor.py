"""Submitting from Python: configured runs, functions, and functions over many items."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from llmops import api
from llmops.errors import UserError
from llmops.functions import call
from llmops.handle import Run

if TYPE_CHECKING:
    from llmops.config.schema import RunConfig
    from llmops.launch import Prepared
    from llmops.sweep.launch import PreparedStudy

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", "Prepared", "PreparedStudy")

# Exceptions are told at once; `retry.max_no_progress=3` among the overrides tries again. Preemptions do not count.
_DEFAULTS = ("retry.max_no_progress=1",)


class Executor:
    """Where and how functions run: the settings of a run, without what it runs.

    ``overrides`` are those of ``llmops submit``: ``cluster.gpus_per_node=1``, ``cluster.time=30``, ``env.DEBUG=1``.
    Nothing is started or held, so there is nothing to close; one may be used by many threads and any number of times.
    """

    def __init__(
        self,
        overrides: Sequence[str] = (),
        *,
        backend: str | None = None,
        name: str | None = None,
        config_dir: str | Path | None = None,
        runs_url: str | None = None,
    ) -> None:
        """``backend``: local or slurm; ``name``: of the runs, else the function's; ``runs_url``: where all runs are."""
        self.overrides = _checked(overrides)
        self.backend, self.name, self.runs_url = backend, name, runs_url
        self.config_dir = None if config_dir is None else Path(config_dir)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Run[T]:
        """Call ``function(*args, **kwargs)`` in a job; ``.result()`` is what it returns.

        Every rank makes the call, with ``RANK`` and the like in its environment. An interrupted call goes on with what
        the function's ``checkpoint()`` returns, as with submitit, and is made anew where there is none. Raises
        :class:`llmops.UserError` for what cannot be pickled or cannot run there; then nothing was submitted.
        """
        data = call.pickled(function, args, kwargs)
        prepared = self._prepared(api.prepare, function, ())
        objects = call.sealed(prepared.run_id, [data], _path(prepared.config))
        return Run(api.submit(prepared, objects).url, calls=True)

    def map(self, function: Callable[..., T], /, *iterables: Iterable[Any]) -> list[Run[T]]:
        """Call ``function`` once for each item, as ``map`` does, each call a run of its own, in the order of the items.

        On SLURM all of them are one array. ``sweep.max_parallel=8`` among the overrides runs eight at a time; on this
        machine, as many as it has room for. ``[run.result() for run in runs]`` waits for all. No items, no runs.
        """
        from llmops import studies

        calls = [call.pickled(function, items, {}) for items in zip(*iterables, strict=False)]
        if not calls:
            return []
        fixed = [f"env.{call.NUMBER}=range(0,{len(calls)})", "sweep.sampler=grid", "sweep.objective=none"]
        prepared = self._prepared(studies.prepare, function, fixed)
        if prepared.record.trials != len(calls):
            raise UserError(
                f"{len(calls)} calls would be {prepared.record.trials} runs, as an override has several values: give "
                "one value each (nothing was submitted)"
            )
        objects = call.sealed(prepared.base.run_id, calls, _path(prepared.base.config))
        study = studies.start(prepared, objects)
        return [Run(study.trial_store(number).url, calls=True) for number in range(len(calls))]

    def _prepared(self, prepare: Callable[..., S], function: Callable[..., Any], more: Sequence[str]) -> S:
        """A run, or a study, whose command calls functions by the interpreter that the job will have."""
        from llmops.launch import Prepared

        def prepared(python: str) -> S:
            return prepare(
                [*_DEFAULTS, *self.overrides, *more],
                backend=self.backend,
                name=self.name or call.name_of(function),
                command=[python, "-m", call.MODULE],
                config_dir=self.config_dir,
                runs_url=self.runs_url,
            )

        found = prepared(sys.executable)
        python = _python(found if isinstance(found, Prepared) else found.base)
        return found if python == sys.executable else prepared(python)

    def __repr__(self) -> str:
        settings = {"backend": self.backend, "name": self.name, "runs_url": self.runs_url}
        given = "".join(f", {name}={value!r}" for name, value in settings.items() if value is not None)
        return f"Executor({self.overrides!r}{given})"


def _python(prepared: Prepared) -> str:
    """The interpreter of the job. Raises :class:`UserError` where functions cannot run."""
    from llmops.launch import interpreter

    if prepared.backend.own_image:
        raise UserError(
            f"functions do not run on {prepared.backend.name}, whose pods share no home with this machine that results "
            "could be trusted by; put the function into a program, and submit that as command=[…]"
        )
    if prepared.login is not None:
        raise UserError(
            f"functions are not submitted over SSH: the key that results are trusted by stays on this machine, and "
            f"jobs of {prepared.login} cannot read it; submit on {prepared.login} itself, or a program as command=[…]"
        )
    return interpreter(prepared)


def _path(config: RunConfig) -> str:
    """The folder in the job's code from which the function's own modules are imported."""
    if not config.code.enabled or config.code.root is not None:
        return ""
    from llmops.code import current_folder

    return current_folder()


def _checked(overrides: Sequence[str]) -> list[str]:
    if isinstance(overrides, str):
        raise UserError(f"overrides={overrides!r}: give a list of overrides, as [{overrides!r}]")
    return list(overrides)


@overload
def submit(
    overrides: Sequence[str] = ...,
    /,
    *,
    backend: str | None = ...,
    name: str | None = ...,
    command: Sequence[str] = ...,
    config_dir: str | Path | None = ...,
    runs_url: str | None = ...,
) -> Run[None]: ...


@overload
def submit(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Run[T]: ...


def submit(what: Any = (), /, *args: Any, **kwargs: Any) -> Run[Any]:
    """Start a run.

    ``submit(["recipe=tiny", "train.lr=1e-3"], backend="slurm")`` is ``llmops submit``, with the same overrides and
    checks; ``command`` is what follows ``--`` there. ``submit(function, *args, **kwargs)`` calls a function in a job
    with the default settings, which are on this machine; :class:`Executor` has others. Raises
    :class:`llmops.UserError` for what cannot work, and then nothing was submitted.
    """
    if callable(what):
        return Executor().submit(what, *args, **kwargs)
    return _submit_configured(what, *args, **kwargs)


def _submit_configured(
    overrides: Sequence[str],
    *,
    backend: str | None = None,
    name: str | None = None,
    command: Sequence[str] = (),
    config_dir: str | Path | None = None,
    runs_url: str | None = None,
) -> Run[None]:
    prepared = api.prepare(
        _checked(overrides),
        backend=backend,
        name=name,
        command=command,
        config_dir=None if config_dir is None else Path(config_dir),
        runs_url=runs_url,
    )
    return Run(api.submit(prepared).url)


def map(function: Callable[..., T], /, *iterables: Iterable[Any]) -> list[Run[T]]:
    """:meth:`Executor.map` with the default settings: on this machine."""
    return Executor().map(function, *iterables)


def find(ref: str | None = None, runs_url: str | None = None) -> Run[Any]:
    """The run that ``ref`` means (name, id or unambiguous prefix; ``STUDY/12`` is one of many), else the newest."""
    if ref is not None:
        study, slash, number = ref.rpartition("/")
        if slash and number.isdigit():
            from llmops import studies

            return Run(studies.find(study, runs_url).trial_store(int(number)).url)
    return Run(api.find(ref, runs_url).url)
