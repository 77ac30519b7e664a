"""Launch LLM runs on SLURM, Kubernetes or this machine, and keep them going until they are done.

From Python: :func:`submit` starts a run, or calls a function in a job; :func:`map` calls it once for each item, as one
array; both give :class:`Run`, and :class:`Executor` says where. Names are looked up when they are first used, so that
``import llmops`` costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmops.api import Status
    from llmops.errors import ClusterError, RunFailed, UserError
    from llmops.executor import Executor, find, map, submit
    from llmops.handle import Run

__all__ = ["ClusterError", "Executor", "Run", "RunFailed", "Status", "UserError", "find", "map", "submit"]

_HOMES = {
    "ClusterError": "llmops.errors",
    "Executor": "llmops.executor",
    "Run": "llmops.handle",
    "RunFailed": "llmops.errors",
    "Status": "llmops.api",
    "UserError": "llmops.errors",
    "find": "llmops.executor",
    "map": "llmops.executor",
    "submit": "llmops.executor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
