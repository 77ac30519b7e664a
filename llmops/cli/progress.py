"""For what takes long: a bar on standard error, and a word when nothing comes at all."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

LATE_S = 5.0  # after which one who waits is told what for
MANY = 200  # fewer are read before a bar could be seen


@contextmanager
def reading(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of how many of how many are done. It may be called by any thread; of few, nothing is shown."""
    bars: list[Progress] = []
    lock = threading.Lock()

    def tell(done: int, total: int) -> None:
        if total < MANY:
            return
        with lock:
            bar = bars[0] if bars else _bar(what)
            bars[:] = [bar]
            bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield tell
    finally:
        for bar in bars:
            bar.stop()


def _bar(what: str) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(what, total=None)
    bar.start()
    return bar


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
