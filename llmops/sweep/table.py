"""``llmops sweep status``: counts, and the trials that one would look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmops.monitor import printing
from llmops.monitor.printing import columns
from llmops.monitor.table import COLOURS
from llmops.monitor.text import clean, duration, number
from llmops.sweep.model import StudyRecord, TrialRow
from llmops.sweep.records import Study

MOST = 40  # trials on a terminal; a pipe gets all
ORDER = ("running", "preempted", "failed", "unknown", "nan", "timeout", "complete", "pruned", "pending", "cancelled")
STATE_COLOURS = {**COLOURS, "complete": "blue", "pruned": "cyan", "nan": "magenta", "timeout": "yellow"}


def counts(rows: Sequence[TrialRow]) -> str:
    """``3 running, 12 complete, 9 pending``: in the order in which one would ask."""
    found = Counter(row.state for row in rows)
    return ", ".join(f"{found[state]} {state}" for state in ORDER if found[state])


def show(study: Study, rows: Sequence[TrialRow], console: Console | None = None) -> None:
    """Print the state of a study."""
    printing.show(console or Console(), lambda out: _print(study, rows, out))


def _print(study: Study, rows: Sequence[TrialRow], console: Console) -> None:
    record = study.record
    console.print(Text.assemble((clean(record.name), "bold"), "  ", clean(study.id)))
    sweep = record.sweep
    pruner = f" with {sweep.pruner.name}" if sweep.pruner.name != "none" else ""
    console.print(Text(f"{sweep.sampler}{pruner}, {sweep.direction} {clean(sweep.objective)}: {counts(rows)}"))
    shown = list(rows)
    if console.is_terminal and len(rows) > MOST:
        shown = sorted(rows, key=lambda row: _interest(record, row))[:MOST]
    console.print(_table(record, sorted(shown, key=lambda row: row.trial)))
    if len(shown) < len(rows):
        console.print(Text(f"{len(rows) - len(shown)} more; --json has all of them", style="bright_black"))


def _interest(record: StudyRecord, row: TrialRow) -> tuple[int, float]:
    """What comes first: what runs, what went wrong, then the best."""
    value = float("inf") if row.value is None else row.value if record.sweep.direction == "minimize" else -row.value
    return (ORDER.index(row.state) if row.state in ORDER else 0, value)


def _table(record: StudyRecord, rows: Sequence[TrialRow]) -> Table:
    table = columns()
    for name in ("TRIAL", "STATE", "VALUE", "STEP", *(clean(axis.key) for axis in record.axes), "TIME", "WHY"):
        table.add_column(name, no_wrap=name != "WHY", overflow="ellipsis", justify="left")
    for row in rows:
        table.add_row(
            str(row.trial),
            Text(row.state, style=STATE_COLOURS.get(row.state, "")),
            number(row.value),
            "-" if row.step is None else f"{row.step:,}",
            *(Text(_value(row.params.get(axis.key))) for axis in record.axes),
            duration(row.seconds) if row.seconds else "-",
            Text(clean(row.reason), style="bright_black"),
        )
    return table


def _value(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else clean(str(value))
