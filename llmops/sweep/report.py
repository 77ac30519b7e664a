"""What a study has found: its best trial, what matters, and the page of both for a terminal."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmops.config.overrides import assign
from llmops.monitor import printing
from llmops.monitor.plot import curve_width, drawing
from llmops.monitor.printing import columns
from llmops.monitor.text import clean, duration, number
from llmops.sweep import importance
from llmops.sweep.model import StudyRecord, TrialRow
from llmops.sweep.table import ORDER, STATE_COLOURS, counts

MOST = 20  # trials in the table
BAR_WIDTH = 40
CURVE_HEIGHT = 14
FIXED_WIDTH = 41  # columns of the table before the parameters
PARAMETER_WIDTH = 24  # of one, at most


def best(record: StudyRecord, rows: Sequence[TrialRow]) -> TrialRow | None:
    """The trial with the best value among those that came to an end by themselves or by their time limit."""
    return next(iter(ranked(record, rows)), None)


def ranked(record: StudyRecord, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Trials that count, the best first; of equal ones, the earlier."""
    sign = 1 if record.sweep.direction == "minimize" else -1
    counted = [row for row in rows if row.state in ("complete", "timeout") and _finite(row.value) is not None]
    return sorted(counted, key=lambda row: (sign * (row.value or 0.0), row.trial))


def so_far(record: StudyRecord, rows: Sequence[TrialRow]) -> list[tuple[int, float]]:
    """(trial, best value up to it) of trials that count, by trial."""
    choose = min if record.sweep.direction == "minimize" else max
    found: list[tuple[int, float]] = []
    for row in sorted(ranked(record, rows), key=lambda row: row.trial):
        assert row.value is not None
        found.append((row.trial, choose(row.value, found[-1][1]) if found else row.value))
    return found


def as_overrides(record: StudyRecord, row: TrialRow) -> list[str]:
    """What `llmops submit` takes to run the trial's point; empty where the point is not known yet."""
    known = [axis for axis in record.axes if axis.key in row.params]
    return [
        f"{axis.key}={row.params[axis.key]}" if axis.group else assign(axis.key, row.params[axis.key]) for axis in known
    ]


def summary(record: StudyRecord, rows: Sequence[TrialRow]) -> dict[str, Any]:
    """The report as plain data, fit for JSON."""
    found = best(record, rows)
    tally = Counter(row.state for row in rows)
    return {
        "id": record.id,
        "name": record.name,
        "sampler": record.sweep.sampler,
        "objective": record.sweep.objective,
        "direction": record.sweep.direction,
        "trials": len(rows),
        "states": {state: tally[state] for state in sorted(tally)},
        "best": None
        if found is None
        else {
            "trial": found.trial,
            "id": found.id,
            "value": found.value,
            "step": found.step,
            "params": found.params,
            "overrides": as_overrides(record, found),
        },
        "importance": importance.importance(record, rows),
    }


def show(record: StudyRecord, rows: Sequence[TrialRow], console: Console) -> None:
    """Print the page; into a pipe, plain lines that are neither folded nor cut."""
    printing.show(console, lambda out: _print(record, rows, out, curve_width(out)))


def _print(record: StudyRecord, rows: Sequence[TrialRow], console: Console, width: int) -> None:
    ascii_only = console.options.ascii_only
    shares = importance.importance(record, rows)
    console.print(_header(record, rows, ascii_only))
    first = ranked(record, rows)
    console.print()
    if first:
        axes = _axes(record, shares, first[:MOST], console.width)
        console.print(_table(first[:MOST], axes, ascii_only))
        more = [f"{len(rows) - len(first[:MOST])} more trials"] if len(rows) > len(first[:MOST]) else []
        more += [f"{len(record.axes) - len(axes)} more parameters"] if len(axes) < len(record.axes) else []
        if more:
            console.print(Text(f"{', '.join(more)}; --html has all of them", style="bright_black"))
    else:
        console.print(Text("no trial has a value yet", style="bright_black"))
    if shares:
        console.print()
        console.print(_bars(shares, ascii_only))
    elif first and not importance.available():
        console.print(Text("importance of parameters: needs Optuna; pip install 'llmops[sweep]'", style="bright_black"))
    curve = "" if ascii_only else _curve(record, rows, width)
    if curve:
        console.print()
        console.print(Text(curve, style="cyan", no_wrap=True, overflow="crop"))


def _header(record: StudyRecord, rows: Sequence[TrialRow], ascii_only: bool) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bright_black", no_wrap=True)
    grid.add_column(overflow="fold")
    sweep = record.sweep
    pruner = f" with {sweep.pruner.name}" if sweep.pruner.name != "none" else ""
    grid.add_row("study", Text.assemble((_text(record.name, ascii_only), "bold"), "  ", _text(record.id, ascii_only)))
    grid.add_row("sampler", Text(sweep.sampler + pruner))
    grid.add_row("objective", Text(f"{sweep.direction} {_text(sweep.objective, ascii_only)}"))
    grid.add_row("trials", Text(f"{len(rows):,}" + (f": {counts(rows)}" if rows else "")))
    if rows:
        grid.add_row("", _state_bar(rows, ascii_only))
    found = best(record, rows)
    if found is not None:
        point = "  ".join(_text(override, ascii_only) for override in as_overrides(record, found))
        grid.add_row("best", Text.assemble((number(found.value), "bold"), f" by trial {found.trial}: {point}"))
    return grid


def _state_bar(rows: Sequence[TrialRow], ascii_only: bool) -> Text:
    """States side by side, in the order of the counts; each state that occurs has a cell at least."""
    tally = Counter(row.state for row in rows)
    bar = Text()
    for state in ORDER:
        if tally[state]:
            cells = max(1, round(tally[state] / len(rows) * BAR_WIDTH))
            bar.append((state[0].upper() if ascii_only else "█") * cells, style=STATE_COLOURS.get(state, ""))
    return bar


def _axes(record: StudyRecord, shares: dict[str, float], rows: Sequence[TrialRow], width: int) -> list[str]:
    """Keys of the parameters that fit into the table, the important ones first to be kept; in the study's order."""
    left, kept = width - FIXED_WIDTH, set[str]()
    for key in sorted((axis.key for axis in record.axes), key=lambda key: -shares.get(key, 0.0)):
        cells = max([len(clean(key)), *(len(_value(row.params.get(key), False)) for row in rows)])
        cells = min(cells, PARAMETER_WIDTH) + 2
        if cells <= left or not kept:
            left -= cells
            kept.add(key)
    return [axis.key for axis in record.axes if axis.key in kept]


def _table(rows: Sequence[TrialRow], keys: Sequence[str], ascii_only: bool) -> Table:
    table = columns()
    for name in ("TRIAL", "STATE", "VALUE", "STEP"):
        table.add_column(name, no_wrap=True, justify="left" if name == "STATE" else "right")
    for key in keys:
        table.add_column(Text(_text(key, ascii_only)), no_wrap=True, overflow="ellipsis", max_width=PARAMETER_WIDTH)
    table.add_column("TIME", no_wrap=True, justify="right")
    for row in rows:
        table.add_row(
            str(row.trial),
            Text(row.state, style=STATE_COLOURS.get(row.state, "")),
            number(row.value),
            "-" if row.step is None else f"{row.step:,}",
            *(Text(_value(row.params.get(key), ascii_only)) for key in keys),
            duration(row.seconds) if row.seconds else "-",
        )
    return table


def _bars(shares: dict[str, float], ascii_only: bool) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="ellipsis", no_wrap=True, max_width=PARAMETER_WIDTH)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_row(Text("importance", style="bold"))
    mark = "#" if ascii_only else "█"
    for key, share in shares.items():
        grid.add_row(Text(_text(key, ascii_only)), f"{share:.0%}", Text(mark * round(share * BAR_WIDTH), style="cyan"))
    return grid


def _curve(record: StudyRecord, rows: Sequence[TrialRow], width: int) -> str:
    """Values over trials as dots, with the best so far as a line; empty for fewer than two."""
    line = so_far(record, rows)
    if len(line) < 2:
        return ""
    figure, finish = drawing(width, CURVE_HEIGHT)
    values = {row.trial: row.value for row in ranked(record, rows)}
    trials = [trial for trial, _ in line]
    steps = figure.signal(trials, [value for _, value in line], marker="braille")
    steps.lines()
    figure.draw(steps)
    figure.draw(figure.signal(trials, [values[trial] for trial in trials], marker="•"))
    every = max(1, -(-(trials[-1] - trials[0]) // max(2, width // 16)))
    ticks = list(range(trials[0], trials[-1] + 1, every))
    figure.ruler("x").ticks(ticks, [str(tick) for tick in ticks])
    if len(set(values.values())) == 1:
        figure.ruler("y").lim(line[0][1] - 0.5, line[0][1] + 0.5)
    figure.title("value by trial, and the best so far")
    return finish()


def _value(value: object, ascii_only: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), ascii_only)


def _text(text: str, ascii_only: bool) -> str:
    """Text that a user wrote, as this terminal can show it."""
    shown = clean(text)
    return shown.encode("ascii", "backslashreplace").decode() if ascii_only else shown


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
