"""``llmops logs --errors``."""

from __future__ import annotations

import sys

from llmops.monitor.log_errors import Errors, errors, failed_attempts, spans
from llmops.monitor.log_streams import Selection
from llmops.monitor.text import clean, clean_lines, moment, terminal_line
from llmops.runs.model import Run
from llmops.runs.state import describe_end

MOST_GROUPS = 20


def show(found: Run, wanted: Selection) -> int:
    """Print why the newest failed attempt, or the one asked for, failed. Exit code 1, or 0 when nothing failed."""
    failed = [each.number for each in failed_attempts(found)]
    number = wanted.attempt if wanted.attempt is not None else failed[-1] if failed else None
    if number is None:
        return _without_attempt(found)
    known = found.by_number.get(number)
    if known is not None and known.end is not None and known.end.reason == "finished":
        print(f"attempt {number} of {found.id} finished: no rank of it failed")
        return 0
    _print(errors(found, number, wanted))
    return 1


def _without_attempt(found: Run) -> int:
    """No attempt failed; the scheduler may have refused the run all the same."""
    refused = found.submissions[-1].failed if found.submissions else None
    if refused is not None:
        print(f"{found.submissions[-1].backend} refused {found.id}: {clean(refused.error)}")
        return 1
    print(f"no attempt of {found.id} has failed")
    return 0


def _print(told: Errors) -> None:
    end, cause = told.end, told.cause
    if cause is None:
        print(
            f"attempt {told.attempt}: {clean(describe_end(end)) if end else 'no end was recorded'}; no rank has output"
        )
        _indented((end.error or end.detail or "").split("\n") if end else [])
        return
    words = [f"attempt {told.attempt}", f"rank {cause.stream.rank} on {clean(cause.stream.node)}"]
    if cause.time is not None:
        words.append(moment(cause.time))
    if cause.exit_code is not None:
        words.append(f"exit code {cause.exit_code}" if cause.exit_code >= 0 else f"signal {-cause.exit_code}")
    print(", ".join(words))
    _indented(cause.text or ["it wrote nothing"])
    if end is not None and end.reason == "hung":
        print(clean((end.error or "").rstrip().rsplit("\n", 1)[-1]))
    if end is None:
        print("nobody recorded the end of this attempt")
    elif not told.sure:
        print(f"no rank has an error of its own; what was recorded: {clean(describe_end(end))}")
    if told.others:
        print()
    for group in told.others[:MOST_GROUPS]:
        count = len(group.ranks)
        print(f"{count:,} {'rank' if count == 1 else 'ranks'}: {clean(group.title)} ({_of(group.ranks)})")
    if len(told.others) > MOST_GROUPS:
        print(f"and {len(told.others) - MOST_GROUPS} other last lines")


def _of(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}"


def _indented(lines: list[str]) -> None:
    terminal = sys.stdout.isatty()
    for line in lines:
        print(f"  {terminal_line(line) if terminal else clean_lines(line)[0]}".rstrip())
