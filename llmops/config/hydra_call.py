"""The one call of Hydra, and what keeps it apart from a program that uses Hydra itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def compose(folder: Path, arguments: list[str]) -> Any:
    """The ``DictConfig`` of ``folder/config.yaml`` and overrides. Raises Hydra's and OmegaConf's exceptions."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with _apart(), initialize_config_dir(str(folder), version_base="1.3"):
        return hydra_compose("config", arguments)


@contextmanager
def _apart() -> Iterator[None]:
    """A Hydra of our own, as if the process had none.

    Hydra would import every launcher and sweeper that is installed, which takes seconds for some; composing uses none.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton
    from hydra.core.utils import JobRuntime
    from hydra.version import VersionBase

    instances = Singleton._instances
    ours: list[type] = [GlobalHydra, JobRuntime, VersionBase]
    before = {kind: instances.pop(kind) for kind in ours if kind in instances}
    has_plugins = Plugins in instances or "hydra_plugins" in sys.modules
    if not has_plugins:
        sys.modules["hydra_plugins"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not has_plugins:
            del sys.modules["hydra_plugins"]
            instances.pop(Plugins, None)  # whoever uses Hydra next finds all of them
        for kind in ours:
            instances.pop(kind, None)
        instances.update(before)
