"""What a sweep searches, out of its command line: Hydra's own override grammar."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from llmops.config.overrides import check_text, key_of
from llmops.errors import UserError
from llmops.sweep.model import Axis

MAX_VALUES = 1_000_000  # of one axis
# All trials of a study run on one cluster, in one way; an override of these keys is never an axis, whatever its commas.
ALIKE = ("cluster", "code", "metrics", "name", "notify", "retry", "runs_url", "secrets", "stop", "sweep", "command")


class Space(NamedTuple):
    """The axes, and the overrides that all trials share. ``shuffled``: keys of axes whose order the seed decides."""

    axes: list[Axis]
    fixed: list[str]
    shuffled: set[str]


def parse(overrides: Sequence[str], groups: Mapping[str, Collection[str]]) -> Space:
    """Tell what varies from what does not. ``groups``: the options of each group of the configuration.

    Raises :class:`UserError` for a key that is given twice and for an axis with no value, or with one value twice.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    check_text(overrides)
    parser = OverridesParser.create()
    space = Space([], [], set())
    for text in overrides:
        key = key_of(text)
        if key.split(".")[0] in ALIKE or text.startswith("~"):
            space.fixed.append(text)
            continue
        try:
            override = parser.parse_override(text)
        except HydraException:
            if "=" in text and text.split("=", 1)[1].strip() in ("choice()", "shuffle()", "sort()", "range()"):
                raise UserError(f"override {text}: there is no value in it; give some, or remove it") from None
            space.fixed.append(text)  # text with characters of its own; the composition says what is wrong, if it is
            continue
        if not override.is_sweep_override():
            space.fixed.append(text)
            continue
        space.axes.append(_axis(text, key, override, groups))
        if getattr(override.value(), "shuffle", False):
            space.shuffled.add(key)
    _check_once(space)
    return space


def shuffle(space: Space, seed: int) -> list[Axis]:
    """The axes, with those values in another order that were to be shuffled; the same for the same seed."""
    axes = []
    for axis in space.axes:
        values = list(axis.values)
        if axis.key in space.shuffled:
            random.Random(f"{seed}/{axis.key}").shuffle(values)  # noqa: S311 - an order, not a secret
        axes.append(msgspec.structs.replace(axis, values=values))
    return axes


def size(axes: Sequence[Axis]) -> int | None:
    """Number of points; None where an interval makes them uncountable."""
    if any(axis.kind == "interval" for axis in axes):
        return None
    return math.prod(len(axis.values) for axis in axes)


def _check_once(space: Space) -> None:
    """Of an override that does not vary the last counts, as for a run; of an axis nobody could say which is meant."""
    seen = set(map(key_of, space.fixed))
    for axis in space.axes:
        if axis.key in seen:
            raise UserError(f"override {axis.key}: it is given twice; which one is meant? Remove the other")
        seen.add(axis.key)


def _axis(text: str, key: str, override: Any, groups: Mapping[str, Collection[str]]) -> Axis:
    from hydra.core.override_parser.types import Glob, IntervalSweep, RangeSweep

    value = override.value()
    tags = set(getattr(value, "tags", ()))
    if tags - {"log"} or (tags and not isinstance(value, IntervalSweep)):
        raise UserError(f"override {text}: the only tag here is log, of an interval: tag(log,interval(1e-5,1e-2))")
    if isinstance(value, IntervalSweep):
        return _interval(text, key, value, bool(tags))
    if isinstance(value, Glob):
        if key not in groups:
            raise UserError(f"override {text}: glob() chooses options of a group, and {key} is none")
        values: list[Any] = value.filter(sorted(groups[key]))
    elif isinstance(value, RangeSweep):
        start, stop, step = float(value.start or 0), float(value.stop or 0), float(value.step)
        if abs(stop - start) > MAX_VALUES * abs(step):
            raise UserError(f"override {text}: more than {MAX_VALUES:,} values; take an interval with sweep=random")
        values = list(value.range())
    else:
        values = [_plain(each) for each in value.list]
    if not values:
        raise UserError(f"override {text}: there is no value in it; give some, or remove it")
    for number, each in enumerate(values):
        if isinstance(each, float) and not math.isfinite(each):
            if not key.startswith("env."):
                raise UserError(f"override {text}: {each} is no finite number; give one, or quote it where it is text")
            values[number] = str(each)
    seen: set[str] = set()
    for each in values:
        if repr(each) in seen:  # which tells 1 from true
            raise UserError(f"override {text}: {each} is there twice, which would run trials twice; remove one")
        seen.add(repr(each))
    if key in groups:
        return Axis(key=key, kind="choice", group=True, values=[str(each) for each in values])
    if isinstance(value, RangeSweep) and value.step > 0:
        whole = all(isinstance(each, int) for each in values)
        return Axis(
            key=key, kind="range", values=values, low=values[0], high=values[-1], step=value.step, integer=whole
        )
    return Axis(key=key, kind="choice", values=values)


def _interval(text: str, key: str, value: Any, log: bool) -> Axis:
    low, high = value.start, value.end
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"override {text}: an interval goes from a smaller to a larger number")
    if log and low <= 0:
        raise UserError(f"override {text}: a logarithmic interval begins above 0")
    whole = isinstance(low, int) and isinstance(high, int)
    return Axis(key=key, kind="interval", low=low, high=high, log=log, integer=whole)


def _plain(value: Any) -> Any:
    """JSON's own types for what Hydra's parser makes of an element."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return value
