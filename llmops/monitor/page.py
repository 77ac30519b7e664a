"""All about one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmops.monitor import printing, spans
from llmops.monitor.checkpoints import size
from llmops.monitor.plot import curve_width, loss_curve
from llmops.monitor.printing import columns
from llmops.monitor.scores import by_step
from llmops.monitor.table import COLOURS
from llmops.monitor.text import clean, clean_lines, count, duration, moment, number, percent

CHECKPOINTS = 3  # that the page names
SCORES = 24  # rows of them
CURVE_HEIGHT = 14
TOLD = 10  # points of a curve that cannot be drawn


def show(detail: dict[str, Any], console: Console, now: float) -> None:
    """Print the page of what :func:`llmops.monitor.detail.detail` says."""
    printing.show(
        console, lambda out: out.print(build(detail, out.width, curve_width(out), now, out.options.ascii_only))
    )


def build(run: dict[str, Any], width: int, line: int, now: float, ascii_only: bool) -> Group:
    """The page for ``width`` columns, of which its timeline and curve take ``line``."""
    parts: list[RenderableType] = [_facts(run, now)]
    if run["timeline"]:
        parts += [Text(), *spans.lines(run["timeline"], line, ascii_only)]
    if run["attempts"]:
        parts += [Text(), _attempts(run, now, narrow=width < 110)]
    for part in (_checkpoints(run, now), _scores(run, width), _changes(run), _curve(run, line, ascii_only)):
        if part is not None:
            parts += [Text(), part]
    if run["error"]:
        parts += [Text(), Text("last error", style="bold red")]
        parts += [Text("  " + text) for text in clean_lines(run["error"])]
    return Group(*parts)


def _curve(run: dict[str, Any], width: int, ascii_only: bool) -> Text | None:
    series = run["series"]
    points = [(step, loss) for step, loss in zip(series["step"], series["loss"], strict=True) if loss is not None]
    if not ascii_only:
        curve = loss_curve(points, width, CURVE_HEIGHT)
        return Text(curve, style="cyan", no_wrap=True, overflow="crop") if curve else None
    if len(points) < 2:
        return None
    # A curve takes more than ASCII; without it, its course is told in numbers.
    shown = dict(points[index * (len(points) - 1) // (TOLD - 1)] for index in range(TOLD))
    return Text("\n".join(["loss by step", *(f"{step:>12,}  {number(loss)}" for step, loss in shown.items())]))


def _checkpoints(run: dict[str, Any], now: float) -> Text | None:
    """The newest few, on one line."""
    found = run["checkpoints"]
    if not found:
        return None
    shown = [
        f"step {each['step']:,}"
        + (
            f" ({size(each['bytes'])}, {duration(now - each['time'])} ago)"
            if each["time"] is not None
            else " (damaged)"
        )
        for each in found[:CHECKPOINTS]
    ]
    more = f"; {len(found) - CHECKPOINTS} more: `llmops ckpt ls`" if len(found) > CHECKPOINTS else ""
    return Text.assemble(("checkpoints ", "bold"), ", ".join(shown) + more)


def _scores(run: dict[str, Any], width: int) -> Table | None:
    """Of the last few steps that have some, each task and metric."""
    steps, rows = by_step(run["scores"], max(1, min(6, (width - 48) // 12)))
    if not rows:
        return None
    table = columns()
    table.add_column("TASK", overflow="fold")
    table.add_column("METRIC", overflow="fold")
    for step in steps:
        table.add_column(f"STEP {step:,}", justify="right", no_wrap=True)
    for (task, metric), values in list(rows.items())[:SCORES]:
        cells = ["-" if each is None else number(each["value"]) for each in values]
        table.add_row(*(Text(clean(cell)) for cell in (task, metric, *cells)))
    if len(rows) > SCORES:
        table.add_row(Text(f"{len(rows) - SCORES} more"), Text("in evals/ of its folder"))
    return table


def _changes(run: dict[str, Any]) -> Table | None:
    """What its point in a study is, and what resumes have changed."""
    rows = [(key, "", value, "of its study") for key, value in run["params"].items()]
    rows += [
        (each["key"], each["old"], each["new"], f"submission {each['submission']}") for each in run["config_changes"]
    ]
    if not rows:
        return None
    table = columns()
    for name in ("CHANGED KEY", "FROM", "TO", "BY"):
        table.add_column(name, overflow="fold")
    for key, old, new, by in rows:
        table.add_row(*(Text(clean(str(cell))) for cell in (key, old, new, by)))
    return table


def _facts(run: dict[str, Any], now: float) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(overflow="fold")
    state = Text.assemble((run["state"], f"bold {COLOURS.get(run['state'], '')}"))
    if run["reason"]:
        state.append(f"  {clean(run['reason'])}")
    jobs = ", ".join(clean(job) for job in run["job_ids"]) or "none"
    nodes, ranks = run["nodes"], run["ranks_per_node"]
    size = f", {nodes} x {ranks} ranks" if nodes and ranks else ""
    most = run["max_steps"]
    progress = f"step {run['step']:,}"
    if most:
        progress += f" of {most:,} ({min(run['step'] / most, 1):.0%})"
    if run["eta_s"] is not None:
        progress += f", {duration(run['eta_s'])} left"
    if run["loss"] is not None:
        progress += f", loss {number(run['loss'])}"
    if run["tokens_per_s"] is not None:
        progress += f", {count(run['tokens_per_s'])} tokens/s"
    if run["mfu"] is not None:
        progress += f", MFU {percent(run['mfu'])}"
    shares = spans.shares(run["goodput_shares"])
    rows = [
        ("run", Text(clean(run["name"]), style="bold")),
        ("id", Text(clean(run["id"]))),
        ("state", state),
        ("progress", Text(progress)),
        ("goodput", Text(f"{percent(run['goodput'])} of {run['node_hours']:.2f} node-hours: {shares}")),
        ("backend", Text(f"{clean(run['backend']) or '-'}{size}; jobs: {jobs}")),
        ("stored", Text(clean(run["url"]))),
    ]
    if run["endpoint"] is not None and run["state"] == "running":
        rows.append(("serves", Text(clean(f"{run['endpoint']['model']} at {run['endpoint']['url']}"))))
        if run["endpoint"]["command"]:
            rows.append(("reach", Text(clean(f"{run['endpoint']['command']}  # then the address is this machine's"))))
    if run["created"] is not None:
        by = f" by {clean(run['owner'])}" if run["owner"] else ""
        rows.append(("created", Text(f"{moment(run['created'])}{by}, {duration(now - run['created'])} ago")))
    if run["stalled_s"] is not None:
        rows.insert(3, ("health", Text(f"no sign of life for {duration(run['stalled_s'])}", style="yellow")))
    rows += [("problem", Text(clean(problem), style="red")) for problem in run["problems"]]
    for label, value in rows:
        table.add_row(label, value)
    return table


def _attempts(run: dict[str, Any], now: float, narrow: bool) -> Table:
    table = columns()
    table.add_column("ATTEMPT", justify="right", no_wrap=True)
    table.add_column("STATE", no_wrap=True)
    table.add_column("STEPS", no_wrap=True)
    if not narrow:
        table.add_column("STARTED", no_wrap=True)
    table.add_column("TOOK", justify="right", no_wrap=True)
    table.add_column("HOSTS", no_wrap=True)
    table.add_column("WHY IT ENDED", overflow="fold")
    for attempt in run["attempts"]:
        over = attempt["ended"] is not None
        took = attempt["ended"] - attempt["started"] if over else now - attempt["started"]
        reason, detail = clean(attempt["why"]), clean(attempt["detail"])
        why = detail if detail.startswith(reason) else "; ".join(part for part in (reason, detail) if part)
        first, last = attempt["first_step"], attempt["last_step"]
        cells = [
            Text(str(attempt["number"])),
            Text(attempt["state"], style=COLOURS.get(attempt["state"], "")),
            Text("-" if last is None else f"{first:,}-{last:,}" if first is not None else f"-{last:,}"),
            Text(moment(attempt["started"])),
            Text(duration(took) if over or attempt["state"] == "running" else "-"),
            Text(_hosts([clean(host) for host in attempt["hosts"]], 12 if narrow else 32)),
            Text(why),
        ]
        if narrow:
            del cells[3]
        table.add_row(*cells)
    return table


def _hosts(hosts: Sequence[str], width: int) -> str:
    """All of them if they fit, else the first and last, else how many."""
    for text in (", ".join(hosts), f"{hosts[0]} .. {hosts[-1]} ({len(hosts)})" if hosts else ""):
        if len(text) <= width:
            return text
    return f"{len(hosts)} hosts" if len(hosts) > 1 else hosts[0][:width]
