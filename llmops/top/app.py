"""The program: one background for all screens, and what keys do to runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.message import Message

from llmops.errors import ClusterError, UserError
from llmops.monitor.feed import Feed
from llmops.monitor.text import clean
from llmops.overview import Overview
from llmops.runs.state import DONE
from llmops.top.cells import Described
from llmops.top.detail import ErrorsScreen, RunScreen, StudyScreen
from llmops.top.logs import LogsScreen
from llmops.top.runs import RunsScreen
from llmops.top.source import Source
from llmops.top.widgets import Confirm, Help

KEYS = """\
everywhere
  up, down, j, k        move
  PgUp, PgDn, g, G      page up, page down, first, last
  Enter                 open
  Esc, q                back; from all runs, q ends the view
  l    e                logs; errors
  c    r                cancel; resume: both ask first
  F5                    look again now
  Ctrl-C                end the view, and no run

all runs
  /                     name, id, owner, state, backend: all words
  s                     next order
  a                     all, or those that are not over

logs
  /                     lines that hold it; [2/7]: attempt 2, rank 7
  f, End                follow; Up stops
"""


class Told(Message):
    """What became of an action."""

    def __init__(self, text: str, failed: bool) -> None:
        super().__init__()
        self.text, self.failed = text, failed


class TopApp(App[None]):
    """All runs of one store. ``colours``: how many the terminal has."""

    CSS_PATH = Path(__file__).with_name("top.tcss")
    TITLE = "llmops top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+c", "quit", show=False, priority=True)]

    def __init__(self, source: Source, interval_s: float, ascii_only: bool = False, colours: int = 1 << 24) -> None:
        super().__init__()
        self.source, self.ascii_only = source, ascii_only
        self.feed: Feed[Overview] = Feed(source.overview, interval_s)
        if colours <= 16:
            self.theme = "ansi-dark"  # the terminal's own colours: no shade is lost that something depends on
        if ascii_only:
            self.add_class("-ascii")

    def on_mount(self) -> None:
        """The runs."""
        self.push_screen(RunsScreen())

    def on_unmount(self) -> None:
        """Look no more."""
        self.feed.close()

    def runs(self) -> list[Described]:
        """All that was last seen."""
        seen = self.feed.seen().value
        return seen.rows if seen else []

    def known(self, run_id: str) -> Described | None:
        """A run as it was last seen."""
        return next((run for run in self.runs() if run["id"] == run_id), None)

    def action_keys(self) -> None:
        """All keys."""
        self.push_screen(Help(KEYS))

    def show_run(self, run: Described) -> None:
        """All about a run, or a study's trials."""
        self.push_screen(StudyScreen(run) if "trials" in run else RunScreen(run))

    def show_logs(self, run: Described) -> None:
        """Its output."""
        if "trials" in run:
            self.tell(f"{run['name']} is a study: Enter shows its trials, each has its logs", failed=True)
        else:
            self.push_screen(LogsScreen(run))

    def show_errors(self, run: Described) -> None:
        """Why it failed."""
        if "trials" in run:
            self.tell(f"{run['name']} is a study: Enter shows its trials, each has its errors", failed=True)
        else:
            self.push_screen(ErrorsScreen(run))

    def ask_cancel(self, run: Described) -> None:
        """Cancel after a confirmation."""
        now = self.known(run["id"]) or run
        if now["state"] in DONE:
            self.tell(f"{run['name']} is over already: {now['state']}", failed=True)
            return

        def answered(answer: str | None) -> None:
            if answer in ("save", "now"):
                waiting = "saves its state first" if answer == "save" else "ends at once"
                self._act(run, f"cancel: {waiting}", lambda: self.source.cancel(run["id"], answer == "save"))

        about = f"{clean(run['name'])}\n{clean(run['id'])}\n\nIt ends for good. It can be resumed by hand."
        answers = [("save", "Save first, then end"), ("now", "End at once")]
        self.push_screen(Confirm("Cancel this run?", about, answers), answered)

    def ask_resume(self, run: Described) -> None:
        """Resume after a confirmation."""
        now = self.known(run["id"]) or run
        if now["state"] == "running":
            self.tell(f"{run['name']} is running", failed=True)
            return

        def answered(answer: str | None) -> None:
            if answer == "yes":
                self._act(run, "resume", lambda: self.source.resume(run["id"]))

        about = f"{clean(run['name'])}\n{clean(run['id'])}\n\nIt goes on from its last committed step."
        self.push_screen(Confirm("Resume this run?", about, [("yes", "Resume")]), answered)

    def _act(self, run: Described, what: str, work: Callable[[], str]) -> None:
        """Do it on a thread, and tell what became of it."""
        name = run["name"]
        self.tell(f"{name}: {what} ...")

        def do() -> None:
            try:
                told = Told(f"{name}: {work()}", failed=False)
            except (UserError, ClusterError, OSError) as error:
                told = Told(f"{name}: {error}", failed=True)
            self.post_message(told)

        # A daemon: who quits meanwhile need not wait; what was asked for is recorded before anybody is waited for.
        threading.Thread(target=do, daemon=True).start()

    def on_told(self, message: Told) -> None:
        """An action is over."""
        self.tell(message.text, message.failed)
        self.feed.refresh()

    def tell(self, text: str, failed: bool = False) -> None:
        """A few words in a corner."""
        severity = "error" if failed else "information"
        self.notify(clean(" ".join(text.split())), severity=severity, timeout=8, markup=False)  # type: ignore[arg-type]
