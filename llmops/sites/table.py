"""The doctor's table, and the line that says what is still waited for."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from llmops.monitor import printing
from llmops.monitor.text import clean
from llmops.sites.checks import Check

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
NAME_WIDTH = 24  # columns at most; a longer name is folded
LATE_S = 5.0  # after which a pipe is told what is waited for


def show(checks: Sequence[Check], console: Console) -> None:
    """Print the checks by section, each problem with its remedy below it, and the sum."""
    printing.show(console, lambda out: _draw(checks, out))


def _draw(checks: Sequence[Check], console: Console) -> None:
    wide = min(max((len(check.name) for check in checks), default=0), NAME_WIDTH)
    for section in dict.fromkeys(check.section for check in checks):
        console.print(Text(section, style="bold"))
        table = printing.columns()
        table.show_header = False
        table.add_column(width=6, no_wrap=True, justify="right")
        table.add_column(width=wide, overflow="fold")
        table.add_column(overflow="fold")
        for check in checks:
            if check.section == section:
                style = COLOURS[check.result]
                table.add_row(Text(check.result, style=style), clean(check.name), Text(clean(check.found)))
                if check.remedy:
                    table.add_row("", "", Text(f"to do: {clean(check.remedy)}", style=style))
        console.print(table)
    counts = Counter[str](check.result for check in checks)
    words = {"ok": "fine", "warn": "to look at", "fail": "broken"}
    told = ", ".join(f"{counts[result]} {word}" for result, word in words.items() if counts[result])
    console.print(Text(told, style=COLOURS[next((result for result in ("fail", "warn") if counts[result]), "ok")]))


@contextmanager
def waiting() -> Iterator[Callable[[int, int, Sequence[str]], None]]:
    """Gives a function that tells on stderr what is waited for: live on a terminal, else a line once it takes long."""
    console = Console(stderr=True)
    began, told = time.monotonic(), [0.0]
    if console.is_terminal:
        with console.status("looking") as status:
            yield lambda done, total, names: status.update(_words(done, total, names))
        return

    def tell(done: int, total: int, names: Sequence[str]) -> None:
        waited = time.monotonic() - began
        if waited - told[0] >= LATE_S:
            told[0] = waited
            print(f"llmops: {_words(done, total, names)}, for {waited:.0f} s", file=sys.stderr)

    yield tell


def _words(done: int, total: int, names: Sequence[str]) -> str:
    return f"{done} of {total} have answered; waiting for {', '.join(names)}"
