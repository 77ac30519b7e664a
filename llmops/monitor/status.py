"""What ``llmops status`` shows of runs: a table, a page, or both live."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmops.errors import ClusterError
from llmops.monitor.describe import Described
from llmops.runs.state import DONE

if TYPE_CHECKING:
    from rich.console import Console


def render(described: Sequence[Described], console: Console | None = None, now: float | None = None) -> None:
    """Print a table of runs: for the width of a terminal, or one plain line a run when piped."""
    from llmops.monitor import table

    console = console or _console()
    table.show(described, console, time.time() if now is None else now)


def render_run(detail: Described, console: Console | None = None, now: float | None = None) -> None:
    """Print the page of one run: its state, timeline, attempts, checkpoints, loss curve and last error."""
    from llmops.monitor import page

    console = console or _console()
    page.show(detail, console, time.time() if now is None else now)


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
