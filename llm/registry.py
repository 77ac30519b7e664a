"""Names for what can be chosen in a config, each imported when it is wanted."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


class Registry:
    """``kind`` says what it holds; ``known`` maps each name to ``module:attribute``."""

    def __init__(self, kind: str, known: Mapping[str, str]) -> None:
        self.kind, self._known = kind, dict(known)

    def names(self) -> list[str]:
        """All of them."""
        return sorted(self._known)

    def add(self, name: str, place: str) -> None:
        """Make one's own known, as ``module:attribute``. Raises ValueError where the name is taken."""
        if name in self._known:
            raise ValueError(f"there is an {self.kind} {name} already: {self._known[name]}")
        self._known[name] = place

    def load(self, name: str) -> Any:
        """What the name stands for. Raises KeyError for an unknown one."""
        if name not in self._known:
            raise KeyError(f"there is no {self.kind} {name}: choose one of {', '.join(self.names())}")
        module, _, attribute = self._known[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
