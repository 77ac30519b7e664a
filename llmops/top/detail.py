"""The screens of one run, of one study, and of a run's output and errors."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import Static

from llmops.monitor import page
from llmops.monitor.feed import Feed
from llmops.monitor.plot import CURVE_WIDTH
from llmops.monitor.text import clean
from llmops.top.cells import TRIALS, Described, Look, fit, point
from llmops.top.table import KeyedTable
from llmops.top.widgets import Keys, freshness

if TYPE_CHECKING:
    from llmops.top.app import TopApp

_ACTIONS: list[BindingType] = [
    Binding("l", "logs", "logs"),
    Binding("e", "errors", "errors"),
    Binding("c", "cancel", "cancel"),
    Binding("r", "resume", "resume"),
]
_ENDS: list[BindingType] = [
    Binding("escape,q", "app.pop_screen", "back", key_display="Esc"),
    Binding("question_mark", "app.keys", "help", key_display="?"),
    Binding("f5", "refresh", show=False),
]
SCROLLING: list[BindingType] = [
    Binding("j", "scroll_down", show=False),
    Binding("k", "scroll_up", show=False),
    Binding("g", "scroll_home", show=False),
    Binding("G", "scroll_end", show=False),
]


class Page(VerticalScroll):
    """What is longer than the screen."""

    BINDINGS: ClassVar[list[BindingType]] = [*SCROLLING, Binding("space", "page_down", show=False)]


class FedScreen(Screen[None]):
    """A screen with a background of its own, which ends with it. ``run``: what was known when it was opened."""

    app: TopApp
    BINDINGS: ClassVar[list[BindingType]] = [*_ACTIONS, *_ENDS]

    def __init__(self, run: Described) -> None:
        super().__init__()
        self.run = run
        self._drawn = -1
        self._feed: Feed[Any] | None = None

    def fetch(self) -> Any:
        """On a thread: what is shown."""
        raise NotImplementedError

    def draw(self, value: Any) -> None:
        """Show it."""
        raise NotImplementedError

    def on_mount(self) -> None:
        """Begin to look."""
        self._feed = Feed(self.fetch, self.app.feed.interval_s)
        self.set_interval(0.25, self._tick)
        self._tick()

    def on_unmount(self) -> None:
        """Look no more."""
        if self._feed is not None:
            self._feed.close()

    def _tick(self) -> None:
        if self._feed is None or self.app.screen is not self:
            return
        seen = self._feed.seen()
        if seen.number != self._drawn and seen.value is not None:
            self._drawn = seen.number
            self.draw(seen.value)
        status = freshness(seen, self._feed.interval_s, time.time())
        status.no_wrap, status.overflow = True, "ellipsis"
        self.query_one("#status", Static).update(status)

    def on_resize(self, event: events.Resize) -> None:
        """Draw for the new width."""
        self._drawn = -1
        self._tick()

    def action_refresh(self) -> None:
        """Look again now."""
        if self._feed is not None:
            self._feed.refresh()

    def acted_on(self) -> Described | None:
        """What keys act on."""
        return self.run

    def action_logs(self) -> None:
        """What its ranks print."""
        if (run := self.acted_on()) is not None:
            self.app.show_logs(run)

    def action_errors(self) -> None:
        """Why it failed."""
        if (run := self.acted_on()) is not None:
            self.app.show_errors(run)

    def action_cancel(self) -> None:
        """Ask, then end it for good."""
        if (run := self.acted_on()) is not None:
            self.app.ask_cancel(run)

    def action_resume(self) -> None:
        """Ask, then go on with it."""
        if (run := self.acted_on()) is not None:
            self.app.ask_resume(run)


class RunScreen(FedScreen):
    """All about one run."""

    def compose(self) -> ComposeResult:
        """A page that scrolls."""
        with Page():
            yield Static(Text("reading ..."), id="page")
        yield Static(id="status")
        yield Keys()

    def fetch(self) -> Described:
        """The run, read anew."""
        return self.app.source.detail(self.run["id"])

    def draw(self, value: Described) -> None:
        """The page."""
        self.run = {**self.run, **value}
        width = max(self.size.width - 4, 20)
        drawn = page.build(value, width, min(width, CURVE_WIDTH), time.time(), self.app.ascii_only)
        self.query_one("#page", Static).update(drawn)


class StudyScreen(FedScreen):
    """A study's trials."""

    def __init__(self, run: Described) -> None:
        super().__init__(run)
        self._trials: dict[str, Described] = {}

    def compose(self) -> ComposeResult:
        """A line on the study, and the table."""
        yield Static(Text(f" {clean(self.run['name'])}   {clean(self.run['id'])}", style="bold"), id="summary")
        yield KeyedTable()
        yield Static(id="about-run")
        yield Static(id="status")
        yield Keys()

    def on_mount(self) -> None:
        """The keys go to the table."""
        self.query_one(KeyedTable).focus()

    def fetch(self) -> Described:
        """The study, read anew."""
        return self.app.source.trials(self.run["id"])

    def draw(self, value: Described) -> None:
        """The table."""
        self._trials = {f"{value['id']}/{row['trial']}": row for row in value["trials"]}
        longest = max((cell_len(point(row["params"])) for row in self._trials.values()), default=0)
        look, table = Look(time.time(), self.app.ascii_only), self.query_one(KeyedTable)
        table.show(fit(TRIALS, self.size.width - 2, "point", longest), list(self._trials.items()), look)

    def acted_on(self) -> Described | None:
        """The trial under the cursor."""
        key = self.query_one(KeyedTable).selected or ""
        row = self._trials.get(key)
        if row is None:
            return None
        return {"id": key, "name": f"{self.run['name']}/{row['trial']}", "state": row["state"]}

    def on_data_table_row_selected(self, event: KeyedTable.RowSelected) -> None:
        """Enter, or a second click."""
        self.action_open()

    def action_open(self) -> None:
        """All about the trial."""
        if (run := self.acted_on()) is not None:
            self.app.show_run(run)


class ErrorsScreen(FedScreen, inherit_bindings=False):
    """Why a run failed."""

    BINDINGS: ClassVar[list[BindingType]] = [_ACTIONS[0], *_ENDS]

    def compose(self) -> ComposeResult:
        """A page that scrolls."""
        yield Static(Text(f" errors of {clean(self.run['name'])}", style="bold"), id="summary")
        with Page():
            yield Static(Text("reading ..."), id="page")
        yield Static(id="status")
        yield Keys()

    def fetch(self) -> list[str]:
        """What is known of its failures."""
        return self.app.source.errors(self.run["id"])

    def draw(self, value: list[str]) -> None:
        """The lines."""
        self.query_one("#page", Static).update(Text("\n".join(value)))
