"""A stored configuration with some values changed: what a resumed run goes on with. Nothing is composed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from llmops.config import groups, rules
from llmops.config.compose import Composed, group, to_yaml
from llmops.config.schema import CLUSTERS, RunConfig
from llmops.errors import UserError
from llmops.suggest import hint


def recompose(text: str, overrides: Sequence[str] = (), cluster: Mapping[str, Any] | None = None) -> Composed:
    """The configuration in ``text`` (a run's ``config.yaml``) with ``key=value`` overrides applied.

    ``cluster``: what it says of its cluster from now on, before the overrides. Raises :class:`UserError` for a group
    (``model=7b``), a sweep, an unknown key, or a value that cannot work.
    """
    data = _load(text)
    if cluster is not None:
        data["cluster"] = dict(cluster)
    if overrides:
        apply(data, overrides)
    return _checked(data, overrides)


def changed(text: str, overrides: Sequence[str], name: str, config_dir: Path | None = None) -> Composed:
    """The configuration in ``text`` for another run called ``name``, whose ``overrides`` may be groups, too
    (``model=7b``): they replace a section, before the others are applied.

    What the old run's configuration took from the old section, such as a sequence length from its model, stays.
    Raises :class:`UserError` as :func:`recompose` does.
    """
    data = _load(text)
    data["name"] = name
    known = groups.read(config_dir).options()
    keys = []
    for override in overrides:
        key, _, option = override.partition("=")
        if key not in known:
            keys.append(override)
        elif key not in data:
            raise UserError(f"override {override}: a run that is there has taken in its {key}; change keys or sections")
        else:
            data[key] = group(key, option, config_dir)
    if keys:
        apply(data, keys, "a clone")
    return _checked(data, overrides)


def _load(text: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the run's config.yaml is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError("the run's config.yaml is damaged: it holds no keys")
    return data


def _checked(data: dict[str, Any], overrides: Sequence[str]) -> Composed:
    try:
        config = msgspec.convert(data, RunConfig)
    except msgspec.ValidationError as error:
        from llmops.config import errors

        raise errors.from_validation(error, data, groups.Groups([], []), overrides) from error
    rules.check(config)
    plain = msgspec.to_builtins(config)
    return Composed(config, to_yaml(plain), plain)


def apply(data: dict[str, Any], overrides: Sequence[str], who: str = "a resumed run") -> None:
    """Set ``key=value`` overrides in a configuration as plain data. Raises :class:`UserError` for any other.

    ``who`` is what takes them, for the error.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    from llmops.config.errors import list_keys, mappings, schema_keys, text_keys
    from llmops.config.overrides import as_typed, check_text

    check_text(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(as_typed(overrides, text_keys(), list_keys(), mappings()))
    except OverrideParseException as error:
        raise UserError(f"override {error.override}: not of the form key=value; correct or quote it") from error
    free, listed = mappings(), "; the run's config.yaml lists them"
    for override, shown in zip(parsed, overrides, strict=True):
        *path, last = override.key_or_group.split(".")
        if override.is_sweep_override() or override.is_delete():
            raise UserError(f"override {shown}: {who} takes key=value only")
        target: Any = data
        own = False  # inside a section whose keys are the user's
        for depth, part in enumerate(path, 1):
            own = own or ".".join(path[:depth]) in free
            target = (target.setdefault(part, {}) if own else target.get(part)) if isinstance(target, dict) else None
        if not isinstance(target, dict) or (last not in target and not own):
            backend = data["cluster"].get("backend") if isinstance(data.get("cluster"), dict) else None
            near = hint(override.key_or_group, schema_keys(backend if backend in CLUSTERS else None))
            raise UserError(f"override {shown}: there is no key {override.key_or_group}{near or listed}")
        value: Any = override.value()
        if override.key_or_group in free and override.key_or_group != "env" and isinstance(value, dict):
            value, own = {**target[last], **value}, True
        if isinstance(target.get(last), dict) and not own:
            raise UserError(
                f"override {shown}: {who} cannot change a whole group; name the keys, as in {last}.KEY=VALUE"
            )
        target[last] = value
