"""Overrides on their way into Hydra: text stays text, as typed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmops.errors import UserError

_KEY = re.compile(r"(\+{0,2}|~)[A-Za-z_$][\w$-]*([./][\w$][\w$-]*)*(@[\w.]*)?")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ENV_ONLY: Mapping[str, bool] = {"env": True}


def assign(key: str, value: Any) -> str:
    """The override that sets ``key`` to ``value``: ``None``, a bool, a finite number, text, or lists of these. Text
    arrives exactly as given, whatever characters it has.

    Raises :class:`TypeError` for any other type and :class:`ValueError` for a number that is not finite.
    """
    return f"{key}={_grammar(value)}"


def as_typed(
    overrides: Sequence[str],
    text_keys: Collection[str],
    list_keys: Collection[str] = (),
    mappings: Mapping[str, bool] = ENV_ONLY,
) -> list[str]:
    """Quote the values of keys that hold text or choose an option, and let ``env.NAME=value`` add a variable.

    Hydra's grammar reads ``1e3``, ``n[1-3]`` and ``a,b`` as a number, a list and a sweep; in an account, a node list or
    a comment they are just text, and so are the items of ``[--licenses=foo,10]`` in a list. ``null`` and what is quoted
    already is left alone. ``mappings``: sections whose keys are free, and whether their values are all text; there, all
    that follows the section is one key, dots and slashes included.
    """
    return [_as_typed(override, text_keys, list_keys, mappings) for override in overrides]


def key_of(override: str) -> str:
    """The key that an override is about, without its prefix."""
    return override.split("=", 1)[0].lstrip("+~").strip()


def check_text(overrides: Sequence[str]) -> None:
    """Refuse what no configuration file could hold, and Hydra's own settings. Raises :class:`UserError`."""
    for override in overrides:
        shown = override.encode("utf-8", "backslashreplace").decode()
        if shown != override or "\0" in override:
            raise UserError(f"override {shown!r}: only UTF-8 text without NUL can be stored; remove the other bytes")
        key, equals, _ = override.partition("=")
        if not equals and not override.startswith("~"):
            raise UserError(f"override {override!r} is not of the form key=value; add the = and a value")
        if not _KEY.fullmatch(key):
            raise UserError(f"override {override!r}: {key!r} is not a key; expected a dotted one such as train.lr")
        if re.match(r"hydra[./=@]", override.lstrip("+~")):
            raise UserError(f"override {override}: hydra.* has no effect here; remove it")
        if "@" in override.split("=", 1)[0]:
            raise UserError(f"override {override}: a group has one place here; write it without @")


def resolver_calls(text: str) -> list[str]:
    """Names of the OmegaConf resolvers that a value calls: ``["oc.env"]`` for ``${oc.env:HOME}``."""
    names: list[str] = []
    open_at: list[int | None] = []  # start of each interpolation's name; None once its name is known
    at = 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        if text.startswith("${", at):
            open_at.append(at + 2)
            at += 2
            continue
        if open_at:
            start = open_at[-1]
            if text[at] == ":" and start is not None:
                names.append(text[start:at].strip())
                open_at[-1] = None
            elif text[at] == "}":
                open_at.pop()
        at += 1
    return names


def _as_typed(
    override: str, text_keys: Collection[str], list_keys: Collection[str], mappings: Mapping[str, bool]
) -> str:
    name, equals, value = override.partition("=")
    key = name.lstrip("+")
    section = next((each for each in mappings if key == each or key.startswith(f"{each}.")), None)
    if equals and key == section:
        return f"++{key}={value}"  # it has no keys of its own, so Hydra would refuse new ones
    items = re.fullmatch(r"\[([^\[\]{}'\"\\]+)\]", value.strip())
    if items and key in list_keys:
        return f"{name}=[{','.join(_quote(item.strip()) for item in items[1].split(','))}]"
    if not equals or (key not in text_keys and section is None):
        return override
    if section is not None:
        if not mappings[section]:
            return f"++{key}={value}"
        inside = key[len(section) + 1 :]
        if section == "env" and not ENV_NAME.fullmatch(inside):
            raise UserError(
                f"{override}: {inside!r} is not the name of an environment variable; use letters, digits, _"
            )
        name = f"++{key}"
        if section != "env":
            return f"++{section}={{{inside}: {value if _is_value(value) and value else _quote(value)}}}"
    return f"{name}={value if _is_value(value) else _quote(value)}"


def _is_value(value: str) -> bool:
    quoted = len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]
    return value in ("", "null") or quoted


def _grammar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be written into a configuration")
        return repr(value)
    if isinstance(value, str):
        # An escaped "${" is text to OmegaConf; backslashes in front of it have to be doubled.
        return _quote(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))
    if isinstance(value, list | tuple):
        return "[" + ",".join(_grammar(item) for item in value) + "]"
    raise TypeError(f"{type(value).__name__} cannot be written as an override")


def _quote(text: str) -> str:
    # OmegaConf reads an interpolation in the override as it stands: quotes inside one had better not need escaping.
    mark = '"' if "'" in text and '"' not in text else "'"
    # Hydra halves backslashes only where they stand before a quote, the closing one included.
    escaped = re.sub(rf"(\\*){mark}", rf"\1\1\\{mark}", text)
    return mark + re.sub(r"(\\+)\Z", r"\1\1", escaped) + mark
