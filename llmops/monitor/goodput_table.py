"""Goodput for people: where the hours went, in all and by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmops.monitor import printing
from llmops.monitor.goodput import WORDS
from llmops.monitor.printing import PIPED, columns
from llmops.monitor.spans import GROUPS, SIGNS
from llmops.monitor.text import clean, duration, percent

BAR_WIDTH = 40
PIPED_BAR_WIDTH = 20


def show(groups: Sequence[Mapping[str, Any]], whole: Mapping[str, Any], by: str, console: Console) -> None:
    """Print what :func:`llmops.overview.goodput` found; into a pipe, lines that are neither folded nor cut."""
    if not whole["runs"]:
        console.out("no run has spent any time in this period", highlight=False)
        return
    printing.show(console, lambda out: out.print(_page(groups, whole, by, out.width, out.options.ascii_only)))


def _page(
    groups: Sequence[Mapping[str, Any]], whole: Mapping[str, Any], by: str, width: int, ascii_only: bool
) -> RenderableType:
    return Group(_groups(groups, whole, by, width, ascii_only), Text(), _breakdown(whole, ascii_only))


def _groups(
    groups: Sequence[Mapping[str, Any]], whole: Mapping[str, Any], by: str, width: int, ascii_only: bool
) -> Table:
    priced = "cost" in whole
    table = columns()
    table.add_column(by.upper(), no_wrap=True, overflow="ellipsis", max_width=max(width // 3, 16))
    for name in ("RUNS", "NODE-HOURS", "RANK-HOURS", *(("COST",) if priced else ()), "GOODPUT"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("WHERE IT WENT", no_wrap=True)
    cells = PIPED_BAR_WIDTH if width == PIPED else min(BAR_WIDTH, max(width - 70, 10))
    for row in [*groups, whole] if len(groups) > 1 else [whole]:
        table.add_row(
            Text(clean(row["name"]), style="bold" if row is whole else ""),
            f"{row['runs']:,}",
            f"{row['node_hours']:,.2f}",
            f"{row['rank_hours']:,.2f}",
            *((f"{row['cost']:,.2f}",) if priced else ()),
            Text(percent(row["goodput"]), style="bold"),
            _bar(row["shares"], cells, ascii_only),
        )
    return table


def _bar(shares: Mapping[str, float], cells: int, ascii_only: bool) -> Text:
    """The shares side by side; what is worth half a cell is seen."""
    text, done = Text(), 0.0
    for name, share in shares.items():
        before, done = done, done + share
        count = round(done * cells) - round(before * cells)
        sign, plain, style = SIGNS[GROUPS["train" if name == "committed" else name]]
        text.append((plain if ascii_only else sign) * count, style=style)
    return text


def _breakdown(whole: Mapping[str, Any], ascii_only: bool) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(style="bright_black", overflow="fold")
    for name, share in whole["shares"].items():
        if share:
            sign, plain, style = SIGNS[GROUPS["train" if name == "committed" else name]]
            label = Text.assemble((plain if ascii_only else sign, style), f" {name}")
            grid.add_row(label, percent(share), _hours(share * whole["node_hours"]), WORDS[name])
    return grid


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else duration(hours * 3600)
