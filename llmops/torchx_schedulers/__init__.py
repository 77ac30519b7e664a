"""Our backends as TorchX schedulers: ``torchx run -s llmops_slurm …``.

TorchX finds these functions by the entry points of this package. Nothing of llmops imports them, so that TorchX may be
imported at the top of the modules here.
"""

from __future__ import annotations

from typing import Any

from llmops.torchx_schedulers.scheduler import LlmopsScheduler


def slurm(session_name: str, **_: Any) -> LlmopsScheduler:
    """The scheduler ``llmops_slurm``."""
    return LlmopsScheduler("slurm", session_name)


def k8s(session_name: str, **_: Any) -> LlmopsScheduler:
    """The scheduler ``llmops_k8s``."""
    return LlmopsScheduler("k8s", session_name)


def local(session_name: str, **_: Any) -> LlmopsScheduler:
    """The scheduler ``llmops_local``."""
    return LlmopsScheduler("local", session_name)
