"""TorchX's schedulers: which there are, what they may be told, and what they know."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_origin

from llmops.errors import ClusterError, UserError
from llmops.job import JobState
from llmops.suggest import hint

if TYPE_CHECKING:
    from torchx.schedulers.api import Scheduler

SESSION = "llmops"
_ATTEMPTS = "AWS_MAX_ATTEMPTS"
OURS = {"slurm": "slurm", "kubernetes": "k8s", "local": "local"}  # what `--backend` runs itself, and better
# What cannot be a backend, and why.
UNFIT = {
    "lsf": "its apps have no name by which one could be found again",
    "ray": "its apps have no name by which one could be found again",
    "aws_sagemaker": "it starts Python scripts in a way of its own, and does not list apps",
}


def names() -> list[str]:
    """Schedulers that jobs can be handed to. Raises :class:`UserError` where TorchX is not installed."""
    return [name for name in _factories() if _backend_of(name) is None and name not in UNFIT]


def _factories() -> dict[str, Any]:
    try:
        from torchx.schedulers import get_scheduler_factories
    except ImportError as error:
        raise UserError(
            f"--backend torchx needs TorchX ({error.name} is missing): pip install 'llmops[torchx]'"
        ) from error
    found: dict[str, Any] = get_scheduler_factories()
    return found


def _backend_of(name: str) -> str | None:
    return name.removeprefix("llmops_") if name.startswith("llmops_") else OURS.get(name)


def check_name(name: str) -> None:
    """Refuse a scheduler that there is not, or that is none for us. Raises :class:`UserError`."""
    own = _backend_of(name)
    if own is not None:
        raise UserError(f"cluster.scheduler={name}: llmops has a backend for it; use --backend {own}")
    if name in UNFIT:
        raise UserError(f"cluster.scheduler={name}: {UNFIT[name]}; choose one of {', '.join(names())}")
    known = names()
    if name not in known:
        what = f"TorchX has no such scheduler; choose one of {', '.join(known)}{hint(name, known)}"
        raise UserError(f"cluster.scheduler={name}: {what}")


@contextlib.contextmanager
def connected(name: str) -> Iterator[Scheduler[Any]]:
    """The scheduler called ``name``. Raises :class:`ClusterError` when what it needs is not there."""
    # That of processes on this machine takes these signals for itself.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        scheduler = _factories()[name](SESSION)
    except Exception as error:  # whatever the libraries of whatever scheduler raise
        raise ClusterError(f"TorchX's {name} does not start: {one_line(error)}") from error
    finally:
        with contextlib.suppress(ValueError):  # only the main thread has signal handlers
            for number, handler in before.items():
                signal.signal(number, handler)
    try:
        yield scheduler
    finally:
        scheduler.close()


def options(scheduler: Scheduler[Any], name: str, given: Mapping[str, str]) -> dict[str, Any]:
    """The run options ``given`` as text, with the types that the scheduler wants. Raises :class:`UserError`."""
    known = dict(scheduler.run_opts())
    values: dict[str, Any] = {}
    for key, text in given.items():
        option = known.get(key)
        if option is None:
            guess = hint(key, known) or f"; it has {', '.join(known) or 'none'}"
            raise UserError(f"cluster.options.{key}={text}: {name} has no such option{guess}")
        if key == "copy_env":
            raise UserError(
                "cluster.options.copy_env: values of this environment are not written into a run; use env.NAME=..."
            )
        try:
            values[key] = _typed(text, option.opt_type)
        except ValueError as error:
            raise UserError(f"cluster.options.{key}={text}: expected {error}") from error
    for key, option in known.items():
        if option.is_required and values.get(key) is None:
            raise UserError(f"cluster.options.{key} is not set: {name} needs it ({option.help}); add -o {key}=...")
    resolved: dict[str, Any] = scheduler.run_opts().resolve(values)
    return resolved


def _typed(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    if get_origin(kind) is list:
        return [part for part in text.split(";") if part]
    if get_origin(kind) is dict:
        pairs = [part.partition(":") for part in text.split(";") if part]
        if not all(colon for _, colon, _ in pairs):
            raise ValueError("name:value pairs with ; between them")
        return {name: value for name, _, value in pairs}
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError({"int": "a whole number", "float": "a number"}.get(kind.__name__, str(kind))) from error


def apps(name: str) -> dict[str, tuple[str, JobState]]:
    """All apps of a scheduler by the part of their id that is the app's name: the id, and its state.

    Raises :class:`ClusterError` when it does not answer.
    """
    with connected(name) as scheduler:
        try:
            listed = scheduler.list()
        except Exception as error:  # as above
            raise ClusterError(f"TorchX's {name} does not answer: {one_line(error)}") from error
    return {_name(app.app_id): (app.app_id, _state(app.state.name)) for app in listed}


def ask(name: str, place: str, app: str) -> tuple[str, JobState] | None:
    """One app that :func:`apps` does not have; None when there is none.

    AWS Batch lists the newest hundred jobs of a queue alone, but finds any by the beginning of its name. ``place``: its
    queue.
    """
    if name != "aws_batch":
        return None
    app_id = f"{place}:{app}-*"
    with connected(name) as scheduler:
        try:
            found = scheduler.describe(app_id)
        except Exception as error:  # as above
            raise ClusterError(f"TorchX's {name} does not answer: {one_line(error)}") from error
    return None if found is None else (app_id, _state(found.state.name))


def cancel(name: str, app_id: str) -> None:
    """Tell a scheduler to end an app. Raises :class:`ClusterError` when it does not."""
    with connected(name) as scheduler:
        try:
            scheduler.cancel(app_id)
        except Exception as error:  # as above
            raise ClusterError(f"TorchX's {name} did not cancel {app_id}: {one_line(error)}") from error


@contextlib.contextmanager
def sent_once() -> Iterator[None]:
    """Without the retries of AWS' client: a job whose answer was lost would be there twice."""
    before = os.environ.get(_ATTEMPTS)
    os.environ[_ATTEMPTS] = "1"
    try:
        yield
    finally:
        os.environ.pop(_ATTEMPTS)
        os.environ.update({} if before is None else {_ATTEMPTS: before})


def _name(app_id: str) -> str:
    """``llmops-k3x7-1a2b3c4d`` of ``queue:llmops-k3x7-1a2b3c4d-xyz``: TorchX adds both ends."""
    return "-".join(app_id.replace("/", ":").rpartition(":")[2].split("-")[:3])


def _state(name: str) -> JobState:
    known: dict[str, JobState] = {
        "RUNNING": "running",
        "SUCCEEDED": "finished",
        "FAILED": "failed",
        "CANCELLED": "cancelled",
        "UNKNOWN": "unreachable",
    }
    return known.get(name, "pending")


def one_line(error: BaseException) -> str:
    """What an exception says."""
    return " ".join(str(error).split()) or type(error).__name__
