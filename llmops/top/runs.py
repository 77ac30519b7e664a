"""The first screen: all runs and studies."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Input, Static

from llmops.monitor.text import clean
from llmops.runs.state import DONE
from llmops.top.cells import DIM, RUNS, STYLES, Described, Look, fit, why
from llmops.top.table import KeyedTable
from llmops.top.widgets import Filter, Keys, freshness

if TYPE_CHECKING:
    from llmops.top.app import TopApp

_STATES = ("running", "pending", "preempted", "unknown", "failed", "cancelled", "finished")


def _share(run: Described) -> float:
    return -(run["step"] / run["max_steps"]) if run["max_steps"] else 1.0


def _low(value: float | None) -> float:
    return float("inf") if value is None else value


# What `s` goes through: the column that is marked, and the key that sorts.
SORTS: Sequence[tuple[str, str, Callable[[Described], Any]]] = (
    ("newest first", "age", lambda run: -(run["created"] or 0)),
    ("by name", "name", lambda run: run["name"].lower()),
    ("by state", "state", lambda run: _STATES.index(run["state"]) if run["state"] in _STATES else len(_STATES)),
    ("by progress", "progress", _share),
    ("by loss", "loss", lambda run: _low(run["loss"])),
    ("by time left", "eta", lambda run: _low(run.get("eta_s"))),
    ("worst goodput first", "goodput", lambda run: _low(run.get("goodput"))),
)


def chosen(runs: Sequence[Described], text: str, live_only: bool, sort: int) -> list[Described]:
    """Those that hold every word of ``text`` in name, id, owner, state or backend; in order."""
    words = text.lower().split()
    found = []
    for run in runs:
        if live_only and run["state"] in DONE:
            continue
        state = "stalled" if run.get("stalled_s") is not None else ""
        facts = (run["name"], run["id"], run.get("owner") or "", run["state"], state, run["backend"])
        told = " ".join(facts).lower()
        if all(word in told for word in words):
            found.append(run)
    key = SORTS[sort][2]
    return sorted(found, key=lambda run: (key(run), -(run["created"] or 0), run["id"]))


class RunsScreen(Screen[None]):
    """The table, what is in force, and a line about the run under the cursor."""

    app: TopApp

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l", "logs", "logs"),
        Binding("e", "errors", "errors"),
        Binding("c", "cancel", "cancel"),
        Binding("r", "resume", "resume"),
        Binding("slash", "filter", "find", key_display="/"),
        Binding("s", "sort", "sort"),
        Binding("a", "live", "live"),
        Binding("question_mark", "app.keys", "help", key_display="?"),
        Binding("q", "app.quit", "quit"),
        Binding("escape", "clear", show=False),
        Binding("f5", "refresh", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._live_only, self._sort = False, 0
        self._by_id: dict[str, Described] = {}
        self._drawn = -1

    def compose(self) -> ComposeResult:
        """From top to bottom."""
        yield Static(id="summary")
        yield Filter("name, id, owner or state")
        yield KeyedTable()
        yield Static(id="empty")
        yield Static(id="about-run")
        yield Static(id="status")
        yield Keys()

    def on_mount(self) -> None:
        """Look at what the background has found, twice a second: so the age of it counts on."""
        self.query_one(KeyedTable).focus()
        self.set_interval(0.5, self._tick)
        self._tick()

    def on_screen_resume(self) -> None:
        """Nothing was drawn while another screen was on top."""
        self._draw()

    def on_resize(self, event: events.Resize) -> None:
        """Other columns fit."""
        self._draw()

    def _tick(self) -> None:
        if self.app.screen is not self:
            return
        if self.app.feed.seen().number != self._drawn:
            self._draw()
        self._draw_status()

    def _draw(self) -> None:
        seen = self.app.feed.seen()
        self._drawn = seen.number
        table, look = self.query_one(KeyedTable), Look(time.time(), self.app.ascii_only)
        runs = chosen(self.app.runs(), self.query_one(Filter).value, self._live_only, self._sort)
        self._by_id = {run["id"]: run for run in runs}
        width = self.size.width - (2 if len(runs) > self.size.height - 6 else 0)  # room for the scroll bar
        longest = max((cell_len(clean(run["name"])) for run in runs), default=0)
        table.show(fit(RUNS, width, "name", longest), list(self._by_id.items()), look, SORTS[self._sort][1])
        table.display = bool(runs)
        empty = self.query_one("#empty", Static)
        empty.display = not runs
        if not runs:
            empty.update(self._nothing(bool(self.app.runs()), seen.taken > 0))
        self.query_one("#summary", Static).update(
            self._summary(self.app.runs(), seen.value.omitted if seen.value else 0)
        )
        self._draw_about()
        self._draw_status()

    def _nothing(self, others: bool, read: bool) -> Text:
        if others:
            return Text("no run matches: Escape drops the filter, a shows those that are over")
        return Text(f"no runs in {clean(self.app.source.runs_url)}; `llmops submit` starts one" if read else "")

    def _summary(self, runs: Sequence[Described], omitted: int) -> Text:
        counts = Counter(run["state"] for run in runs)
        text = Text.assemble((" llmops top ", "bold reverse"), f"  {len(runs)} runs")
        for state in _STATES:
            if counts[state]:
                text.append(f"  {counts[state]} {state}", style=STYLES[state])
        if omitted:
            text.append(f"  {omitted:,} older not shown", style=DIM)
        text.append(f"  {clean(self.app.source.runs_url)}", style=DIM)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text

    def _draw_status(self) -> None:
        status = freshness(self.app.feed.seen(), self.app.feed.interval_s, time.time())
        status.append(f"; {SORTS[self._sort][0]}" + ("; live only" if self._live_only else ""), style=DIM)
        status.no_wrap, status.overflow = True, "ellipsis"
        self.query_one("#status", Static).update(status)

    def _draw_about(self) -> None:
        run = self.selected
        text = Text(" ")
        if run is not None:
            reason = why(run, Look(time.time(), self.app.ascii_only))
            text = Text.assemble((f" {clean(run['id'])}", "bold"), "  ", reason)
        text.no_wrap, text.overflow = True, "ellipsis"
        self.query_one("#about-run", Static).update(text)

    @property
    def selected(self) -> Described | None:
        """The run under the cursor."""
        return self._by_id.get(self.query_one(KeyedTable).selected or "")

    def on_data_table_row_highlighted(self, event: KeyedTable.RowHighlighted) -> None:
        """The line below tells of the new one."""
        self._draw_about()

    def on_data_table_row_selected(self, event: KeyedTable.RowSelected) -> None:
        """Enter, or a second click."""
        self.action_open()

    def on_input_changed(self, event: Input.Changed) -> None:
        """As it is typed."""
        self._draw()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Back to the table."""
        self.query_one(Filter).leave(self.query_one(KeyedTable))

    def action_filter(self) -> None:
        """Type a filter."""
        self.query_one(Filter).open()

    def action_clear(self) -> None:
        """Drop the filter."""
        filter_ = self.query_one(Filter)
        filter_.value = ""
        filter_.leave(self.query_one(KeyedTable))

    def action_sort(self) -> None:
        """The next order."""
        self._sort = (self._sort + 1) % len(SORTS)
        self._draw()

    def action_live(self) -> None:
        """All runs, or those that are not over."""
        self._live_only = not self._live_only
        self._draw()

    def action_refresh(self) -> None:
        """Look again now."""
        self.app.feed.refresh()

    def action_open(self) -> None:
        """All about the run, or the study's trials."""
        if self.selected is not None:
            self.app.show_run(self.selected)

    def action_logs(self) -> None:
        """What its ranks print."""
        if self.selected is not None:
            self.app.show_logs(self.selected)

    def action_errors(self) -> None:
        """Why it failed."""
        if self.selected is not None:
            self.app.show_errors(self.selected)

    def action_cancel(self) -> None:
        """Ask, then end it for good."""
        if self.selected is not None:
            self.app.ask_cancel(self.selected)

    def action_resume(self) -> None:
        """Ask, then go on with it."""
        if self.selected is not None:
            self.app.ask_resume(self.selected)
