"""The output of a run's ranks, as it is written."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Input, RichLog, Static

from llmops.monitor.text import clean
from llmops.runs.state import DONE
from llmops.top.cells import DIM, Described
from llmops.top.source import KEPT_LINES, Lines
from llmops.top.widgets import Filter, Keys

if TYPE_CHECKING:
    from llmops.top.app import TopApp

AT_ONCE = 1000  # lines drawn between two keys
_SGR = re.compile(r"\x1b\[[0-9;:]*m")


class Output(RichLog):
    """The lines. Going up stops following; the end starts it again."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "go('scroll_up')", show=False),
        Binding("pageup", "go('page_up')", show=False),
        Binding("home,g", "go('scroll_home')", show=False),
        Binding("j", "scroll_down", show=False),
        Binding("end,G", "follow", show=False),
    ]

    def __init__(self) -> None:
        super().__init__(max_lines=KEPT_LINES, markup=False, highlight=False, wrap=False, auto_scroll=False)
        self.following = True

    async def action_go(self, name: str) -> None:
        """Look at what was before."""
        self.following = False
        await self.run_action(name)

    def action_follow(self) -> None:
        """Stay at the end from now on."""
        self.following = True
        self.scroll_end(animate=False)

    def on_mouse_scroll_up(self) -> None:
        """The wheel goes up, too."""
        self.following = False


class LogsScreen(Screen[None]):
    """Follows one run."""

    app: TopApp

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f", "follow", "follow on/off"),
        Binding("slash", "filter", "find", key_display="/"),
        Binding("e", "errors", "errors"),
        Binding("c", "cancel", "cancel"),
        Binding("q", "app.pop_screen", "back"),
        Binding("escape", "back", show=False),
        Binding("question_mark", "app.keys", "help", key_display="?"),
    ]

    def __init__(self, run: Described) -> None:
        super().__init__()
        self.run = run
        self._read = 0
        self._lines: Lines | None = None

    def compose(self) -> ComposeResult:
        """From top to bottom."""
        yield Static(id="summary")
        yield Filter("lines that hold this; [attempt/rank] is part of a line")
        yield Output()
        yield Static(id="status")
        yield Keys()

    def on_mount(self) -> None:
        """Begin to read."""
        title = Text(f" output of {clean(self.run['name'])}   {clean(self.run['id'])}", style="bold")
        self.query_one("#summary", Static).update(title)
        self.query_one(Output).focus()
        self._lines = Lines(self.app.source, self.run["id"], self._over)
        self.set_interval(0.2, self._tick)

    def on_unmount(self) -> None:
        """Read no more."""
        if self._lines is not None:
            self._lines.close()

    def _over(self) -> bool:
        """Whether the last look at all runs says so: the scheduler is not asked once more for each screen."""
        run = self.app.known(self.run["id"])
        return (run or self.run)["state"] in (*DONE, "complete", "pruned", "nan", "timeout")

    def _tick(self) -> None:
        if self._lines is None:
            return
        count, new = self._lines.after(self._read)
        output = self.query_one(Output)
        if new:
            self._read = count - max(len(new) - AT_ONCE, 0)
            self._write(new[:AT_ONCE])
        held = f" {len(output.lines):,} lines" + (f" of {count:,}" if count > KEPT_LINES else "")
        status = Text(held, style=DIM)
        status.append(
            "; following" if output.following else "; not following (End)", "green" if output.following else ""
        )
        if self._lines.trouble:
            status = Text(f" {self._lines.trouble}", style="bold red")
        elif self._lines.ended:
            status.append("; the run is over")
        self.query_one("#status", Static).update(status)

    def _write(self, lines: list[str]) -> None:
        output, wanted = self.query_one(Output), self.query_one(Filter).value.lower()
        for line in lines:
            if wanted in _SGR.sub("", line).lower():
                output.write(Text.from_ansi(line, no_wrap=True), expand=True)
        if output.following:
            output.scroll_end(animate=False)

    def on_input_changed(self, event: Input.Changed) -> None:
        """All that is kept is gone through again."""
        if self._lines is None:
            return
        self.query_one(Output).clear()
        self._read, kept = self._lines.after(0)
        self._write(kept)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Back to the lines."""
        self.query_one(Filter).leave(self.query_one(Output))

    def action_filter(self) -> None:
        """Type a filter."""
        self.query_one(Filter).open()

    def action_back(self) -> None:
        """Drop the filter, or leave."""
        filter_ = self.query_one(Filter)
        if filter_.display:
            filter_.value = ""
            filter_.leave(self.query_one(Output))
        else:
            self.app.pop_screen()

    def action_follow(self) -> None:
        """Stay at the end, or stay here."""
        output = self.query_one(Output)
        if output.following:
            output.following = False
        else:
            output.action_follow()

    def action_errors(self) -> None:
        """Why it failed."""
        self.app.show_errors(self.run)

    def action_cancel(self) -> None:
        """Ask, then end it for good."""
        self.app.ask_cancel(self.run)
