"""A bar on standard error for what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

MANY = 200  # fewer are read before a bar could be seen


@contextmanager
def reading(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of how many of how many are done. It may be called by any thread."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(what, total=None)

    def tell(done: int, total: int) -> None:
        if total >= MANY:
            progress.start()  # once; again it does nothing
            progress.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        progress.stop()
