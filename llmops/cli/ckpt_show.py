"""``llmops ckpt ls``, ``show`` and ``diff``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from llmops.checkpoints.survey import Entry, Survey, describe
from llmops.checkpoints.target import resolve
from llmops.errors import UserError
from llmops.monitor.text import clean

VALUE_WIDTH = 60


def run(arguments: argparse.Namespace) -> int:
    """Show what is there."""
    return {"ls": ls, "show": show, "diff": diff}[arguments.action](arguments)


def ls(arguments: argparse.Namespace) -> int:
    """All checkpoints of a run directory."""
    target = resolve(arguments.ref, arguments.runs_url)
    if target.selector is not None:
        raise UserError(f"{arguments.ref}: ls lists all of a run; `llmops ckpt show` shows one")
    survey = Survey(target)
    described = describe(survey)
    if arguments.json:
        print(json.dumps(described, indent=1))
        return 0
    from rich.console import Console

    from llmops.monitor.checkpoints import render_list

    notes = [f"tag {name}: its checkpoint {survey.tags[name].path} is gone" for name in survey.lost_tags]
    notes += [f"{path} cannot be read; `llmops ckpt tag --delete` removes it" for path in survey.unreadable_tags]
    render_list(described, notes, Console(), time.time())
    return 0


def show(arguments: argparse.Namespace) -> int:
    """One checkpoint."""
    from llmops.checkpoints.compare import page

    survey, entry = one(arguments.ref, arguments.runs_url)
    described = page(survey, entry)
    if arguments.json:
        print(json.dumps(described, indent=1))
        return 0
    from rich.console import Console

    from llmops.monitor.checkpoints import render_page

    render_page(described, arguments.all, Console(), time.time())
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """What differs, a line each."""
    from llmops.checkpoints.compare import differences

    first = one(arguments.one, arguments.runs_url)
    if arguments.two.startswith("@"):
        second = first[0], first[0].choose(arguments.two[1:])
    else:
        second = one(arguments.two, arguments.runs_url)
    terminal = sys.stderr.isatty()

    def progress(name: str) -> None:
        if terminal:
            print(f"\r\x1b[K{clean(name)}", end="", file=sys.stderr, flush=True)

    found = differences(first, second, arguments.values, progress)
    if terminal and arguments.values:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    for kind in ("facts", "state"):
        prefix = "state." if kind == "state" else ""
        for name, a, b in found[kind]:
            print(clean(f"{prefix}{name}: {_short(a)} -> {_short(b)}"))
    for name, how in found["tensors"]:
        print(clean(f"tensor {name}: {how}"))
    different = found["values"]
    for name in different or ():
        print(clean(f"tensor {name}: other values"))
    if different is None:
        print(f"{found['compared']} tensors have the same type and shape; --values compares what is in them")
    else:
        print(f"{found['compared'] - len(different)} of {found['compared']} tensors have the same values")
    return 0


def one(ref: str, runs_url: str | None) -> tuple[Survey, Entry]:
    """The checkpoint that ``ref`` means, and all about it."""
    survey = Survey(resolve(ref, runs_url))
    return survey, survey.choose(survey.target.selector)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= VALUE_WIDTH else f"{text[: VALUE_WIDTH - 1]}…"
