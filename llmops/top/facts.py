"""All about one run, as pieces that fit a terminal of any width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmops.monitor.plot import loss_curve
from llmops.monitor.text import clean, clean_lines, count, duration, moment, number, percent
from llmops.top.cells import DIM, STYLES, Described, Look, state, why

CURVE_HEIGHT, CURVE_WIDTH = 12, 110
BAR_WIDTH = 110
NOTHING = 0.005
SHOWN_COMMITS, SHOWN_CHANGES = 8, 20
# What a run's time went into: a sign of its own for each, so that none is told by its colour alone.
KINDS = {
    "train": ("━", "=", "green", "training"),
    "uncommitted": ("─", "-", "cyan", "not saved yet"),
    "checkpoint": ("s", "s", "cyan", "saving"),
    "queue": ("·", ".", DIM, "queue"),
    "import": ("i", "i", "blue", "start-up: imports"),
    "rendezvous": ("c", "c", "blue", "start-up: connecting"),
    "load": ("l", "l", "blue", "start-up: loading"),
    "lost": ("x", "x", "red", "lost"),
    "hang": ("?", "?", "magenta", "silent"),
    "idle": ("_", "_", DIM, "idle"),
}


def page(run: Described, width: int, look: Look) -> Group:
    """The whole page. ``run``: of ``api.detail``; what a key lacks is left out."""
    parts: list[RenderableType] = [_facts(run, look)]
    room = max(width - 2, 20)
    for title, part in (
        ("time", timeline(run, min(room, BAR_WIDTH), look)),
        ("attempts", _attempts(run, look, room)),
        ("loss by step", _curve(run, room, look)),
        ("checkpoints", _commits(run, look)),
        ("changed by a resume", _changes(run)),
        ("last error", _error(run)),
    ):
        if part is not None:
            parts += [Text(""), Text(title, style="bold"), part]
    return Group(*parts)


def _facts(run: Described, look: Look) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=DIM, no_wrap=True)
    table.add_column(overflow="fold")
    nodes, ranks, most = run.get("nodes"), run.get("ranks_per_node"), run["max_steps"]
    done = f"step {run['step']:,}" + (f" of {most:,} ({min(run['step'] / most, 1):.0%})" if most else "")
    if run["loss"] is not None:
        done += f", loss {number(run['loss'])}"
    if run.get("eta_s") is not None:
        done += f", {duration(run['eta_s'])} left"
    jobs = ", ".join(clean(job) for job in run["job_ids"]) or "none"
    table.add_row("run", Text(f"{clean(run['name'])}   {clean(run['id'])}", style="bold"))
    table.add_row("state", Text.assemble(state(run, look), "  ", why(run, look)))
    table.add_row("progress", Text(done))
    rate = run.get("tokens_per_s")
    speed = f"{count(rate)} tokens/s, MFU {percent(run.get('mfu'))}, " if rate is not None else ""
    hours = f" of {run['node_hours']:.3g} node-hours" if run.get("node_hours") is not None else ""
    table.add_row("speed", Text(f"{speed}goodput {percent(run.get('goodput'))}{hours}"))
    if commit := run.get("last_commit"):
        ago = f", {duration(look.now - commit['time'])} ago" if commit.get("time") is not None else ""
        table.add_row("saved", Text(f"step {commit['step']:,}{ago}"))
    size = f", {nodes} x {ranks} ranks" if nodes and ranks else ""
    table.add_row("backend", Text(f"{clean(run['backend']) or '-'}{size}; jobs: {jobs}"))
    table.add_row("stored", Text(clean(run["url"])))
    if run["created"] is not None:
        by = f" by {clean(run['owner'])}" if run.get("owner") else ""
        table.add_row("created", Text(f"{moment(run['created'])}{by}, {duration(look.now - run['created'])} ago"))
    for problem in run["problems"]:
        table.add_row("problem", Text(clean(problem), style="red"))
    return table


def timeline(run: Described, width: int, look: Look) -> Group | None:
    """A line of ``width`` characters, each of what took most of its time; below it the attempts, and what is what."""
    spans = [each for each in run.get("timeline") or [] if each["end"] > each["start"] and each["kind"] in KINDS]
    if not spans:
        return None
    start, end = spans[0]["start"], max(each["end"] for each in spans)
    bar, cell = Text(no_wrap=True), (end - start) / width
    for index in range(width):
        low, high = start + index * cell, start + (index + 1) * cell
        kind = max(spans, key=lambda each: min(each["end"], high) - max(each["start"], low))["kind"]
        sign, plain, colour, _ = KINDS[kind]
        bar.append(plain if look.ascii_only else sign, style=colour)
    marks = [" "] * width
    for number_, began in _starts(spans):
        at = min(int((began - start) / cell), width - 1)
        for offset, character in enumerate(str(number_)):
            if at + offset < width and marks[at + offset] == " ":
                marks[at + offset] = character
    ends = Text(f"{moment(start)} to {moment(end)}, {duration(end - start)}; a number: that attempt begins", style=DIM)
    return Group(bar, Text("".join(marks).rstrip(), no_wrap=True), ends, _legend(run, spans, look))


def _starts(spans: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    seen: dict[int, float] = {}
    for span in spans:
        if span["attempt"] is not None and span["kind"] != "queue":
            seen.setdefault(span["attempt"], span["start"])
    return list(seen.items())


def _legend(run: Described, spans: Sequence[dict[str, Any]], look: Look) -> Text:
    """What is what, and its share of the node-hours; what takes next to nothing is left out."""
    shares = run.get("goodput_shares") or {}
    there = {each["kind"] for each in spans}
    gap = " " if look.ascii_only else "\N{NO-BREAK SPACE}"
    legend = Text()
    for kind, (sign, plain, colour, words) in KINDS.items():
        share = shares.get("committed" if kind == "train" else kind)
        if (kind not in there and not share) or (share is not None and share < NOTHING):
            continue
        told = f" {percent(share)}" if share is not None else ""
        legend.append(f"{plain if look.ascii_only else sign}{gap}", style=colour)
        legend.append(f"{words}{told}".replace(" ", gap) + "   ")
    return legend


def _attempts(run: Described, look: Look, width: int) -> Table | None:
    if not run["attempts"]:
        return None
    table = _table()
    wide = width >= 110
    for name, right in (("NO", True), ("STATE", False), ("STEPS", False), ("TOOK", True)):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    if wide:
        table.add_column("STARTED", no_wrap=True)
    table.add_column("HOSTS", no_wrap=True, max_width=32 if wide else 12)
    table.add_column("WHY IT ENDED", overflow="fold")
    for attempt in run["attempts"]:
        ended = attempt["ended"]
        first, last = attempt["first_step"], attempt["last_step"]
        hosts = [clean(host) for host in attempt["hosts"]]
        words, detail = clean(attempt["why"]), clean(attempt["detail"])
        why_ = detail if detail.startswith(words) else "; ".join(part for part in (words, detail) if part)
        row = [
            Text(str(attempt["number"])),
            Text(attempt["state"], style=STYLES.get(attempt["state"], "")),
            Text("-" if last is None else f"{first:,}-{last:,}" if first is not None else f"-{last:,}"),
            Text(
                "-"
                if ended is None and attempt["state"] != "running"
                else duration((ended or look.now) - attempt["started"])
            ),
            Text(", ".join(hosts) if len(hosts) < 3 else f"{hosts[0]} .. {hosts[-1]} ({len(hosts)})"),
            Text(why_),
        ]
        if wide:
            row.insert(4, Text(moment(attempt["started"])))
        table.add_row(*row)
    return table


def _curve(run: Described, width: int, look: Look) -> Text | None:
    series = run.get("series") or {}
    points = [
        (step, loss)
        for step, loss in zip(series.get("step", ()), series.get("loss", ()), strict=False)
        if loss is not None
    ]
    curve = "" if look.ascii_only else loss_curve(points, min(width, CURVE_WIDTH), CURVE_HEIGHT, "")
    if not curve and len(points) > 1:
        # Characters beyond ASCII draw the curve; without them its course is told in numbers.
        shown = [points[index * (len(points) - 1) // 9] for index in range(10)]
        shown = [first for first, second in pairwise(shown) if first != second] + [points[-1]]
        curve = "\n".join(f"step {step:>10,}  {number(loss)}" for step, loss in shown)
    return Text(curve, style="cyan", no_wrap=True, overflow="crop") if curve else None


def _commits(run: Described, look: Look) -> Table | None:
    commits = run.get("checkpoints") or []
    if not commits:
        return None
    table = _table()
    for name, right in (("STEP", True), ("SAVED", False), ("AGE", True), ("SIZE", True), ("WHERE", False)):
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "WHERE", overflow="fold")
    for commit in commits[:SHOWN_COMMITS]:
        when, size = commit.get("time"), commit.get("bytes")
        problem = clean(commit.get("problem") or "")
        table.add_row(
            Text(f"{commit['step']:,}"),
            Text(moment(when)),
            Text("-" if when is None else duration(look.now - when)),
            Text("-" if size is None else f"{count(float(size))}B"),
            Text.assemble(clean(commit["path"]), (f"  {problem}" if problem else "", "red")),
        )
    if len(commits) > SHOWN_COMMITS:
        table.add_row(Text(""), Text(f"and {len(commits) - SHOWN_COMMITS} older", style=DIM))
    return table


def _changes(run: Described) -> Text | None:
    changes = run.get("config_changes") or []
    lines = [
        f"{clean(str(each['key']))}: {clean(str(each['old']))} -> {clean(str(each['new']))}"
        f"  (submission {each['submission']})"
        for each in changes[-SHOWN_CHANGES:]
    ]
    return Text("\n".join(lines)) if lines else None


def _error(run: Described) -> Text | None:
    return Text("\n".join(clean_lines(run["error"])), style="red") if run["error"] else None


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=DIM)
