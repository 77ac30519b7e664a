"""The objective of a trial: its values, step by step, and how the trial ended. Asks the run directory alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from llmops.agent.output import unstamped
from llmops.config.schema import SweepConfig
from llmops.runs.lineage import segments
from llmops.runs.model import Attempt, AttemptEnd, Run, Submission
from llmops.runs.state import describe_end
from llmops.runs.store import Store
from llmops.runs.streams import parts
from llmops.sweep.model import Outcome, Result

BLOCK = 1 << 20
MAX_HELD = 1 << 20  # a longer line is given up: a program may never write a newline
LOG = "log:"
NONE = "none"  # trials are run, and nothing of them is compared
_METRIC = re.compile(r"([A-Za-z_][\w-]*)/([A-Za-z_][\w.-]*)")
_END = re.compile(rb"[\r\n]")  # a progress bar ends its lines with \r

Point = tuple[int, float]


def check(text: str) -> None:
    """Raises ``ValueError``, in words, for what is no objective."""
    if text == NONE:
        return
    if text.startswith(LOG):
        try:
            groups = re.compile(text[len(LOG) :]).groupindex
        except re.error as error:
            raise ValueError(f"{text!r}: not a regular expression: {error}") from error
        if "value" not in groups:
            raise ValueError(f"{text!r}: the expression needs a group (?P<value>…), and may have (?P<step>…)")
        return
    if not _METRIC.fullmatch(text):
        raise ValueError(f"{text!r}: write <kind>/<field> as in eval/loss and step/loss, log:REGEX, or none")


def series(run: Run, sweep: SweepConfig) -> list[Point]:
    """Steps and values that count, in order of steps; NaN and infinities are kept.

    Of a ``log:`` objective without steps every match in an attempt that counts does, and its step is their number.
    """
    return Reader(run.store, sweep.objective).points(run)


def final(points: Sequence[Point], sweep: SweepConfig) -> tuple[float | None, int | None]:
    """The objective's value and the last step; the value may be NaN or infinite. None for both without points."""
    if not points:
        return None, None
    values = [value for _, value in points]
    step = points[-1][0]
    if sweep.reduce == "last":
        return values[-1], step
    if sweep.reduce == "mean":
        last = values[-sweep.mean_of :]
        return sum(last) / len(last), step
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return math.nan, step
    return min(numbers) if sweep.direction == "minimize" else max(numbers), step


def result_of(run: Run, trial: int, sweep: SweepConfig, params: dict[str, object]) -> Result | None:
    """How the trial ended; None while it is not over. The same for everybody who asks."""
    ended = _ended(run)
    if ended is None:
        return None
    outcome, reason, when = ended
    value, step = final(series(run, sweep), sweep)
    if outcome == "complete" and sweep.objective != NONE and (value is None or not math.isfinite(value)):
        outcome, reason = "nan", f"{sweep.objective} " + ("has no value" if value is None else f"is {value}")
    return Result(
        trial=trial,
        outcome=outcome,
        time=when,
        value=value if value is not None and math.isfinite(value) and outcome != "nan" else None,
        step=step,
        attempts=len(run.attempts),
        seconds=seconds(run),
        reason=reason,
        submission=run.submissions[-1].number,
        params=params,
    )


def seconds(run: Run, now: float | None = None) -> float:
    """That the attempts ran, in all. The newest runs until ``now`` if it has no end; what an older one without an end
    ran nobody knows, and it counts as nothing.
    """
    total = sum(attempt.end.time - attempt.start.time for attempt in run.attempts if attempt.end)
    if now is not None and run.newest and run.newest.end is None:
        total += now - run.newest.start.time
    return max(0.0, total)


def _ended(run: Run) -> tuple[Outcome, str, float] | None:
    """Outcome, reason and time, before anybody looked at the objective."""
    submission = run.submissions[-1] if run.submissions else None
    if submission is None:
        return None
    newest = run.newest if run.newest and run.newest.start.submission == submission.number else None
    if newest is not None and newest.end is not None and (newest.end.next == "end" or newest.end.reason == "finished"):
        return _after(newest.end, submission)
    if submission.failed:
        return "failed", f"{submission.backend} refused it: {_line(submission.failed.error)}", submission.failed.time
    if submission.intent and newest is None:
        return *_intended(submission), submission.intent.time
    return None


def _after(end: AttemptEnd, submission: Submission) -> tuple[Outcome, str, float]:
    if end.reason == "finished":
        return "complete", "", end.time
    stopped = end.reason in ("cancelled", "preempted", "timeout", "node_failure")
    if submission.intent and (submission.intent.outcome or stopped):
        return *_intended(submission), end.time
    if end.reason == "cancelled":
        return "cancelled", _line(end.detail or ""), end.time
    return "failed", "; ".join(each for each in (describe_end(end), _line(end.detail or "")) if each), end.time


def _intended(submission: Submission) -> tuple[Outcome, str]:
    intent = submission.intent
    assert intent is not None
    if intent.outcome in ("pruned", "nan", "timeout"):
        return cast("Outcome", intent.outcome), intent.reason
    return "cancelled", f"cancelled by {intent.by}"


def _line(text: str) -> str:
    return " ".join(text.split())


class Reader:
    """Reads the objective as it grows; what was read is not read again."""

    def __init__(self, store: Store, objective: str) -> None:
        self._store = store
        self._kind, self._field, self._pattern = "", "", None
        if objective.startswith(LOG):
            self._pattern = re.compile(objective[len(LOG) :])
        elif objective != NONE:
            self._kind, self._field = objective.split("/", 1)
        self._attempts: dict[int, _Attempt] = {}

    def points(self, run: Run) -> list[Point]:
        """As :func:`series`, as far as it is written. ``run``: read just before."""
        found: list[Point] = []
        counted = 0
        if self._pattern is None and not self._kind:
            return found
        if not any(attempt.start.resume_from for attempt in run.attempts):
            return self._of_programs_own(run)
        for segment in segments(run):
            state = self._advanced(run.by_number.get(segment.attempt), run)
            points = state.points if state else []
            if self._pattern is not None and "step" not in self._pattern.groupindex:
                found += [(counted + index, value) for index, (_, value) in enumerate(points, 1)]
                counted += len(points)
                continue
            first = segment.first_step if segment.first_step > 1 else 0  # some evaluate before the first step
            last = segment.last_step if segment.last_step is not None else math.inf
            found += [(step, value) for step, value in points if first <= step <= last]
        return found

    def _of_programs_own(self, run: Run) -> list[Point]:
        """Where no attempt began at a commit, what a program printed tells where it went on: at its first step."""
        stepless = self._pattern is not None and "step" not in self._pattern.groupindex
        found: list[Point] = []
        for attempt in run.attempts if self._pattern is not None and not stepless else run.attempts[-1:]:
            state = self._advanced(attempt, run)
            points = state.points if state else []
            if points:
                found = [(step, value) for step, value in found if step < points[0][0]] + points
        return found

    def _advanced(self, attempt: Attempt | None, run: Run) -> _Attempt | None:
        if attempt is None:
            return None
        state = self._attempts.setdefault(attempt.number, _Attempt())
        if state.over:
            return state
        # Known before it is read. What an attempt with a successor goes on writing lies past the fork.
        over = attempt.end is not None or attempt is not run.newest
        for stream, paths in self._streams(attempt.number).items():
            cursor = state.cursors.setdefault(stream, _Cursor())
            for line in cursor.advance(self._store, paths):
                self._take(state, line)
            if over and cursor.held:
                self._take(state, cursor.held)
        state.over = over and self._store.local_path is not None
        return state

    def _streams(self, attempt: int) -> dict[str, list[str]]:
        """Parts of the metrics, or of rank 0's output on whichever node it was."""
        if self._pattern is None:
            return {"": parts(self._store, f"metrics/{attempt:04d}", "", ".jsonl")}
        folder = f"logs/{attempt:04d}"
        return {node: parts(self._store, f"{folder}/{node}", "rank0.", ".log") for node in self._store.list(folder)}

    def _take(self, state: _Attempt, line: bytes) -> None:
        if self._pattern is None:
            self._take_metric(state, line)
            return
        for match in self._pattern.finditer(unstamped(line).decode("utf-8", "replace")):
            found = match.groupdict()
            try:
                value = float(found["value"])
                step = int(found["step"]) if "step" in found else len(state.points) + 1
            except (TypeError, ValueError):
                continue  # the expression fits a line that is not meant
            state.put(step, value)

    def _take_metric(self, state: _Attempt, line: bytes) -> None:
        try:
            record = json.loads(line) if line else None
        except ValueError:
            return  # the unfinished last line of an attempt that was killed
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            return
        kind, step, value = record.get("kind", "step"), record["step"], record.get(self._field)
        if kind == self._kind and isinstance(value, int | float) and not isinstance(value, bool):
            state.put(step, float(value))
        elif kind == "step":
            state.drop_above(step)


@dataclass
class _Cursor:
    """How far one stream was read, and the beginning of its next line."""

    part: int = 0
    offset: int = 0
    held: bytes = b""

    def advance(self, store: Store, paths: list[str]) -> list[bytes]:
        """Lines that were completed since."""
        lines: list[bytes] = []
        while self.part < len(paths):
            data = store.read(paths[self.part], self.offset, self.offset + BLOCK)
            if data:
                self.offset += len(data)
                *complete, self.held = _END.split(self.held + data)
                lines += complete
                if len(self.held) > MAX_HELD:
                    self.held = b""
            elif self.part + 1 < len(paths):  # a part with a successor is complete
                self.part, self.offset = self.part + 1, 0
            else:
                break
        return lines


@dataclass
class _Attempt:
    """What one attempt wrote, without what it rolled back itself."""

    points: list[Point] = field(default_factory=list)
    cursors: dict[str, _Cursor] = field(default_factory=dict)
    over: bool = False  # and read to its end

    def put(self, step: int, value: float) -> None:
        self.drop_above(step - 1)
        self.points.append((step, value))

    def drop_above(self, step: int) -> None:
        while self.points and self.points[-1][0] > step:
            self.points.pop()
