"""Why an attempt failed, in lines: the cause first, then what became of the other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmops.monitor.log_errors import Errors, spans
from llmops.monitor.text import clean, moment
from llmops.runs.state import describe_end

MOST_GROUPS = 20


def report(told: Errors) -> Iterator[str]:
    """The lines. What a program wrote is indented, and as it wrote it: clean it before it reaches a terminal."""
    end, cause = told.end, told.cause
    if cause is None:
        why = clean(describe_end(end)) if end else "no end was recorded"
        yield f"attempt {told.attempt}: {why}; no rank has output"
        yield from _indented((end.error or end.detail or "").split("\n") if end else [])
        return
    words = [f"attempt {told.attempt}", f"rank {cause.stream.rank} on {clean(cause.stream.node)}"]
    if cause.time is not None:
        words.append(moment(cause.time))
    if cause.exit_code is not None:
        words.append(f"exit code {cause.exit_code}" if cause.exit_code >= 0 else f"signal {-cause.exit_code}")
    yield ", ".join(words)
    yield from _indented(cause.text or ["it wrote nothing"])
    if end is not None and end.reason == "hung":
        yield clean((end.error or "").rstrip().rsplit("\n", 1)[-1])
    if end is None:
        yield "nobody recorded the end of this attempt"
    elif not told.sure:
        yield f"no rank has an error of its own; what was recorded: {clean(describe_end(end))}"
    if told.others:
        yield ""
    for group in told.others[:MOST_GROUPS]:
        count = len(group.ranks)
        yield f"{count:,} {'rank' if count == 1 else 'ranks'}: {clean(group.title)} ({_of(group.ranks)})"
    if len(told.others) > MOST_GROUPS:
        yield f"and {len(told.others) - MOST_GROUPS} other last lines"


def _of(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}"


def _indented(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        yield f"  {line}".rstrip()
