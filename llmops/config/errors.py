"""What Hydra, YAML and msgspec complain about, in one line that names the key, the value, the place and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin

import msgspec

from llmops.config.groups import Groups
from llmops.config.overrides import key_of
from llmops.config.schema import CLUSTERS, RunConfig
from llmops.errors import UserError
from llmops.suggest import close, hint


def schema_keys(cluster: str | None = None) -> dict[str, Any]:
    """Type of every dotted key that may be set, sections included; of all clusters unless one is named."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(RunConfig):
        if field.name != "cluster":
            _add(found, field.name, field.type)
    found["cluster"] = RunConfig
    found["cluster.backend"] = str
    for name, struct in CLUSTERS.items():
        if cluster in (None, name):
            for field in msgspec.structs.fields(struct):
                _add(found, f"cluster.{field.name}", field.type)
    return found


def text_keys() -> set[str]:
    """Keys whose value is one piece of free text."""
    return {key for key, kind in schema_keys().items() if kind is str or set(get_args(kind)) == {str, type(None)}}


def list_keys() -> set[str]:
    """Keys whose value is a list of texts."""
    return {key for key, kind in schema_keys().items() if kind == list[str]}


def mappings() -> dict[str, bool]:
    """Keys that are sections with keys of the user's own, and whether all their values are text."""
    return {key: kind == dict[str, str] for key, kind in schema_keys().items() if get_origin(kind) is dict}


def unknown_key(key: str, groups: Groups, overrides: Sequence[str], cluster: str | None) -> UserError:
    """The error for a key that no configuration has."""
    shown = place(key.split("[")[0], groups, overrides) if "[" in key else place(key, groups, overrides)
    if key in schema_keys() and cluster is not None:
        owner = next(name for name in CLUSTERS if key in schema_keys(name))
        return UserError(
            f"{shown}: {key} belongs to cluster={owner}, this run has cluster={cluster}; remove one of them"
        )
    known = schema_keys(cluster)
    names = [*known, *groups.options()]
    leaf = key.rpartition(".")[2]
    near = close(key, names, n=3)
    near = [name for name in near if difflib.SequenceMatcher(None, leaf, name.rpartition(".")[2]).ratio() > 0.5]
    if not near or leaf == key:  # the right name in the wrong section, or in none
        near = [name for name in names if name.rpartition(".")[2] == leaf][:1] or near
    if near:
        return UserError(f"{shown}: there is no key {key}; did you mean {near[0]}?")
    section = re.sub(r"\[[^\]]*\]", "[]", key).rpartition(".")[0]
    while section and section not in known:
        section = section.rpartition(".")[0]
    prefix = f"{section}." if section else ""
    inside = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
    inside = [name for name in inside if "." not in name]
    return UserError(f"{shown}: there is no key {key}; {section or 'a run'} has {', '.join(inside)}")


def from_validation(
    error: msgspec.ValidationError, data: dict[str, Any], groups: Groups, overrides: Sequence[str]
) -> UserError:
    """The error for composed data that does not fit the schema."""
    if named := re.fullmatch(r"Expected `str`.* - at `key` in `\$\.?(.*)`", str(error)):
        key = named[1]
        wrong = next(name for name in _value(data, key) if not isinstance(name, str))
        shown = place(key.split("[")[0], groups, overrides)
        return UserError(f"{shown}: YAML reads a name in {key} as {wrong}, not as text: quote it")
    text, _, path = str(error).partition(" - at `$")
    key = _named(data, path.rstrip("`").lstrip("."))
    cluster = _cluster(data)
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", text)
    if unknown:
        return unknown_key(f"{key}.{unknown[1]}".lstrip("."), groups, overrides, cluster)
    missing = re.fullmatch(r"Object missing required field `(.*)`", text)
    if missing:
        name = f"{key}.{missing[1]}".lstrip(".")
        return UserError(f"{name} has no value: give one, as {name}=...")
    if key == "cluster.backend" or (key == "cluster" and cluster not in CLUSTERS):
        shown = place("cluster.backend", groups, overrides)
        choose = f"choose {' or '.join(CLUSTERS)}"
        return UserError(f"{shown}: there is no backend {cluster}; {choose}{hint(str(cluster), CLUSTERS)}")
    value = _value(data, key)
    expected = text.split(", got ")[0].replace("`", "").replace("Expected", "expected")
    expected = _plain(expected) if text.startswith("Expected") else _choices(key, text)
    if isinstance(value, str):
        expected += hint(value, values_of(_kind(key)))
    shown = place(key.split("[")[0], groups, overrides)
    said = f"{key}={_show(value)}"
    what = shown if shown == f"override {said}" else said if shown == key else f"{shown}: {said}"
    return UserError(f"{what} does not fit: {expected}")


def from_hydra(error: Exception, groups: Groups, overrides: Sequence[str], cluster: str | None) -> UserError:
    """The error for a composition that Hydra, OmegaConf or YAML refused."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        problem = " ".join(str(getattr(error, "problem", None) or "not YAML").split())
        return UserError(f"{mark.name}:{mark.line + 1}: {problem}; the file is not valid YAML here")
    override = getattr(error, "override", None)
    if override is not None:
        return UserError(_malformed(str(override)))
    message = str(error) if str(error) else str(error.__cause__ or type(error).__name__)
    missing = re.search(r"Could not find '([^']*)'", message) or re.search(r"Could not load '([^']*)'", message)
    if missing:
        return _missing(missing[1], groups, overrides)
    refused = re.match(r"Could not (?:override|append to config|delete)[^']*'([^']+)'", message)
    if refused:
        key = refused[1].split("@")[0]
        if "No match in the defaults list" in message or "/" in key:
            return UserError(f"{place(key, groups, overrides)}: {key} is no group that can be chosen here; remove it")
        return unknown_key(key, groups, overrides, cluster)
    added = re.search(r"Multiple values for ([\w/]+)", message)
    if added:
        return UserError(f"{place(added[1], groups, overrides)}: {added[1]} has one value already; write it without +")
    if "Ambiguous value" in message or "requires --multirun" in message:
        override = next((text for text in overrides if f"'{text}'" in message), message.split("'")[1])
        return UserError(
            f"override {override}: a run takes one value per key; write a list as key=[a,b], "
            "text with a comma as key=\"'a,b'\""
        )
    full_key = getattr(error, "full_key", None)
    if "Missing mandatory value" in message:
        return UserError(f"{full_key} has no value: give one, as {full_key}=...")
    merging = re.match(r"Error merging override (.*)", message)
    if merging:
        return UserError(f"override {merging[1].lstrip('+')} does not fit what is there: a section stays a section")
    line = " ".join(message.split("\nSee https")[0].split())
    at = f"{place(full_key, groups, overrides)}: " if full_key else ""
    return UserError(f"{at}the configuration cannot be composed: {line.replace(' full_key: ', ' at ')}")


def place(key: str, groups: Groups, overrides: Sequence[str]) -> str:
    """Where a key is set: the override, or file and line; else the key."""
    for override in reversed(overrides):
        name = key_of(override)
        if name == key or (key.startswith(f"{name}.") and name not in groups.options()):
            return f"override {override}"
    return groups.where(key) or key


def _add(found: dict[str, Any], name: str, kind: Any) -> None:
    found[name] = kind
    if get_origin(kind) in (list, dict):
        name, kind = f"{name}[]", get_args(kind)[-1]
    kind = next((each for each in get_args(kind) if _is_struct(each)), kind)  # a section that may be null
    if _is_struct(kind):
        found[name] = kind
        for field in msgspec.structs.fields(kind):
            _add(found, f"{name}.{field.name}", field.type)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _missing(path: str, groups: Groups, overrides: Sequence[str]) -> UserError:
    group, _, option = path.rpartition("/")
    options = groups.options().get(group)
    shown = place(group, groups, overrides) if group else path
    if options is None:
        known = f"the groups are {', '.join(groups.options())}{hint(group, groups.options())}"
        return UserError(f"{shown}: there is no group {group}; {known}")
    near = hint(option, options).removeprefix("; ")
    return UserError(f"{shown}: group {group} has no {option}.yaml; {near}{near and ' '}it has {', '.join(options)}")


def _malformed(override: str) -> str:
    key, _, value = override.partition("=")
    return (
        f"override {override!r}: the value {value!r} cannot be read; quote text with other than letters, digits and "
        f"/-+.$%*@?|, as {key}=\"'...'\" in a shell"
    )


def _cluster(data: dict[str, Any]) -> str | None:
    section = data.get("cluster")
    return section.get("backend") if isinstance(section, dict) else None


def _named(data: dict[str, Any], key: str) -> str:
    """``env.A`` for msgspec's ``env[...]``: the first of the section's values that does not fit."""
    section, found, rest = key.partition("[...]")
    inside = _value(data, section)
    kind = get_args(schema_keys().get(section))[-1:]
    if not found or not isinstance(inside, dict) or not kind:
        return key
    for name, item in inside.items():
        try:
            msgspec.convert(item, kind[0])
        except msgspec.ValidationError:
            return f"{section}[{name}]{rest}" if rest else f"{section}.{name}"
    return key


def _value(data: Any, key: str) -> Any:
    if data_of := re.fullmatch(r"([\w.]+)\[([^\]]+)\](.*)", key):
        section, name, rest = data_of.groups()
        inside = _value(data, section)
        if isinstance(inside, dict) and name in inside:
            return _value(inside[name], rest) if rest else inside[name]
    for prefix in mappings():
        if key.startswith(f"{prefix}.") and data is not None:
            return (_value(data, prefix) or {}).get(key[len(prefix) + 1 :])
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        else:
            return data
    return data


def _choices(key: str, text: str) -> str:
    choices = values_of(_kind(key))
    return f"expected {' or '.join(choices)}" if choices else text


def _kind(key: str) -> Any:
    """The type of a key, or of what is in its list or mapping."""
    known, name = schema_keys(), re.sub(r"\[[^\]]*\]", "[]", key)
    return known.get(name, known.get(name.removesuffix("[]")))


def values_of(kind: Any) -> list[str]:
    """All values of an enumeration or a boolean; of a list, those of its items; nothing of other types."""
    if kind is bool:
        return ["true", "false"]
    if isinstance(kind, str):
        return [kind]
    return [value for item in get_args(kind) for value in values_of(item)]


def _plain(expected: str) -> str:
    words = {
        r"\bint\b": "a whole number",
        r"\bfloat\b": "a number",
        r"\bstr\b": "text (quote it)",
        r"\bbool\b": "true or false",
        r"\bobject\b": "a section of keys",
        r"\barray\b": "a list, as [a,b]",
        r" \| ": " or ",
    }
    for pattern, word in words.items():
        expected = re.sub(pattern, word, expected)
    return expected


def _show(value: Any) -> str:
    return msgspec.json.encode(value).decode() if isinstance(value, dict | list) else str(value)
