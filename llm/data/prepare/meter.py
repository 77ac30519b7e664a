"""How far a preparation is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_S = 10.0  # between two lines


class Meter:
    """Shows the stage, its share that is done, MB/s of input and tokens. Sizes are of input, or of items."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.items = quiet, False
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        console = Console(stderr=True)
        if console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = Progress(*columns, console=console)
        self.stage, self.total, self.done, self.fresh, self.tokens = "", 0, 0, 0, 0
        self.began = self.told = time.monotonic()

    def __enter__(self) -> Meter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, stage: str, total: int, done: int, items: bool = False) -> None:
        """A stage of size ``total``, of which ``done`` was done earlier: bytes, or items."""
        self.items = items
        self.stage, self.total, self.done, self.fresh, self.tokens = stage, max(total, 1), done, 0, 0
        self.began = self.told = time.monotonic()
        if self.bar is not None:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(stage, total=self.total, completed=done, speed="")

    def advance(self, size: int, tokens: int) -> None:
        """So much more."""
        self.done += size
        self.fresh += size
        self.tokens += tokens
        now = time.monotonic()
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, speed=self._speed(now))
        elif now - self.told >= LINE_S and not self.quiet:
            self.told = now
            left = (self.total - self.done) / max(self.fresh, 1) * (now - self.began)
            ends = f", {left / 60:.0f} min left" if self.fresh else ""
            print(f"{self.stage}: {100 * self.done / self.total:.0f}%, {self._speed(now)}{ends}", file=sys.stderr)

    def _speed(self, now: float) -> str:
        if self.items:
            return f"{self.done} of {self.total}"
        spent = max(now - self.began, 1e-3)
        return f"{self.fresh / 1e6 / spent:.1f} MB/s, {self.tokens / 1e6:.1f} M tokens"
