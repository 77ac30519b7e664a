"""For what takes long: a bar on standard error, and a word when nothing comes at all."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

LATE_S = 5.0  # after which one who waits is told what for
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


def patiently(work: Callable[[], T], waiting_for: str) -> T:
    """What ``work`` returns or raises. It is done by another thread: of a file system that hangs one can be told, and
    Ctrl-C still ends the wait.
    """
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def do() -> None:
        try:
            answer.put((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            answer.put((None, error))

    threading.Thread(target=do, daemon=True).start()
    waited = 0.0
    while True:
        try:
            value, error = answer.get(timeout=LATE_S)
            break
        except queue.Empty:
            waited += LATE_S
            print(f"llmops: no answer from {waiting_for} for {waited:.0f} s; Ctrl-C ends the wait", file=sys.stderr)
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
