"""Checkpoints for people: the table of a run's, the page of one, and what is going to be removed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from llmops.monitor import printing
from llmops.monitor.printing import columns
from llmops.monitor.text import clean, duration, moment, number

WIDE = 110  # from this many columns on, a table has what one can do without
LOSSES = ("loss", "evaluation_loss")  # the first that a state has is shown
TENSORS = 20  # that a page shows unless all are wanted
PLACES = {"latest": "● latest", "yes": "● yes", "no": "○ no", "-": "· -"}
ASCII_PLACES = {"latest": "* latest", "yes": "* yes", "no": "o no", "-": "- -"}
STYLES = {"latest": "bold green", "yes": "green", "no": "yellow", "-": "bright_black"}


def size(count: int) -> str:
    """``512 B``, ``3.4 MB``, ``1.25 TB``."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 999.5 or unit == "PB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def render_list(described: Sequence[Mapping[str, Any]], notes: Sequence[str], console: Console, now: float) -> None:
    """Print the table of ``llmops ckpt ls``, and ``notes`` below it."""
    if not described:
        console.out("no checkpoints", highlight=False)
    else:
        show(lambda width, ascii_only: _list(described, width, ascii_only, now), console)
    for note in notes:
        console.out(clean(note), highlight=False)


def show(build: Any, console: Console) -> None:
    """Print what ``build(width, ascii_only)`` makes; into a pipe, lines that are neither folded nor cut."""
    printing.show(console, lambda out: out.print(build(out.width, out.options.ascii_only)))


def _list(described: Sequence[Mapping[str, Any]], width: int, ascii_only: bool, now: float) -> Table:
    wide = width >= WIDE
    table = columns(2 if wide else 1)
    for name in ("STEP", "COMMIT", "LINEAGE"):
        table.add_column(name, no_wrap=True, justify="right" if name == "STEP" else "left")
    for name in ("AGE", "SIZE", "RANKS", *(("LAYOUT",) if wide else ()), "SAVE", "LOSS"):
        table.add_column(name, no_wrap=True, justify="left" if name == "LAYOUT" else "right")
    if wide:
        table.add_column("PARENT", no_wrap=True)
    table.add_column("NOTES", overflow="fold")
    for each in described:
        place = "latest" if each["latest"] else "yes" if each["lineage"] else "no"
        if each["state"] in ("debris", "unfinished"):
            place = "-"
        mesh = each["mesh"] or {}
        cells = [
            f"{each['step']:,}",
            f"{each['attempt']:04d}-{each['generation']:04d}",
            Text((ASCII_PLACES if ascii_only else PLACES)[place], style=STYLES[place]),
            "-" if each["time"] is None else duration(now - each["time"]),
            size(each["bytes"]),
            "-" if each["world_size"] is None else str(each["world_size"]),
            *((" ".join(f"{name}={count}" for name, count in mesh.items()) or "-",) if wide else ()),
            "-" if each["seconds"] is None else f"{each['seconds']:.1f}s",
            number(next((each["metrics"][name] for name in LOSSES if name in each["metrics"]), None)),
            *(((each["parent"] or "-").removeprefix("checkpoints/"),) if wide else ()),
            _notes(each),
        ]
        table.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell)) for cell in cells))
    return table


def _notes(each: Mapping[str, Any]) -> Text:
    found = [(tag, "bold cyan") for tag in each["tags"]]
    if each["readers"]:
        found.append((f"being read by {', '.join(each['readers'])}", "cyan"))
    if each["state"] == "unreadable":
        found.append((each["problem"], "red"))
    elif each["state"] == "debris":
        found.append(("never committed", "bright_black"))
    elif each["state"] == "unfinished":
        found.append(("not committed, its attempt may be at work", "bright_black"))
    return Text(", ").join(Text(clean(text), style=style) for text, style in found)


def render_page(page: Mapping[str, Any], everything: bool, console: Console, now: float) -> None:
    """Print what ``llmops ckpt show`` knows of one checkpoint: the object of its ``--json``."""
    show(lambda width, ascii_only: _facts(page, now), console)
    names = list(page["tensors"])
    shown = names if everything else names[:TENSORS]
    if shown:
        console.out("")
        show(lambda width, ascii_only: _tensors({name: page["tensors"][name] for name in shown}), console)
    if len(shown) < len(names):
        console.out(f"and {len(names) - len(shown):,} more: --all shows them", highlight=False)
    console.out("\nstate", highlight=False)
    for line in json.dumps(page["state"], indent=2, ensure_ascii=False).splitlines():
        indent = len(line) - len(line.lstrip())
        console.out("  " + " " * indent + clean(line), highlight=False)


def _facts(page: Mapping[str, Any], now: float) -> Table:
    mesh = " ".join(f"{name}={count}" for name, count in page["mesh"].items())
    place = (
        "the newest of its lineage" if page["latest"] else "on the lineage" if page["lineage"] else "off the lineage"
    )
    values = sum(each["values"] for each in page["tensors"].values())
    facts = {
        "checkpoint": f"{page['url']}/{page['path']}",
        "step": f"{page['step']:,} (attempt {page['attempt']}, generation {page['generation']}), {place}",
        "tags": ", ".join(page["tags"]) or "-",
        "saved": f"{moment(page['time'])}, {duration(now - page['time'])} ago, in {page['seconds']:.1f} s",
        "layout": f"{page['world_size']} ranks{f', {mesh}' if mesh else ''}",
        "size": f"{size(page['bytes'])} in {sum(part['files'] for part in page['parts'])} files, "
        f"{len(page['tensors']):,} tensors, {values:,} values",
        "parent": page["parent"] or "-",
        "code": page["code"] or "-",
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(clean(value)))
    return table


def _tensors(tensors: Mapping[str, Mapping[str, Any]]) -> Table:
    table = columns(2)
    table.add_column("TENSOR", overflow="fold")
    for name in ("TYPE", "SHAPE", "PLACEMENT", "PIECES", "SIZE"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("PIECES", "SIZE") else "left")
    for name, each in tensors.items():
        shape = " x ".join(str(count) for count in each["shape"]) or "scalar"
        cells = (name, each["dtype"], shape, each["placement"] or "-", str(each["pieces"]), size(each["bytes"]))
        table.add_row(*(Text(clean(cell)) for cell in cells))
    return table


def render_removals(rows: Iterable[tuple[str, int, str]], console: Console) -> None:
    """Print (checkpoint, bytes, why) of what may go."""
    listed = list(rows)

    def build(width: int, ascii_only: bool) -> RenderableType:
        table = columns(2)
        table.add_column("CHECKPOINT", no_wrap=True)
        table.add_column("SIZE", no_wrap=True, justify="right")
        table.add_column("WHY", overflow="fold")
        for name, count, why in listed:
            table.add_row(Text(clean(name)), size(count), Text(clean(why)))
        return table

    show(build, console)
