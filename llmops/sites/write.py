"""A ``cluster`` configuration as a commented YAML file: values quoted by construction, written whole or not at all."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops.config import compose
from llmops.config.overrides import assign
from llmops.errors import ClusterError, UserError
from llmops.monitor.text import clean
from llmops.resources import conf_dir
from llmops.runs.store import PosixStore

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
WIDTH = 116  # of a comment, after its "# "
MANY = 12  # names of one list in a comment


@dataclass(frozen=True)
class Line:
    """``key: value`` with a comment behind it and alternatives below it; without a key, only a comment."""

    key: str = ""
    value: Any = None
    comment: str = ""
    others: Sequence[str] = ()


@dataclass(frozen=True)
class Draft:
    """What a cluster told, as it is going to be written. ``head``: comments on top."""

    backend: str
    name: str
    head: Sequence[str]
    lines: Sequence[Line]

    @property
    def values(self) -> dict[str, Any]:
        """Those that are set."""
        return {line.key: line.value for line in self.lines if line.key}


def text(draft: Draft) -> str:
    """The file's text."""
    out = [f"# {clean(line)}" for line in draft.head]
    out += [f"defaults: [{draft.backend}, _self_]  # all other keys are those of conf/cluster/{draft.backend}.yaml"]
    for line in draft.lines:
        comment = f"  # {clean(line.comment)}" if line.comment else ""
        if line.key:
            out.append(f"{line.key}: {scalar(line.value)}{comment}")
        elif line.comment:
            out += [f"# {each}" for each in wrapped(line.comment)]
        out += [f"# {clean(each)}" for each in line.others]
    return "\n".join(out) + "\n"


def scalar(value: Any) -> str:
    """A value in YAML's flow style. Text is always in double quotes, and never an interpolation."""
    import yaml

    def literal(item: Any) -> Any:
        if isinstance(item, str):
            return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", item)
        if isinstance(item, Mapping):
            return {literal(key): literal(each) for key, each in item.items()}
        return [literal(each) for each in item] if isinstance(item, list | tuple) else item

    class Dumper(yaml.SafeDumper):
        """With text in quotes, whatever it is."""

    def quoted(dumper: yaml.SafeDumper, item: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", item, style='"')

    Dumper.add_representer(str, quoted)
    shown = yaml.dump(literal(value), Dumper=Dumper, width=float("inf"), default_flow_style=True, sort_keys=False)
    return str(shown).removesuffix("\n").removesuffix("\n...")


def other(key: str, value: Any, comment: str = "") -> str:
    """An alternative, to be taken out of its comment as it stands."""
    shown = f"{key}: {scalar(value)}"
    return f"{shown}  # {comment}" if comment else shown


def wrapped(line: str, width: int = WIDTH) -> list[str]:
    """A comment in lines of ``width``, cleaned of all that could end or disguise it."""
    import textwrap

    return textwrap.wrap(clean(line), width, break_long_words=False, break_on_hyphens=False) or [""]


def names(found: Sequence[str]) -> str:
    """A list for people, cut where it is long."""
    shown = ", ".join(found[:MANY])
    return f"{shown} and {len(found) - MANY} more" if len(found) > MANY else shown


def place(output: Path | None, name: str) -> tuple[Path, str]:
    """Where the file goes, and the option that it will be. Raises :class:`UserError` where no run would find it."""
    path = output or Path("conf/cluster") / f"{name}.yaml"
    if path.suffix != ".yaml":
        raise UserError(f"--output {path}: only .yaml files are read; give it a name such as {path.stem}.yaml")
    full = path.expanduser().absolute()
    if full.parent.name != "cluster":
        raise UserError(
            f"--output {path}: a configuration of a cluster lies in a folder called cluster; write it to "
            f"{path.parent / 'cluster' / path.name}"
        )
    if not NAME.fullmatch(path.stem):
        raise UserError(f"--output {path}: cluster={path.stem} could not be written; use letters, digits, '-' and '_'")
    if (conf_dir() / "cluster" / path.name).exists() and full.parent != conf_dir() / "cluster":
        raise UserError(
            f"--output {path}: llmops ships cluster/{path.name} and would ignore this one; choose another name"
        )
    return full, path.stem


def check(draft: Draft, option: str, extra: Sequence[str] = ()) -> None:
    """Compose it as a run would. Raises :class:`ClusterError` where that fails: then nothing is written."""
    with tempfile.TemporaryDirectory(prefix="llmops-init-") as folder:
        path = Path(folder, "cluster", f"{option}.yaml")
        path.parent.mkdir()
        path.write_text(text(draft), encoding="utf-8")
        try:
            # Which layout fits so many ranks is for each run to say.
            compose.load_config([f"cluster={option}", assign("command", ["true"]), *extra], Path(folder))
        except UserError as error:
            raise ClusterError(
                f"what the cluster told makes no configuration ({error}); nothing was written: write one by hand, from "
                f"conf/cluster/{draft.backend}.yaml"
            ) from error


def save(path: Path, content: str, force: bool) -> None:
    """Write the file in one step; never over another, unless ``force``."""
    store = PosixStore(path.parent)
    if force:
        store.put(path.name, content.encode())
    elif not store.create(path.name, content.encode()):
        raise UserError(f"{path}: is there already; add --force to replace it, or --output for another place")


def safe_name(told: str, fallback: str) -> str:
    """A name for the option, from what a cluster calls itself; never one that llmops ships."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", told).strip("-_") or fallback
    shipped = {path.stem for path in (conf_dir() / "cluster").glob("*.yaml")}
    return f"{name}-cluster" if name in shipped else name
