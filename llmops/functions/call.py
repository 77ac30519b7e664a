"""The submitter's side: a call on its way into a run directory, and what came back from there."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmops.errors import RunFailed, UserError
from llmops.functions import signed
from llmops.runs.model import Run

MODULE = "llmops.functions.job"
NUMBER = "FUNCTION_CALL"  # in the ranks' environment, where there are many calls: which of them this run makes


class RemoteTraceback(Exception):
    """The traceback of an exception that was raised in a job, as the cause of that exception here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def python_version() -> str:
    """What must be the same on both sides: byte code is pickled with functions that no module has."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def name_of(function: Callable[..., Any]) -> str:
    """A run's name for a function, or for an object that is called."""
    return str(getattr(function, "__name__", None) or type(function).__name__).strip("<>")


def pickled(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """One call, as submitit's ``DelayedSubmission``. Raises :class:`UserError` for what cannot be pickled."""
    try:
        from submitit.core.utils import DelayedSubmission
    except ImportError as error:
        raise UserError(
            f"functions need {error.name}, which is not installed here: pip install 'llmops[functions]'"
        ) from error
    try:
        data = dumps(DelayedSubmission(function, *args, **kwargs))
    except Exception as error:  # pickling runs code of whatever is pickled
        raise UserError(
            f"{name_of(function)} cannot be submitted, as it or one of its arguments cannot be pickled "
            f"({type(error).__name__}: {' '.join(str(error).split())}); make that inside the function instead"
        ) from error
    return data


def dumps(value: Any) -> bytes:
    """A pickle that also holds functions and classes that no module has."""
    import cloudpickle

    return bytes(cloudpickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


def sealed(run_id: str, calls: Sequence[bytes], path: str | None) -> dict[str, bytes]:
    """Objects for the directory of a run or study. ``path``: folder of the code snapshot that was the current one."""
    key = signed.load_key(make=True)
    header = {"python": python_version(), "path": path or ""}
    names = [f"calls/{number:04d}" for number in range(len(calls))]
    return {name: signed.seal(key, f"{run_id}/{name}", header, call) for name, call in zip(names, calls, strict=True)}


def is_call(run: Run) -> bool:
    """Whether the run calls a function."""
    return run.record is not None and run.record.command[1:] == ["-m", MODULE]


def returned(run: Run, rank: int, state: str, reason: str) -> Any:
    """What rank ``rank`` of a run that is over has returned.

    Raises what it raised, with the traceback of there as its cause, and :class:`RunFailed` where it did neither.
    """
    name = f"returned/{run.newest.number if run.newest else 0:04d}-{rank:04d}"
    try:
        data = run.store.get(name)
    except FileNotFoundError:
        raise RunFailed(_without(run, rank, state, reason)) from None
    try:
        found = signed.unseal(signed.load_key(), f"{run.id}/{name}", data)
    except signed.Forged as error:
        raise RunFailed(f"{run.store.url}: {error}") from error
    header = found.header
    if header["kind"] == "refused" or (header["kind"] == "error" and not found.payload):
        raise RunFailed(f"{run.id}: {header['text']}")
    if header["python"] != python_version():
        raise UserError(
            f"{run.id} was run by Python {header['python']}, and this is {python_version()}: fetch its result with that"
        )
    try:
        value = pickle.loads(found.payload)  # noqa: S301 - signed by this user, for this place
    except Exception as error:  # loading runs code of whatever was pickled
        said = f"; there it raised\n{header['text']}" if header["kind"] == "error" else ""
        raise RunFailed(
            f"{run.id}: what it returned cannot be loaded here ({type(error).__name__}: {error}){said}"
        ) from error
    if header["kind"] == "error":
        raise value from RemoteTraceback(header["text"])
    return value


def _without(run: Run, rank: int, state: str, reason: str) -> str:
    """Why there is no result."""
    end = run.newest.end if run.newest else None
    words = f"{run.id} {state}{f' ({reason})' if reason else ''} and rank {rank} returned nothing"
    return f"{words}\n{end.error}" if end and end.error else words
