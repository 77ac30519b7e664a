"""Many runs at a glance."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmops.monitor import printing
from llmops.monitor.feed import Feed
from llmops.monitor.plot import sparkline
from llmops.monitor.printing import PIPED, columns
from llmops.monitor.text import clean, count, duration, number, percent
from llmops.runs.state import DONE

WIDE = 160  # from this many columns on, a run takes one line; below, two
REDRAW_S = 1.0
COLOURS = {
    "pending": "cyan",
    "running": "green",
    "preempted": "yellow",
    "finished": "blue",
    "failed": "red",
    "cancelled": "bright_black",
    "unknown": "magenta",
    "lost": "red",
}


def show(described: Sequence[dict[str, Any]], console: Console, now: float) -> None:
    """Print the table once."""
    if not described:
        console.out("no runs", highlight=False)
    else:
        printing.show(console, lambda out: out.print(build(described, out.width, now, out.options.ascii_only)))


def live(fetch: Callable[[], Sequence[dict[str, Any]]], interval: float, console: Console) -> None:
    """Redraw in place until every run is done. Goes on when the store or a scheduler does not answer for a while."""
    described: Sequence[dict[str, Any]] | None = None
    feed = Feed(fetch, interval)

    def view(trouble: str) -> RenderableType:
        now, width, ascii_only = time.time(), console.width, console.options.ascii_only
        if described is None:
            return Text(trouble or "reading runs", style="red" if trouble else "bright_black")
        shown = _that_fit(described, (console.height - 3) // (1 if width >= WIDE else 3))
        more = f"{len(described) - len(shown)} more; " if len(shown) < len(described) else ""
        hint = f"{more}every {interval:g} s, Ctrl-C ends the view, not the runs"
        return Group(
            build(shown, width, now, ascii_only), Text(trouble or hint, style="red" if trouble else "bright_black")
        )

    try:
        with Live(view(""), console=console, auto_refresh=False, transient=True) as display:
            number = 0
            while described is None or not all(each["state"] in DONE for each in described):
                seen = feed.wait(number, REDRAW_S)  # ages and estimates go on between two looks
                number, described = seen.number, described if seen.value is None else seen.value
                frame = view(f"not up to date: {clean(seen.trouble)}" if seen.trouble else "")
                # Terminals that know these marks show a frame only when it is whole; others ignore them.
                console.file.write("\x1b[?2026h")
                display.update(frame, refresh=True)
                console.file.write("\x1b[?2026l")
                console.file.flush()
    finally:
        feed.close()
    show(described, console, time.time())


def _that_fit(described: Sequence[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """As many as there are rows, in order; those that are not done, and then the newest, come before others."""
    by_interest = sorted(described, key=lambda each: (each["state"] not in DONE, each["created"] or 0), reverse=True)
    chosen = {each["id"] for each in by_interest[: max(rows, 1)]}
    return [each for each in described if each["id"] in chosen]


def build(described: Sequence[dict[str, Any]], width: int, now: float, ascii_only: bool = False) -> Table:
    """The table for ``width`` columns."""
    rows = [_Row(each, now, ascii_only) for each in described]
    return _wide(rows, width) if width >= WIDE else _narrow(rows)


def _wide(rows: Sequence[_Row], width: int) -> Table:
    table = columns()
    right = ("TOK/S", "MFU", "GOODPUT", "ETA", "SAVED", "AGE")
    for name in ("NAME", "BACKEND", "JOB", "STATE", "PROGRESS", "LOSS", *right[:4], "ATTEMPTS", *right[4:]):
        table.add_column(name, no_wrap=True, justify="right" if name in right else "left")
    if width < PIPED:  # the reason takes what is left, and is cut; the page of the run has all of it
        table.columns[0].max_width, table.columns[2].max_width = max(16, width // 10), max(10, width // 16)
        table.columns[3].ratio, table.expand = 1, True
        table.columns[10].max_width = width // 7
    for row in rows:
        told = row.trouble or row.reason
        state = Text.assemble(row.state, (f"  {told}" if told else "", "yellow" if row.trouble else "bright_black"))
        progress = Text.assemble(row.bar(10 if width < PIPED else 0), row.steps)
        table.add_row(
            row.name,
            row.backend,
            row.job,
            state,
            progress,
            Text.assemble(row.loss, " ", row.spark(12)),
            row.rate,
            row.mfu,
            row.goodput,
            row.eta,
            row.attempts,
            row.saved,
            row.age,
        )
    return table


def _narrow(rows: Sequence[_Row]) -> Table:
    """Two lines a run, and a third for one that is well."""
    table = columns()
    for name in ("NAME", "STATE", "PROGRESS", "LOSS", "ETA"):
        table.add_column(name, no_wrap=True, justify="right" if name == "ETA" else "left")
    table.columns[0].ratio, table.columns[1].ratio = 3, 4
    table.expand = True
    for row in rows:
        where = Text(" ".join(part for part in (row.backend.plain, row.job.plain) if part != "-"), style="bright_black")
        told = row.trouble or row.reason or row.last_end
        notes = [Text(note, style="bright_black") for note in (told, row.health) if note] or [Text()]
        if row.trouble:
            notes[0].stylize("yellow")
        again = f"x{row.count} " if row.count > 1 else ""
        table.add_row(
            _lines(row.name, where),
            _lines(row.state, *notes),
            _lines(row.steps, row.bar(14)),
            _lines(row.loss, row.spark(8)),
            _lines(row.eta, Text(f"{again}{row.age}", style="bright_black")),
        )
    return table


def _lines(*lines: Text) -> Group:
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


class _Row:
    """The cells of one run. Everything that a user or a program wrote goes through ``clean`` and ``Text``."""

    def __init__(self, described: dict[str, Any], now: float, ascii_only: bool) -> None:
        self._run, self._ascii = described, ascii_only
        attempts = described["attempts"]
        self.count = len(attempts)
        self.name = Text(clean(described["name"]), style="bold")
        self.backend = Text(clean(described["backend"]) or "-")
        self.job = Text(clean(described["job_ids"][-1]) if described["job_ids"] else "-")
        self.state = Text(described["state"], style=COLOURS.get(described["state"], ""))
        self.reason = clean(described["reason"])
        self.loss = Text(number(described["loss"]))
        created = described["created"]
        self.age = Text("-" if created is None else duration(now - created))
        ends = [each["why"] for each in attempts if each["why"]]
        self.last_end = f"last: {clean(ends[-1])}" if ends and described["state"] not in DONE else ""
        self.attempts = Text(
            " ".join(part for part in (str(self.count or "-"), self.last_end and f"({self.last_end})") if part)
        )
        most = described["max_steps"]
        self.steps = Text(f"{described['step']:,}" + (f"/{most:,}" if most else ""))
        silent = described["stalled_s"]
        self.trouble = "" if silent is None else f"no sign of life for {duration(silent)}"
        self.rate = Text(count(described["tokens_per_s"]))
        self.mfu, self.goodput = Text(percent(described["mfu"])), Text(percent(described["goodput"]))
        left = described["eta_s"]
        self.eta = Text("-" if left is None else duration(left))
        commit = described["last_commit"] or {}
        self.saved = Text("-" if commit.get("time") is None else duration(now - commit["time"]))
        self.health = self._health(commit) if described["state"] == "running" else ""

    def _health(self, commit: dict[str, Any]) -> str:
        """How a run that is well is doing, the most telling first."""
        run = self._run
        parts = [run["phase"] if run["phase"] != "training" else None]
        parts.append(f"{self.rate} tok/s" if run["tokens_per_s"] else None)
        parts.append(f"MFU {self.mfu}" if run["mfu"] is not None else None)
        parts.append(f"goodput {self.goodput}" if run["goodput"] is not None else None)
        parts.append(f"saved {self.saved} ago" if commit.get("time") is not None else None)
        return ", ".join(part for part in parts if part)

    def bar(self, width: int) -> Text:
        """Share of the steps done; nothing where the end is not known."""
        most = self._run["max_steps"]
        if not most or not width:
            return Text("")
        done = min(max(round(self._run["step"] / most * width), 0), width)
        full, empty = ("#", ".") if self._ascii else ("━", "─")
        return Text.assemble((full * done, self.state.style), (empty * (width - done), "bright_black"), " ")

    def spark(self, width: int) -> Text:
        """The shape of the last losses; nothing for fewer than two."""
        losses = [loss for loss in self._run["recent_losses"] if loss is not None]
        return Text("" if self._ascii or len(losses) < 2 else sparkline(losses, width), style="cyan")
