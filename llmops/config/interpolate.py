"""Interpolations of plain data. Those that only name another key are resolved here: OmegaConf takes a hundred times as
long for a whole configuration, which a sweep would pay at each of its points."""

from __future__ import annotations

import re
from typing import Any

from llmops.errors import UserError

_WHOLE = re.compile(r"\$\{([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)\}")
_DEPTH = 20  # of keys that name keys


class _Elaborate(Exception):
    """An interpolation that is more than the name of a key."""


def resolved(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``data`` without interpolations. Raises :class:`UserError` for one that leads nowhere."""
    try:
        return {key: _resolve(value, data, 0) for key, value in data.items()}
    except _Elaborate:
        return _by_omegaconf(data)


def _resolve(value: Any, root: dict[str, Any], depth: int) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(item, root, depth) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, root, depth) for item in value]
    if not isinstance(value, str) or "$" not in value:
        return value
    found = _WHOLE.fullmatch(value)
    if found is None or depth > _DEPTH:
        raise _Elaborate
    target: Any = root
    for part in found[1].split("."):
        if not isinstance(target, dict) or part not in target:
            raise _Elaborate
        target = target[part]
    return _resolve(target, root, depth + 1)


def _by_omegaconf(data: dict[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain: Any = OmegaConf.to_container(OmegaConf.create(data), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {' '.join(str(error.msg or error).split())}; correct the value") from error
    return {str(key): value for key, value in plain.items()}
