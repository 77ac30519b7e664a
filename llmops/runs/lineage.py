"""Which attempt's steps count.

An attempt that was thought dead may go on writing, and steps past the last commit are run again. So nobody looks at the
newest file: the newest attempt counts from the commit it resumed from, that commit's attempt counts up to there, and so
on back to the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from llmops.runs.model import Run
from llmops.runs.streams import decode_line, lines_backwards, parts

# A checkpoint in our own format, or the record of one that a program told of: which attempt's it is.
_COMMIT = re.compile(r"checkpoints/step_\d+/(\d+)-\d+/?|commits/(\d+)/\d+-\d+")

StepRecord = dict[str, Any]  # at least "step" (int, from 1) and "loss"


class Segment(NamedTuple):
    """Steps ``first_step`` to ``last_step`` (None: to the end) of one attempt count."""

    attempt: int
    first_step: int
    last_step: int | None


def segments(run: Run) -> list[Segment]:
    """The committed trajectory, oldest step first. Empty before the first attempt.

    Where the start record of an older attempt cannot be read, that attempt is taken to have begun at step 1.
    """
    found: list[Segment] = []
    attempt = run.newest.number if run.newest else None
    last: int | None = None
    while attempt is not None:
        record = run.by_number.get(attempt)
        commit = _COMMIT.fullmatch(record.start.resume_from or "") if record else None
        first = record.start.resume_step + 1 if record and commit else 1
        if last is None or first <= last:
            found.append(Segment(attempt, first, last))
        before = int(commit[1] or commit[2]) if commit else attempt
        if before >= attempt:  # from scratch; or a commit of the future: damaged, and would go round in circles
            break
        attempt, last = before, first - 1
    return found[::-1]


def merged_metrics(run: Run) -> Iterator[StepRecord]:
    """Every step that counts, once and in order. Of a step repeated inside an attempt, after a rollback, the last."""
    for segment in segments(run):
        yield from reversed(list(_steps_backwards(run, segment)))


def recent_metrics(run: Run, count: int) -> list[StepRecord]:
    """The last ``count`` steps that count, in order; reads no more than the ends of the newest streams."""
    backwards = (record for segment in reversed(segments(run)) for record in _steps_backwards(run, segment))
    return list(islice(backwards, count))[::-1]


def newest_step(run: Run) -> StepRecord | None:
    """The last step that counts, or None before the first."""
    return next(iter(recent_metrics(run, 1)), None)


def attempt_steps(run: Run, attempt: int) -> tuple[int | None, int | None]:
    """First and last step that an attempt ran, whether or not they count."""
    record = run.by_number.get(attempt)
    if record and record.end and record.end.last_step is not None:
        return record.end.first_step, record.end.last_step
    first = record.start.resume_step + 1 if record else 1
    newest = next(_steps_backwards(run, Segment(attempt, first, None)), None)
    return (first, newest["step"]) if newest else (None, None)


def _steps_backwards(run: Run, segment: Segment) -> Iterator[StepRecord]:
    """Step records of one segment, newest first. What was rolled back lies before, and above, what replaced it."""
    bound = segment.last_step + 1 if segment.last_step is not None else None
    for path in reversed(parts(run.seen, f"metrics/{segment.attempt:04d}", "", ".jsonl")):
        for line in lines_backwards(run.seen, path):
            record = _decode(line)
            if record is None or (bound is not None and record["step"] >= bound):
                continue
            if record["step"] < segment.first_step:
                return
            bound = record["step"]
            yield record


def _decode(line: bytes) -> StepRecord | None:
    """A step's record; None for other records, and for the unfinished last line of a stream that is being written."""
    record = decode_line(line)
    if record is None or record.get("kind", "step") != "step":
        return None
    return record if type(record.get("step")) is int and "loss" in record else None
