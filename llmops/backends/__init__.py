"""Where runs are carried out. A backend is loaded when it is first asked for."""

from __future__ import annotations

from llmops.backends.base import Backend
from llmops.errors import UserError

NAMES = ("local", "slurm", "k8s", "torchx")


def load(name: str) -> Backend:
    """The backend called ``name``; ``slurm@login.example.org`` is that host's SLURM, over SSH."""
    name, _, login = name.partition("@")
    if name == "local":
        from llmops.backends.local import LocalBackend

        return LocalBackend()
    if name == "slurm":
        from llmops.backends.slurm import SlurmBackend

        return SlurmBackend(login or None)
    if name == "k8s":
        from llmops.backends.k8s import K8sBackend

        return K8sBackend()
    if name == "torchx":
        from llmops.backends.torchx import TorchxBackend

        return TorchxBackend()
    raise UserError(f"unknown backend {name!r}; choose one of: {', '.join(NAMES)}")
