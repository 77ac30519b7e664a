"""All verbs, options, keys and values, as one JSON file in the user's cache: reading it takes a millisecond, making it
a second. It is made anew when the files that it comes from have changed.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from llmops.cache_dir import cache_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

Spec = dict[str, "Any"]
Index = dict[str, "Any"]
# Verbs whose RUN may be a study, too.
_STUDIES_TOO = ("status", "cancel", "goodput")
_BY_METAVAR = {
    "STUDY": "study",
    "OVERRIDE": "override",
    "KEY=VALUE": "override",
    "DIR": "dirs",
    "URL": "dirs",
    "FILE": "files",
    "PATH": "files",
    "SOURCE": "files",
    "TARGET": "files",
}


def folder() -> Path | None:
    """Where completion keeps what it knows; None where there is no home."""
    shared = cache_dir()
    return shared / "completion" if shared else None


def load() -> Index:
    """The index, from the cache or made."""
    stamp, target = _stamp(), folder()
    path = target / "index.json" if target else None
    known = read(path) if path else None
    if known is not None and known.get("stamp") == stamp:
        return known
    made = {"stamp": stamp, **build()}
    if path:
        write(path, made)
    return made


def read(path: Path) -> Index | None:
    """A file of the cache; None where it is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write(path: Path, value: Index) -> None:
    """Keep a file in the cache, whole or not at all. A full or read-only disk only means that it is made again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_bytes(json.dumps(value).encode())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def groups(index: Index, config_dir: str | None) -> dict[str, dict[str, str]]:
    """Options of every group, and what each is; those of a ``--config-dir`` too."""
    found: dict[str, dict[str, str]] = {name: dict(options) for name, options in index["groups"].items()}
    if config_dir:
        for path in sorted(Path(os.path.expanduser(config_dir)).glob("*/*.yaml")):  # noqa: PTH111 - without a home, too
            found.setdefault(path.parent.name, {})[path.stem] = ""
    return found


def _stamp() -> str:
    """Says of what state of the program the index is: names, sizes and times of all files that decide it."""
    from llmops.resources import PACKAGE, conf_dir

    conf = conf_dir()
    places = [PACKAGE / "cli", PACKAGE / "config", PACKAGE.parent / "llm" / "utils", conf]
    places += [Path(each) for each in sorted(os.scandir(conf), key=lambda each: each.name) if each.is_dir()]
    parts = []
    for place in places:
        for each in sorted(os.scandir(place), key=lambda each: each.name):
            if each.name.endswith((".py", ".yaml")):
                found = each.stat()
                parts.append(f"{place.name}/{each.name} {found.st_size} {found.st_mtime_ns}")
    import hashlib

    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def build() -> Index:
    """Read all of it out of the parsers, the types and ``conf/``."""
    from llmops.cli.main import ACTIONS, VERBS, build_parser

    verbs: dict[str, Spec] = {}
    for verb, summary in VERBS.items():
        spec = _spec(_inner(build_parser(verb), verb), verb)
        actions = {
            action: {**_spec(_inner(build_parser(f"{verb} {action}"), f"{verb} {action}"), verb), "help": text}
            for action, text in ACTIONS.get(verb, {}).items()
        }
        verbs[verb] = {**spec, "help": summary, **({"actions": actions} if actions else {})}
    return {"verbs": verbs, "keys": _keys(), "groups": _groups()}


def _inner(parser: argparse.ArgumentParser, verb: str) -> argparse.ArgumentParser:
    chosen: argparse.ArgumentParser = next(a for a in parser._actions if a.dest == "verb").choices[verb]  # type: ignore[index]
    return chosen


def _spec(parser: argparse.ArgumentParser, verb: str) -> Spec:
    import argparse

    spec: Spec = {"options": [], "places": []}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {each.dest: each.help or "" for each in action._choices_actions}
            spec["actions"] = {
                name: {**_spec(inner, verb), "help": helps.get(name, "")} for name, inner in action.choices.items()
            }
        elif action.help == argparse.SUPPRESS:
            continue
        elif action.option_strings:
            told = parser._get_formatter()._expand_help(action) if action.help else ""
            kind = None if action.nargs == 0 else _kind(action, verb)
            spec["options"].append({"names": list(action.option_strings), "help": told, "kind": kind})
        else:
            spec["places"].append({"kind": _kind(action, verb), "many": action.nargs in ("*", "+")})
    return spec


def _kind(action: argparse.Action, verb: str) -> str | list[str]:
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    if action.dest == "backend":
        from llmops.backends import NAMES

        return list(NAMES)
    if action.dest == "state":
        from typing import get_args

        from llmops.runs.state import State

        return list(get_args(State))
    metavar = str(action.metavar or action.dest)
    if metavar == "KIND":
        from llmops.config.json_schema import names

        return names()
    if metavar.startswith("RUN"):
        return "any" if verb in _STUDIES_TOO else "run"
    return _BY_METAVAR.get(metavar, "")


def _keys() -> dict[str, Any]:
    from llmops.config.comments import of_folder
    from llmops.config.errors import schema_keys, text_keys, values_of
    from llmops.config.schema import CLUSTERS
    from llmops.resources import conf_dir

    told, text = of_folder(conf_dir()), text_keys()
    sections = {key.rpartition(".")[0] for key in schema_keys()}
    clusters = {name: schema_keys(name) for name in CLUSTERS}
    return {
        key: {
            "values": values_of(kind),
            "text": key in text,
            "help": told.get(key, ""),
            "clusters": [name for name in CLUSTERS if key in clusters[name]] if key.startswith("cluster.") else [],
        }
        for key, kind in schema_keys().items()
        if key not in sections and "[]" not in key
    }


def _groups() -> dict[str, dict[str, str]]:
    from llmops.config.comments import headline
    from llmops.config.groups import read as read_groups
    from llmops.resources import conf_dir

    return {
        group: {option: headline(conf_dir() / group / f"{option}.yaml") for option in options}
        for group, options in read_groups(None).options().items()
        if "/" not in group
    }
