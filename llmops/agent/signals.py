"""Signals as readable events: a byte in a pipe, seen by the event loop, whatever the main thread is doing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class SignalPipe:
    """Turns signals into bytes on a file descriptor. Any of them may come twice, or all at once: each is one event."""

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in signals:
            # The handler itself has nothing to do: the wake-up descriptor carries the number.
            signal.signal(number, lambda _number, _frame: None)
        # A batch shell may hand its child a mask or an ignored signal; CONT always comes before TERM and means nothing.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, list(signals))

    def fileno(self) -> int:
        """For selectors."""
        return self._read

    def read(self) -> list[signal.Signals]:
        """The signals that came since the last call."""
        try:
            data = os.read(self._read, 4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in data]


def be_apart() -> None:
    """Outlive signals to the process group, and those that some process trackers send to every process of a job.

    For a helper that is needed until its parent has ended.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.setsid()


def be_deaf() -> None:
    """Ignore stop signals, in a process that its parent tells when to end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
