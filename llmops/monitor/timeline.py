"""How a run has spent its time, from its directory alone: spans that follow each other, from submission to end.

Only the beginning of an attempt's metrics is read, and their end back to the last commit that counts: what a run has
trained for months costs no more than what it has trained for an hour.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from llmops.agent import commits
from llmops.runs.lineage import attempt_steps, segments
from llmops.runs.model import Attempt, Run
from llmops.runs.streams import decode_line, lines_backwards, parts

Kind = Literal["queue", "import", "rendezvous", "load", "train", "checkpoint", "uncommitted", "lost", "hang", "idle"]
KINDS: tuple[Kind, ...] = get_args(Kind)

HEAD_BYTES = 1 << 13  # of a part: the phases of start-up are its first lines
HEAD_PARTS = 3  # on an object store they may be spread over so many
TAIL_BYTES = 1 << 22  # a run that writes more than this between commits has its last one estimated from its steps
_STARTUP: tuple[tuple[Kind, str], ...] = (("import", "imported"), ("rendezvous", "distributed"), ("load", "loaded"))


@dataclass(frozen=True)
class Span:
    """Seconds since the epoch. ``stall_s``: of a span of training, how long saves held it up."""

    kind: Kind
    start: float
    end: float
    attempt: int | None = None
    stall_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Mark:
    """A commit as an attempt's metrics tell of it, or its own record: training up to ``ended`` is in it."""

    step: int
    ended: float
    told: float  # when it was known to count; the same as ``ended`` where that is not known
    stall_s: float


@dataclass(frozen=True)
class Facts:
    """What an attempt's metrics say of its time; of a program without any, what it told of its commits."""

    phases: dict[str, float] = field(default_factory=dict)  # when each phase of start-up was over
    last: float | None = None  # time of the last line
    last_step: int | None = None
    stepped: float | None = None  # time of the last step's line
    over: float | None = None  # when it had finished or stopped, of its own accord
    phase: str | None = None  # the last phase that it told of
    commit: Mark | None = None


def read_facts(run: Run, attempt: int, commit_step: int | None = None) -> Facts:
    """``commit_step``: the step whose commit is looked for; by default the newest one that counts."""
    facts = _read_metrics(run, attempt, commit_step)
    if facts.commit is None and run.record is not None and run.record.kind == "command":
        return replace(facts, commit=_told(run, attempt, commit_step))
    return facts


def _told(run: Run, attempt: int, commit_step: int | None) -> Mark | None:
    told = commits.parse(run.seen.list(commits.folder(attempt)), attempt)
    for each in reversed(told):
        if commit_step in (None, each.step):
            return Mark(each.step, each.time, each.time, 0.0)
    return None


def _read_metrics(run: Run, attempt: int, commit_step: int | None) -> Facts:
    paths = parts(run.seen, f"metrics/{attempt:04d}", "", ".jsonl")
    found: dict[str, Any] = {"phases": _startup(run, paths)}
    told: dict[int, tuple[float, float]] = {}  # when a step was known to be saved, and the stalls until then
    wanted, read = commit_step, 0
    for path in reversed(paths):
        for line in lines_backwards(run.seen, path):
            read += len(line) + 1
            is_phase = b'"phase"' in line
            if not (is_phase or "last" not in found or "stepped" not in found):
                continue
            record = _decode(line)
            if record is None:
                continue
            found.setdefault("last", record["time"])
            if record.get("kind", "step") == "step" and type(record.get("step")) is int:
                found.setdefault("last_step", record["step"])
                found.setdefault("stepped", record["time"])
            if not is_phase:
                continue
            phase, step = record.get("phase"), record.get("step")
            if isinstance(phase, str):
                found.setdefault("phase", phase)
            if phase in ("finished", "stopped"):
                found.setdefault("over", record["time"])
            if type(step) is not int:
                continue
            if phase == "saved":
                wanted = step if wanted is None else wanted
                told.setdefault(step, (record["time"], _number(record.get("stall_s"))))
            elif phase == "staged" and step == wanted:
                stalled = _number(record.get("stall_s"))
                seen, stall = told.get(step, (record["time"], stalled))
                ended = record["time"] - _number(record.get("seconds"))
                found.setdefault("last_step", step)  # no step came after it
                found.setdefault("stepped", ended)
                return Facts(**found, commit=Mark(step, ended, seen, max(stall, stalled)))
            if wanted is not None and step < wanted:
                return Facts(**found)
        if read > TAIL_BYTES:
            break
    return Facts(**found)


def _startup(run: Run, paths: list[str]) -> dict[str, float]:
    """When each phase of start-up was over; those that were not reached are left out."""
    found: dict[str, float] = {}
    for path in paths[:HEAD_PARTS]:
        for line in run.seen.read(path, 0, HEAD_BYTES).split(b"\n"):
            record = _decode(line)
            if record is None:
                continue
            if record.get("kind", "step") != "phase" or record.get("phase") not in (
                "started",
                *dict(_STARTUP).values(),
            ):
                return found
            found.setdefault(str(record["phase"]), record["time"])
    return found


def _decode(line: bytes) -> dict[str, Any] | None:
    """A record with a time; None for what is not whole, or foreign."""
    record = decode_line(line)
    return record if record is not None and type(record.get("time")) in (int, float) else None


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) and value >= 0 else 0.0


class _Line:
    """Spans one after the other. A clock that went backwards makes one shorter, never two that overlap."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.at: float | None = None

    def add(self, kind: Kind, start: float, end: float, attempt: int | None = None, stall_s: float = 0.0) -> None:
        begin = start if self.at is None else max(start, self.at)
        if end > begin:
            self.spans.append(Span(kind, begin, end, attempt, min(stall_s, end - begin)))
            self.at = end


def timeline(
    run: Run, until: float, alive: bool, silent_s: float | None = None, newest_facts: Facts | None = None
) -> list[Span]:
    """From the first submission to ``until``, or to the end of a run that is over.

    ``until``: epoch seconds: now, or when the run was over. ``alive``: its newest attempt runs; one that has no end and
    is not alive is taken to have died after its last sign of life. ``silent_s``: for how long it has been stalled.
    ``newest_facts``: of the newest attempt, where they have been read already.
    """
    line, counted = _Line(), {segment.attempt: segment.last_step for segment in segments(run)}
    created = {each.number: each.record.created for each in run.submissions}
    before: Attempt | None = None
    for attempt in run.attempts:
        _wait(line, before, attempt.start.submission, created, attempt.start.time)
        newest = attempt is run.newest
        if newest and newest_facts is not None:
            facts = newest_facts
        else:
            facts = read_facts(run, attempt.number, None if newest else counted.get(attempt.number))
        seen = until if newest and alive else _last_sign(facts) or attempt.start.time
        end = attempt.end.time if attempt.end else seen
        kept = attempt.number in counted
        _attempt(line, run, attempt, facts, end, kept, newest and alive and attempt.end is None, silent_s)
        before = attempt
    if run.submissions and not alive:
        ended = before is not None and before.end is not None and before.end.next == "end"
        if not (ended and before and before.start.submission == run.submissions[-1].number):
            _wait(line, before, run.submissions[-1].number, created, until)
    return line.spans


def _last_sign(facts: Facts) -> float | None:
    return facts.last or (facts.commit.told if facts.commit else None)


def _wait(line: _Line, before: Attempt | None, submission: int, created: dict[int, float], until: float) -> None:
    """What lies between two attempts: the queue, or a pause inside the same allocation."""
    if before is not None and before.start.submission == submission:
        pause = before.end is not None and before.end.next == "retry"
        line.add("idle" if pause else "queue", line.at if line.at is not None else until, until)
    elif submission in created:
        line.add("queue", created[submission], until)


def _attempt(
    line: _Line, run: Run, attempt: Attempt, facts: Facts, end: float, kept: bool, alive: bool, silent_s: float | None
) -> None:
    number, at = attempt.number, attempt.start.time
    if facts.phases:
        for kind, phase in _STARTUP:
            over = facts.phases.get(phase)
            line.add(kind, at, end if over is None else min(over, end), number)
            if over is None:
                return
            at = over
    elif run.record is None or run.record.kind == "llm":
        line.add("import", at, end, number)
        return
    reason = attempt.end.reason if attempt.end else None
    if reason == "finished" or (attempt.end and attempt.end.saved and facts.last is None):
        done = min(facts.over or end, end)
        line.add("train", at, done, number, facts.commit.stall_s if facts.commit else 0.0)
        line.add("idle", done, end, number)
        return
    commit = facts.commit if kept else None
    if commit is not None:
        line.add("train", at, min(commit.ended, end), number, commit.stall_s)
        at = max(at, commit.ended)
        if facts.last_step == commit.step and not alive:
            line.add("checkpoint", at, min(commit.told, end), number)
            line.add("idle", max(at, commit.told), end, number)
            return
    elif kept and (estimate := _estimated(run, attempt, at, end)) is not None:
        line.add("train", at, estimate, number)
        at = estimate
    if alive:
        silent = min(silent_s or 0.0, max(end - at, 0.0))
        line.add("uncommitted", at, end - silent, number)
        line.add("hang", end - silent, end, number)
    elif reason == "hung" and facts.stepped is not None:
        line.add("lost", at, facts.stepped, number)
        line.add("hang", max(at, facts.stepped), end, number)
    else:
        line.add("lost", at, end, number)


def _estimated(run: Run, attempt: Attempt, start: float, end: float) -> float | None:
    """When the last step that counts was over, had all steps taken the same time; where no line tells."""
    last = next((each.last_step for each in segments(run) if each.attempt == attempt.number), None)
    first, most = attempt_steps(run, attempt.number)
    if last is None or first is None or most is None or most < first:
        return None
    return start + (end - start) * min(max((last - first + 1) / (most - first + 1), 0.0), 1.0)
