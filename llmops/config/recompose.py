"""A stored configuration with some values changed: what a resumed run goes on with. Nothing is composed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llmops.config import rules
from llmops.config.compose import Composed, to_yaml
from llmops.config.schema import RunConfig
from llmops.errors import UserError


def recompose(text: str, overrides: Sequence[str] = (), cluster: Mapping[str, Any] | None = None) -> Composed:
    """The configuration in ``text`` (a run's ``config.yaml``) with ``key=value`` overrides applied.

    ``cluster``: what it says of its cluster from now on, before the overrides. Raises :class:`UserError` for a group
    (``model=7b``), a sweep, an unknown key, or a value that cannot work.
    """
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the run's config.yaml is damaged: {' '.join(str(error).split())}") from error
    if cluster is not None and isinstance(data, dict):
        data["cluster"] = dict(cluster)
    if overrides:
        apply(data, overrides)
    try:
        config = msgspec.convert(data, RunConfig)
    except msgspec.ValidationError as error:
        where = ", ".join(overrides) or "the run's config.yaml"
        raise UserError(f"{where}: {str(error).replace('$.', '')}; correct the value") from error
    rules.check(config)
    plain = msgspec.to_builtins(config)
    return Composed(config, to_yaml(plain), plain)


def apply(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set ``key=value`` overrides in a configuration as plain data. Raises :class:`UserError` for any other."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    from llmops.config.errors import list_keys, mappings, text_keys
    from llmops.config.overrides import as_typed, check_text

    check_text(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(as_typed(overrides, text_keys(), list_keys(), mappings()))
    except OverrideParseException as error:
        raise UserError(f"override {error.override}: not of the form key=value; correct or quote it") from error
    free = mappings()
    for override, shown in zip(parsed, overrides, strict=True):
        *path, last = override.key_or_group.split(".")
        if override.is_sweep_override() or override.is_delete():
            raise UserError(f"override {shown}: a resumed run takes key=value only")
        target: Any = data
        own = False  # inside a section whose keys are the user's
        for depth, part in enumerate(path, 1):
            own = own or ".".join(path[:depth]) in free
            target = (target.setdefault(part, {}) if own else target.get(part)) if isinstance(target, dict) else None
        if not isinstance(target, dict) or (last not in target and not own):
            raise UserError(
                f"override {shown}: there is no key {override.key_or_group}; the run's config.yaml lists them"
            )
        value: Any = override.value()
        if override.key_or_group in free and override.key_or_group != "env" and isinstance(value, dict):
            value, own = {**target[last], **value}, True
        if isinstance(target.get(last), dict) and not own:
            raise UserError(
                f"override {shown}: a resumed run cannot change a whole group; name the keys, as in {last}.KEY=VALUE"
            )
        target[last] = value
