"""JSON schemas of the YAML, for editors and checkers: the configuration's types, and the comments in ``conf/``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import msgspec

from llmops.config import comments
from llmops.config.schema import CLUSTERS, RunConfig
from llmops.resources import conf_dir

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
RUN = "run"
# Whole configurations in conf/: of every other file, its folder's name is the key that it fills.
WHOLE = ("config", "recipe")
_REF = "#/$defs/"
_FILLED_IN = {"type": "string", "pattern": r"^(\$\{.+\}|\?\?\?)$", "description": "an interpolation, as ${model.dim}"}
_DEFAULTS = {
    "type": "array",
    "items": {"type": ["string", "object"]},
    "description": "files that this one builds on, in order; _self_ is this one",
}
# Written as numbers by many: see llmops.config.compose, which makes them text.
_NUMBER_AS_TEXT = frozenset({"time", "mem", "mem_per_cpu", "cpus", "memory", "ephemeral_storage", "shm"})


def names() -> list[str]:
    """What :func:`schema` has one of: ``run``, the config.yaml of a run; and every kind of file in ``conf/``."""
    groups = sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name in _sections())
    return [RUN, *WHOLE, *groups]


def schema(name: str) -> Schema:
    """The schema of one of :func:`names`. Of a run all keys are required that have no default; a file in ``conf/`` may
    leave any out, build on others (``defaults``) and refer to other keys (``${...}``).
    """
    _, components = msgspec.json.schema_components([RunConfig], ref_template=f"{_REF}{{name}}")
    told = comments.of_folder(conf_dir())
    for section in components.values():
        section["description"] = inspect.cleandoc(section.get("description", "")).replace("``", "`")
    _describe(components, "RunConfig", "", told)
    for backend, struct in _clusters().items():
        _describe(components, struct, "", comments.of_file(conf_dir() / "cluster" / f"{backend}.yaml"))
    components["RunConfig"]["properties"]["cluster"] = _by_backend(components["RunConfig"]["properties"]["cluster"])
    if name == RUN:
        return _finished(name, {"$ref": f"{_REF}RunConfig"}, components)
    top = {key: value for key, value in components["RunConfig"]["properties"].get(name, {}).items() if key != "default"}
    if name == "hardware":
        top = next(each for each in top["anyOf"] if "$ref" in each)
    for key in _within("RunConfig", components):
        _loosen(components[key])
    if name in WHOLE:
        return _finished(name, {"$ref": f"{_REF}RunConfig"}, components)
    if name == "hardware":  # conf/hardware/none.yaml is a file for the whole configuration
        nothing = {"type": "object", "properties": {name: {"type": "null"}}, "additionalProperties": False}
        return _finished(name, {"anyOf": [top, nothing]}, components)
    return _finished(name, top, components)


def file_name(name: str) -> str:
    """What the schema is called when it is written into a folder."""
    return f"{name}.schema.json"


def write_all(folder: Path) -> list[Path]:
    """Write every schema into ``folder``, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names():
        path = folder / file_name(name)
        path.write_text(text(name), encoding="utf-8")
        paths.append(path)
    return paths


def text(name: str) -> str:
    """The schema as a file."""
    return msgspec.json.format(msgspec.json.encode(schema(name)), indent=2).decode() + "\n"


def _sections() -> set[str]:
    return {field.name for field in msgspec.structs.fields(RunConfig)}


def _clusters() -> dict[str, str]:
    return {backend: struct.__name__ for backend, struct in CLUSTERS.items()}


def _describe(components: dict[str, Schema], struct: str, prefix: str, told: dict[str, str]) -> None:
    for key, field in components[struct]["properties"].items():
        name = f"{prefix}.{key}".lstrip(".")
        if name in told:
            field["description"] = told[name]
        for inner in _references(field):
            if inner not in _clusters().values():
                _describe(components, inner, name, told)


def _references(field: Schema) -> list[str]:
    """Structs that a field is, or may be; not those inside its lists and mappings."""
    return [each["$ref"].removeprefix(_REF) for each in (field, *field.get("anyOf", ())) if "$ref" in each]


def _within(struct: str, components: dict[str, Schema]) -> list[str]:
    """The struct and all sections of it, clusters included."""
    found = [struct]
    for field in components[struct]["properties"].values():
        for inner in _references(field):
            found += _within(inner, components)
    return found + (list(_clusters().values()) if struct == "RunConfig" else [])


def _by_backend(field: Schema) -> Schema:
    """The types of a cluster, told apart by ``backend`` so that an editor complains about one of them alone."""
    choice: Schema = {"anyOf": [{"$ref": f"{_REF}{struct}"} for struct in _clusters().values()]}
    for backend, struct in reversed(_clusters().items()):
        choice = {
            "if": {"properties": {"backend": {"const": backend}}, "required": ["backend"]},
            "then": {"$ref": f"{_REF}{struct}"},
            "else": choice,
        }
    return {**choice, **({"description": field["description"]} if "description" in field else {})}


def _loosen(section: Schema) -> None:
    section.pop("required", None)
    for key, field in section["properties"].items():
        field.pop("default", None)  # what a file leaves out is what it builds on
        described = {"description": field.pop("description")} if "description" in field else {}
        alternatives = field.get("anyOf", [field])
        if {"type": "string"} not in alternatives:
            alternatives = [*alternatives, _FILLED_IN]
        elif key in _NUMBER_AS_TEXT:
            alternatives = [*alternatives, {"type": "number"}]
        section["properties"][key] = {**described, "anyOf": alternatives}
    section["properties"]["defaults"] = _DEFAULTS


def _finished(name: str, top: Schema, components: dict[str, Schema]) -> Schema:
    title = (
        "config.yaml of an llmops run" if name == RUN else f"llmops conf/{name}{'.yaml' if name == 'config' else ''}"
    )
    used = _used(top, components, {})
    return {"$schema": DIALECT, "title": title, **top, "$defs": used}


def _used(value: Any, components: dict[str, Schema], found: dict[str, Schema]) -> dict[str, Schema]:
    """The components that a schema refers to, and those that they refer to."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _used(inner, components, found)
    struct = value.get("$ref", "").removeprefix(_REF) if isinstance(value, dict) else ""
    if struct and struct not in found:
        found[struct] = components[struct]
        _used(components[struct], components, found)
    return found
