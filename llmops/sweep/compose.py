"""The configuration of each trial: a base, composed by Hydra once for each choice of groups, with values put in."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from llmops.config import groups as group_files
from llmops.config.compose import Composed, finish, load_base, to_yaml
from llmops.config.overrides import assign
from llmops.errors import UserError
from llmops.sweep.model import Axis

MAX_BASES = 256  # combinations of groups, each of which Hydra composes


class Bases:
    """``bases.json``: composed data by the options of the group axes, joined as ``model=tiny,dist=fsdp``."""

    def __init__(self, found: dict[str, dict[str, Any]]) -> None:
        self.found = found

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self.found)

    @classmethod
    def from_bytes(cls, data: bytes) -> Bases:
        """Raises :class:`UserError` for what is damaged."""
        try:
            return cls(msgspec.json.decode(data, type=dict[str, dict[str, Any]]))
        except msgspec.MsgspecError as error:
            raise UserError(f"the study's bases.json is damaged: {error}") from error

    def digest(self) -> str:
        """Of all that decides what a trial does; where it runs is not part of it."""
        alike = {name: {key: each[key] for key in each if key not in ANYWHERE} for name, each in self.found.items()}
        return hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()

    def config(self, axes: Sequence[Axis], values: Mapping[str, Any]) -> Composed:
        """The configuration at a point, without its text. Raises :class:`UserError` for values that do not fit."""
        data = dict(self.found[_name(axes, values)])
        for axis in axes:
            if not axis.group:
                _put(data, axis.key, values[axis.key])
        shown = " ".join(assign(key, value) for key, value in values.items() if not isinstance(value, dict))
        return finish(data, f"trial {shown}")


# Sections that say where and how a run is carried out, not what it computes.
ANYWHERE = ("cluster", "runs_url", "retry", "stop", "metrics", "notify", "sweep", "name", "code", "secrets")


def text(composed: Composed) -> str:
    """``config.yaml`` of a trial."""
    return to_yaml(composed.data)


def compose(axes: Sequence[Axis], fixed: Sequence[str], config_dir: Path | None) -> Bases:
    """Compose each base with the first value of every other axis, so that unknown keys are found.

    Raises :class:`UserError` as a run's configuration does, and where bases would run on different clusters.
    """
    chosen = [axis for axis in axes if axis.group]
    known = group_files.read(config_dir).options()
    for axis in chosen:
        missing = [value for value in axis.values if value not in known.get(axis.key, [])]
        if missing:
            raise UserError(
                f"override {axis.key}: the group {axis.key} has no {missing[0]}; it has {', '.join(known[axis.key])}"
            )
    combinations = list(itertools.product(*(axis.values for axis in chosen)))
    if len(combinations) > MAX_BASES:
        raise UserError(f"{len(combinations)} combinations of groups are swept; {MAX_BASES} is the most")
    first = [
        assign(axis.key, axis.low if axis.kind == "interval" else axis.values[0])
        for axis in axes
        if not axis.group and not _is_mapping(axis)
    ]
    found = {}
    for options in combinations:
        values = dict(zip((axis.key for axis in chosen), options, strict=True))
        picked = [f"{key}={option}" for key, option in values.items()]
        # Groups that a recipe is among come first: what follows it wins over it.
        found[_name(chosen, values)] = load_base([*picked, *fixed, *first], config_dir)
    clusters = {json.dumps(base["cluster"], sort_keys=True) for base in found.values()}
    if len(clusters) > 1:
        raise UserError(f"override {chosen[0].key}: its options ask for different clusters; a study runs on one")
    return Bases(found)


def _is_mapping(axis: Axis) -> bool:
    return axis.kind == "choice" and any(isinstance(value, dict) for value in axis.values)


def _name(axes: Sequence[Axis], values: Mapping[str, Any]) -> str:
    return ",".join(f"{axis.key}={values[axis.key]}" for axis in axes if axis.group)


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, copying the sections on the way: the base is shared by all trials."""
    *path, last = key.split(".")
    section = data
    for part in path:
        inside = section.get(part)
        section[part] = dict(inside) if isinstance(inside, dict) else {}
        section = section[part]
    if path == ["env"]:
        value = value if isinstance(value, str) else json.dumps(value)
    section[last] = value
