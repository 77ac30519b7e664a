"""What ``llmops status`` says of runs: as JSON objects, as a table, as a page, or live."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmops.errors import ClusterError, UserError
from llmops.job import JobView
from llmops.runs.lineage import attempt_steps, merged_metrics, recent_metrics
from llmops.runs.model import Attempt, Run
from llmops.runs.state import DONE, State, derive_state, describe_end

if TYPE_CHECKING:
    from rich.console import Console

RECENT_STEPS = 64  # whose losses the table's spark line shows
ERROR_LINES = 20
_ATTEMPT_STATES = {
    "finished": "finished",
    "preempted": "preempted",
    "timeout": "preempted",
    "failed": "failed",
    "hung": "failed",
    "node_failure": "lost",
    "cancelled": "cancelled",
}

Described = dict[str, Any]


def describe(runs: Sequence[Run], jobs: Mapping[str, JobView]) -> list[Described]:
    """The stable JSON objects of ``llmops status --json``, one a run. Keys are added over time, never renamed.

    ``jobs``: by job id; the one of each run's newest submission is looked at. Times are epoch seconds. A loss that is
    not finite is null. Strings are as they were written: escape them before they reach a terminal.
    """
    return [_describe(run, jobs.get(run.job_id) if run.job_id else None) for run in runs]


def _describe(run: Run, job: JobView | None) -> Described:
    state, reason = derive_state(run, job)
    record = run.record
    problems = list(run.problems)
    try:
        recent = recent_metrics(run, RECENT_STEPS)
        attempts = [_attempt(run, attempt, state, attempt_steps(run, attempt.number)) for attempt in run.attempts]
    except (UserError, ClusterError, OSError) as error:
        # Metrics that cannot be read take nothing away from the rest of this run, nor from other runs.
        problems.append(str(error))
        recent, attempts = [], [_attempt(run, attempt, state, (None, None)) for attempt in run.attempts]
    return {
        "id": run.id,
        "name": run.name,
        "owner": record.owner if record else None,
        "backend": run.backend,
        "job_ids": run.job_ids,
        "state": state,
        "reason": reason,
        "step": _step(run, recent),
        "max_steps": record.max_steps if record else None,
        "loss": _finite(recent[-1]["loss"]) if recent else None,
        "recent_losses": [_finite(each["loss"]) for each in recent],
        "nodes": record.nodes if record else None,
        "ranks_per_node": record.ranks_per_node if record else None,
        "created": record.created if record else None,
        "url": run.url,
        "error": _error(run),
        "problems": problems,
        "attempts": attempts,
    }


def _attempt(run: Run, attempt: Attempt, state: State, steps: tuple[int | None, int | None]) -> Described:
    first, last = steps
    end = attempt.end
    return {
        "number": attempt.number,
        "submission": attempt.start.submission,
        "job_id": attempt.start.job_id,
        "state": _ATTEMPT_STATES[end.reason] if end else _open_attempt(run, attempt, state),
        "reason": end.reason if end else "",
        "why": describe_end(end) if end else "",
        "detail": (end.detail or "") if end else "",
        "next": end.next if end else None,
        "hosts": attempt.start.hosts,
        "resume_step": attempt.start.resume_step,
        "first_step": first,
        "last_step": last,
        "started": attempt.start.time,
        "ended": end.time if end else None,
    }


def _open_attempt(run: Run, attempt: Attempt, state: State) -> str:
    """An attempt without an end runs only if it is the newest, and its job is not known to be over."""
    newest = attempt is run.newest and run.submissions and attempt.start.submission == run.submissions[-1].number
    if newest and state in ("running", "unknown"):
        return "running"
    return "cancelled" if newest and state == "cancelled" else "lost"


def _step(run: Run, recent: Sequence[Mapping[str, Any]]) -> int:
    """The last step that is known to count; metrics may be written every few steps only."""
    known = [each["step"] for each in recent[-1:]]
    if run.newest:
        known.append(run.newest.start.resume_step)
        if run.newest.end and run.newest.end.last_step is not None:
            known.append(run.newest.end.last_step)
    return max(known, default=0)


def _error(run: Run) -> str | None:
    """Why the newest submission was refused, else the last lines of the newest attempt that failed."""
    if run.submissions and run.submissions[-1].failed:
        return run.submissions[-1].failed.error
    for attempt in reversed(run.attempts):
        if attempt.end and attempt.end.error:
            return "\n".join(attempt.end.error.rstrip("\n").split("\n")[-ERROR_LINES:])
    return None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def loss_points(run: Run) -> list[tuple[int, float]]:
    """Step and loss of every step that counts, for the curve."""
    return [(each["step"], each["loss"]) for each in merged_metrics(run) if _finite(each["loss"]) is not None]


def render(described: Sequence[Described], console: Console | None = None, now: float | None = None) -> None:
    """Print a table of runs: for the width of a terminal, or one plain line a run when piped."""
    from llmops.monitor import table

    console = console or _console()
    table.show(described, console, time.time() if now is None else now)


def render_run(
    described: Described,
    points: Sequence[tuple[int, float]],
    console: Console | None = None,
    now: float | None = None,
) -> None:
    """Print the page of one run: its state, attempts, loss curve (``loss_points``) and last error."""
    from llmops.monitor import page

    console = console or _console()
    page.show(described, points, console, time.time() if now is None else now)


def watch(fetch: Callable[[], Sequence[Described]], interval: float, console: Console | None = None) -> None:
    """Show the table of ``fetch()`` live, anew every ``interval`` seconds, until all runs are done or Ctrl-C.

    Where the output is not a terminal, a line is printed whenever a run changes its state.
    """
    from llmops.monitor import table

    console = console or _console()
    try:
        if console.is_terminal:
            table.live(fetch, interval, console)
        else:
            _print_changes(fetch, interval, console)
    except KeyboardInterrupt:
        return


def _print_changes(fetch: Callable[[], Sequence[Described]], interval: float, console: Console) -> None:
    from llmops.monitor.text import clean, number

    told: dict[str, str] = {}
    described = fetch()
    while True:
        for each in described:
            if told.get(each["id"]) != each["state"]:
                told[each["id"]] = each["state"]
                line = f"{each['id']} {each['state']} step {each['step']} loss {number(each['loss'])} {each['reason']}"
                console.out(clean(line), highlight=False)
        if all(each["state"] in DONE for each in described):
            return
        time.sleep(interval)
        try:
            described = fetch()
            told.pop("", None)
        except ClusterError as error:
            if told.get("") != str(error):
                told[""] = str(error)
                console.out(f"not up to date: {clean(str(error))}", highlight=False)


def _console() -> Console:
    from rich.console import Console

    return Console()
