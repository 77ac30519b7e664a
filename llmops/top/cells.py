"""What the tables show in each column. Text that others wrote is cleaned, and never read as markup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from llmops.monitor.plot import sparkline
from llmops.monitor.table import COLOURS
from llmops.monitor.text import clean, count, duration, number, percent
from llmops.runs.state import DONE

Described = dict[str, Any]
DIM = "grey62"
STYLES = {**COLOURS, "cancelled": DIM}  # bright black can hardly be read on black
_TRIAL_STYLES = {**STYLES, "complete": "blue", "pruned": DIM, "nan": "red", "timeout": "yellow"}
NAME_MIN, NAME_MAX, WHY_MAX = 14, 40, 60
GAP = 2  # columns of padding that every cell has


@dataclass(frozen=True)
class Look:
    """When it is looked at, and whether the terminal shows more than ASCII."""

    now: float
    ascii_only: bool = False


@dataclass(frozen=True)
class Column:
    """One column: ``order`` says which ones are left out first where the terminal is narrow."""

    key: str
    title: str
    width: int
    order: int
    cell: Callable[[Described, Look], Text]
    right: bool = False


def state(run: Described, look: Look) -> Text:
    """The state's word in its colour; of a run that is silent for too long, that."""
    if run.get("stalled_s") is not None:
        return Text("stalled", style="bold yellow")
    return Text(clean(run["state"]), style=STYLES.get(run["state"], ""))


def why(run: Described, look: Look) -> Text:
    """What it is doing, or why it is not: one line."""
    if (silent := run.get("stalled_s")) is not None:
        return Text(f"no step for {duration(silent)}", style="yellow")
    words = clean(run["reason"] or "") or (clean(run.get("phase") or "") if run["state"] == "running" else "")
    if not words and run["state"] not in DONE:
        ends = [each["why"] for each in run["attempts"] if each["why"]]
        words = f"last: {clean(ends[-1])}" if ends else ""
    if not words and run["problems"]:
        return Text(clean(run["problems"][0]), style="red")
    return Text(words)


def progress(run: Described, look: Look) -> Text:
    """Share of the steps done."""
    most = run["max_steps"]
    if not most:
        return Text("-", style=DIM)
    share = min(max(run["step"] / most, 0.0), 1.0)
    full, empty = ("#", ".") if look.ascii_only else ("━", "─")
    done = int(share * 7)
    colour = STYLES.get(run["state"], "")
    return Text.assemble((full * done, colour), (empty * (7 - done), DIM), f"{int(share * 100):>4}%")


def _steps(run: Described, look: Look) -> Text:
    return Text(f"{run['step']:,}" + (f"/{run['max_steps']:,}" if run["max_steps"] else ""))


def _trend(run: Described, look: Look) -> Text:
    losses = [loss for loss in run["recent_losses"] if loss is not None]
    return Text("" if look.ascii_only or len(losses) < 2 else sparkline(losses, 8), style="cyan")


def _tries(run: Described, look: Look) -> Text:
    """Attempts; those that a failure ended stand out."""
    bad = sum(times for reason, times in (run.get("restarts") or {}).items() if reason not in ("preempted", "timeout"))
    tries = sum(run["trials"].values()) if "trials" in run else len(run["attempts"])
    return Text(str(tries), style="yellow" if bad else "")


def _commit(run: Described, look: Look) -> Text:
    commit = run.get("last_commit")
    if not commit or commit.get("time") is None:
        return Text("-", style=DIM)
    return Text(duration(look.now - commit["time"]))


def _eta(run: Described, look: Look) -> Text:
    return Text("-" if run.get("eta_s") is None else duration(run["eta_s"]))


def _age(run: Described, look: Look) -> Text:
    return Text("-" if run["created"] is None else duration(look.now - run["created"]))


def _name(run: Described, look: Look) -> Text:
    return Text(clean(run["name"]) or clean(run["id"]), style="bold")


RUNS: Sequence[Column] = (
    Column("name", "NAME", NAME_MIN, 0, _name),
    Column("owner", "OWNER", 8, 10, lambda run, look: Text(clean(run.get("owner") or "-"))),
    Column("backend", "BACKEND", 7, 9, lambda run, look: Text(clean(run["backend"]) or "-")),
    Column("state", "STATE", 9, 1, state),
    Column("why", "WHY", 12, 13, why),
    Column("progress", "PROGRESS", 12, 2, progress),
    Column("steps", "STEP", 15, 11, _steps, right=True),
    Column("loss", "LOSS", 7, 3, lambda run, look: Text(number(run["loss"])), right=True),
    Column("trend", "TREND", 8, 6, _trend),
    Column("tokens", "TOK/S", 6, 7, lambda run, look: Text(count(run.get("tokens_per_s"))), right=True),
    Column("mfu", "MFU", 4, 8, lambda run, look: Text(percent(run.get("mfu"))), right=True),
    Column("goodput", "GOOD", 4, 8, lambda run, look: Text(percent(run.get("goodput"))), right=True),
    Column("eta", "ETA", 7, 4, _eta, right=True),
    Column("commit", "COMMIT", 7, 5, _commit, right=True),
    Column("tries", "TRIES", 5, 9, _tries, right=True),
    Column("age", "AGE", 7, 12, _age, right=True),
)

TRIALS: Sequence[Column] = (
    Column("trial", "TRIAL", 5, 0, lambda row, look: Text(str(row["trial"])), right=True),
    Column("state", "STATE", 9, 1, lambda row, look: Text(row["state"], style=_TRIAL_STYLES.get(row["state"], ""))),
    Column("value", "VALUE", 9, 2, lambda row, look: Text(number(row.get("value"))), right=True),
    Column("step", "STEP", 8, 4, lambda row, look: Text(_dash(row.get("step"))), right=True),
    Column("took", "TOOK", 7, 5, lambda row, look: Text(duration(row.get("seconds") or 0)), right=True),
    Column("tries", "TRIES", 5, 6, lambda row, look: Text(str(row.get("attempts", 0))), right=True),
    Column("point", "POINT", NAME_MIN, 3, lambda row, look: Text(point(row.get("params") or {}))),
    Column("why", "WHY", 12, 7, lambda row, look: Text(clean(row.get("reason") or ""))),
)


def _dash(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def point(params: dict[str, Any]) -> str:
    """Where a trial is in its study's space."""
    return " ".join(
        f"{clean(key)}={clean(f'{value:.4g}' if isinstance(value, float) else str(value))}"
        for key, value in params.items()
    )


def fit(columns: Sequence[Column], width: int, flexible: str, longest: int) -> list[tuple[Column, int]]:
    """The columns for a terminal of ``width``, in order, with the width of each.

    What is left over widens column ``flexible``, up to its ``longest`` cell, and then the column "why", if it is shown.
    """
    chosen: set[str] = set()
    left = width
    for column in sorted(columns, key=lambda each: each.order):
        if column.width + GAP > left:
            break
        chosen.add(column.key)
        left -= column.width + GAP
    widths = {column.key: column.width for column in columns if column.key in chosen}
    for key, most in ((flexible, min(longest, NAME_MAX)), ("why", WHY_MAX)):
        if key in widths:
            more = max(min(left, most - widths[key]), 0)
            widths[key] += more
            left -= more
    return [(column, widths[column.key]) for column in columns if column.key in chosen]


def cells(row: Described, columns: Sequence[tuple[Column, int]], look: Look) -> list[Text]:
    """One cell a column, cut to its width."""
    made = []
    for column, width in columns:
        text = column.cell(row, look)
        text.no_wrap, text.overflow, text.end = True, "ellipsis", ""
        text.justify = "right" if column.right else "left"
        text.truncate(width, overflow="crop" if look.ascii_only else "ellipsis")
        made.append(text)
    return made
