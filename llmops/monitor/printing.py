"""Printing for people: to a terminal in its width, into a pipe as lines that are neither folded nor cut."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

PIPED = 4000  # columns: no line of a pipe is folded or cut


def show(console: Console, draw: Callable[[Console], object]) -> None:
    """Let ``draw`` print. Into a pipe without colours, and no line ends in blanks."""
    if console.is_terminal:
        draw(console)
        return
    plain = Console(width=PIPED, color_system=None, file=console.file)
    with plain.capture() as capture:
        draw(plain)
    console.file.write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))


def columns(gap: int = 2) -> Table:
    """A table of nothing but columns, ``gap`` blanks apart."""
    return Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
