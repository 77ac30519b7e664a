"""What a step's time goes to: its parts, such as data, forward, backward, optimizer and stall.

    phases = Phases(device)
    with phases("forward"):
        ...
    phases.take(step)  # {"forward_s": 0.21, ..., "other_s": 0.003}

A part inside another one is taken off it, so that the parts of a step add up to its time. On a GPU the parts are what
the GPU spent: CUDA events are recorded and read a step later, when they are over, so nothing waits for them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from llm.train.tracing import Trace

OTHER = "other"  # what is in no part

Range = Callable[[str], AbstractContextManager[Any]]


class Clock(Protocol):
    """Where marks come from: moments whose times are known later."""

    def mark(self) -> Any:
        """This moment."""

    def ready(self, mark: Any) -> bool:
        """Is its time known?"""

    def times(self, marks: list[Any]) -> list[float]:
        """Seconds since the epoch of ``marks``, which are in order; the last one begins the next call's."""


class HostClock:
    """The processor's time."""

    def __init__(self) -> None:
        self.mark = time.perf_counter
        self._epoch = time.time() - time.perf_counter()

    def ready(self, mark: float) -> bool:
        """Always."""
        return True

    def times(self, marks: list[float]) -> list[float]:
        """See :class:`Clock`."""
        return [self._epoch + mark for mark in marks]


class EventClock:
    """The time at which the GPU comes to a mark, after all that was queued before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.cuda.Event] = []
        self._last = self.mark()
        torch.cuda.synchronize(device)
        self._at = time.time()  # of ``_last``

    def mark(self) -> torch.cuda.Event:
        """See :class:`Clock`."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def ready(self, mark: torch.cuda.Event) -> bool:
        """Has the GPU come to it? Does not wait."""
        return bool(mark.query())  # type: ignore[no-untyped-call]

    def times(self, marks: list[torch.cuda.Event]) -> list[float]:
        """Added up from mark to mark: the driver tells differences, in milliseconds of float32."""
        found = []
        for mark in marks:
            if mark is not self._last:
                self._at += self._last.elapsed_time(mark) / 1e3
                self._free.append(self._last)
                self._last = mark
            found.append(self._at)
        return found


@dataclass
class _Step:
    """Part i lasts from mark i to mark i + 1."""

    marks: list[Any]
    parts: list[str] = field(default_factory=list)
    spans: list[tuple[str, int, int]] = field(default_factory=list)  # name, first and last mark


class _Part:
    """One name's context manager, made once: entering it costs no allocation."""

    __slots__ = ("_name", "_phases")

    def __init__(self, phases: Phases, name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._phases.enter(self._name)

    def __exit__(self, *_: object) -> None:
        self._phases.leave()


class Phases:
    """The clock of one rank's steps. Not for several threads."""

    def __init__(self, device: torch.device, trace: Trace | None = None, nvtx: bool = False) -> None:
        """``trace`` is told when each part began and ended; ``nvtx`` marks the parts for Nsight Systems (CUDA only)."""
        cuda = device.type == "cuda"
        self._clock: Clock = EventClock(device) if cuda else HostClock()
        self._trace = trace
        self._nvtx: Range | None = torch.cuda.nvtx.range if nvtx and cuda else None
        self._profiler: Range | None = None
        self._parts: dict[str, _Part] = {}
        self._stack: list[tuple[str, int, list[AbstractContextManager[Any]]]] = []
        self._step = _Step([self._clock.mark()])
        self._unread: deque[tuple[int | None, _Step]] = deque()

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """Count what runs inside as ``name``."""
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = _Part(self, name)
        return part

    def enter(self, name: str) -> None:
        """Begin a part: what ``with phases(name)`` does."""
        self._mark()
        ranges = [make(name) for make in (self._nvtx, self._profiler) if make is not None]
        for each in ranges:
            each.__enter__()
        self._stack.append((name, len(self._step.marks) - 1, ranges))

    def leave(self) -> None:
        """End the part that was begun last."""
        self._mark()
        name, began, ranges = self._stack.pop()
        for each in reversed(ranges):
            each.__exit__(None, None, None)
        if self._trace is not None:
            self._step.spans.append((name, began, len(self._step.marks) - 1))

    def show_to_profiler(self, shown: bool) -> None:
        """Have torch's profiler see the parts, from the next one on."""
        self._profiler = torch.profiler.record_function if shown else None

    def take(self, step: int) -> dict[str, float]:
        """End ``step``, which is in no part now. Seconds of each part that it had, and of the rest: ``<part>_s``.

        On a GPU those of the newest step whose work is over, the one before as a rule; empty while there is none.
        """
        assert not self._stack, f"the part {self._stack[-1][0]} is not over"
        self._mark()
        self._unread.append((step, self._step))
        self._step = _Step([self._step.marks[-1]])
        found: dict[str, float] = {}
        while self._unread and self._clock.ready(self._unread[0][1].marks[-1]):
            found = self._read(*self._unread.popleft())
        return found

    def close(self) -> None:
        """Hand to the trace what it has not got yet. Waits for the GPU."""
        if self._trace is None:
            return
        if isinstance(self._clock, EventClock):
            torch.cuda.synchronize()
        if not self._stack and self._step.spans:  # what came after the last step
            self._unread.append((None, self._step))
            self._step = _Step([self._step.marks[-1]])
        while self._unread:
            self._read(*self._unread.popleft())
        self._trace.close()

    def _mark(self) -> None:
        self._step.marks.append(self._clock.mark())
        self._step.parts.append(self._stack[-1][0] if self._stack else OTHER)

    def _read(self, number: int | None, step: _Step) -> dict[str, float]:
        times = self._clock.times(step.marks)
        found: dict[str, float] = {}
        for part, (began, ended) in zip(step.parts, pairwise(times), strict=True):
            found[f"{part}_s"] = found.get(f"{part}_s", 0.0) + ended - began
        if self._trace is not None:
            for name, first, last in step.spans:
                self._trace.add(name, times[first], times[last], number)
        return found
