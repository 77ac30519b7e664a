"""``llmops diff``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from llmops import api

if TYPE_CHECKING:
    from rich.console import Console

FILES = 20  # of the code that are named


def configure(parser: argparse.ArgumentParser) -> None:
    """Two runs."""
    parser.add_argument("left", metavar="RUN", help="name, id or unambiguous prefix")
    parser.add_argument("right", metavar="RUN", help="the other one")
    parser.add_argument("--files", action="store_true", help=f"name all files that differ, not the first {FILES} alone")
    parser.add_argument("--json", action="store_true", help="everything as one object, on stdout alone")


def run(arguments: argparse.Namespace) -> int:
    """Show what differs."""
    left, right = (api.find(ref, arguments.runs_url) for ref in (arguments.left, arguments.right))
    found = api.difference(left, right)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    from rich.console import Console

    from llmops.monitor import printing

    printing.show(Console(), lambda out: _show(found, out, None if arguments.files else FILES))
    return 0


def _show(found: dict[str, Any], out: Console, files: int | None) -> None:
    for side in ("left", "right"):
        each = found[side]
        _line(out, f"{side:<5}  {each['name']}  {each['id']}  {each['state']}")
    _section(out, "configuration", found["config"], "the same")
    _code(out, found["code"], files)
    _section(out, "environment", found["environment"], "nothing that is recorded differs")
    _section(out, "data", found["data"], "nothing that is recorded differs")
    _section(out, "results", found["metrics"], "none yet")
    for problem in found["problems"]:
        _line(out, f"\nnot all could be read: {problem}")


def _section(out: Console, title: str, rows: list[dict[str, Any]], nothing: str) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from llmops.monitor.printing import columns
    from llmops.monitor.text import clean

    _line(out, f"\n{title}" if rows else f"\n{title}: {nothing}")
    if not rows:
        return
    table = columns()
    for name in ("key", "left", "right"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(text)) for text in (row["key"], _value(row["left"]), _value(row["right"]))))
    out.print(Padding(table, (0, 0, 0, 2)))


def _code(out: Console, code: dict[str, Any], most: int | None) -> None:
    left, right, files = code["left"], code["right"], code["files"]
    if code["same"]:
        _line(out, f"\ncode: the same, {_snapshot(left)}")
        return
    _line(out, f"\ncode: {len(files)} files differ" if files else "\ncode")
    _line(out, f"  left   {_snapshot(left)}")
    _line(out, f"  right  {_snapshot(right)}")
    if files is None and left and right:
        _line(out, "  a snapshot is no longer there: which files differ is not known")
    signs = {"changed": "changed   ", "left": "left only ", "right": "right only"}
    shown = (files or [])[:most]
    for each in shown:
        _line(out, f"  {signs[each['how']]}  {each['file']}")
    if files and len(files) > len(shown):
        _line(out, f"  and {len(files) - len(shown)} more: --files shows all")


def _snapshot(code: dict[str, Any] | None) -> str:
    if code is None:
        return "no snapshot"
    commit = f"commit {code['git_commit'][:8]}{', with changes' if code['dirty'] else ''}" if code["git_commit"] else ""
    return f"{code['sha256'][:8]}  {commit or 'no git repository'}"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _line(out: Console, text: str) -> None:
    from llmops.monitor.text import clean

    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" ")))
        out.print(f"{indent}{clean(line)}", highlight=False, markup=False, soft_wrap=True)
