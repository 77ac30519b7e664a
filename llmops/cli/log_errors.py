"""``llmops logs --errors``."""

from __future__ import annotations

import sys

from llmops.monitor.error_report import report
from llmops.monitor.log_errors import errors, failed_attempts
from llmops.monitor.log_streams import Selection
from llmops.monitor.text import clean, clean_lines, terminal_line
from llmops.runs.model import Run


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
    terminal = sys.stdout.isatty()
    for line in report(errors(found, number, wanted)):
        print(terminal_line(line) if terminal else clean_lines(line)[0])
    return 1


def _without_attempt(found: Run) -> int:
    """No attempt failed; the scheduler may have refused the run all the same."""
    refused = found.submissions[-1].failed if found.submissions else None
    if refused is not None:
        print(f"{found.submissions[-1].backend} refused {found.id}: {clean(refused.error)}")
        return 1
    print(f"no attempt of {found.id} has failed")
    return 0
