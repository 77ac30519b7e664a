"""``llmops logs``."""

from __future__ import annotations

import argparse
import sys
import time

from llmops import api
from llmops.errors import UserError
from llmops.runs.model import Run

ASK_S = 10.0  # how often the scheduler is asked about a followed run; the run store is looked at all the time


def configure(parser: argparse.ArgumentParser) -> None:
    """Whose lines, and how many."""
    parser.add_argument("ref", nargs="?", metavar="RUN", help="name, id or unambiguous prefix; default: the newest run")
    parser.add_argument("-f", "--follow", action="store_true", help="go on, over restarts, until the run is over")
    parser.add_argument("--rank", default="all", metavar="R", help="a rank, or all (default)")
    parser.add_argument("--attempt", type=int, metavar="A", help="an attempt; default: all")
    parser.add_argument("--pods", action="store_true", help="what the pods print, from the Kubernetes API")
    parser.add_argument("--tail", type=int, metavar="N", help="only the last N lines of each rank")


def run(arguments: argparse.Namespace) -> int:
    """Print the lines."""
    rank = _rank(arguments.rank)
    if arguments.tail is not None and arguments.tail < 0:
        raise UserError(f"--tail {arguments.tail}: give a number of lines, 0 or more")
    found = api.find(arguments.ref, arguments.runs_url)
    if arguments.pods:
        return _pods(found, arguments)
    if arguments.follow:
        return follow(found, rank, arguments.attempt, arguments.tail)
    from llmops.monitor import logs

    _check_there(found, rank, arguments.attempt)
    prefix, terminal = logs.prefixed(found, rank, arguments.attempt), sys.stdout.isatty()
    for line in logs.tail(found, rank, arguments.attempt, arguments.tail):
        print(logs.printable(line, prefix, terminal))
    return 0


def _pods(found: Run, arguments: argparse.Namespace) -> int:
    """What the scheduler has of the pods: also of those that never got as far as to run anything."""
    from llmops.monitor.text import terminal_line

    if arguments.attempt is not None or arguments.rank != "all":
        raise UserError("--pods shows whole pods: leave --rank and --attempt out")
    terminal = sys.stdout.isatty()
    over = (lambda: api.status(found).state in api.OVER) if arguments.follow else None
    for line in api.pod_logs(found, arguments.tail, over):
        print(terminal_line(line) if terminal else line, flush=arguments.follow)
    return 0


def follow(found: Run, rank: int | None = None, attempt: int | None = None, tail: int | None = None) -> int:
    """Print lines as they come until the run is over. Exit code 1 when it failed."""
    from llmops.monitor import logs

    latest = api.status(found)
    asked = time.monotonic()

    def over() -> bool:
        nonlocal latest, asked
        now = time.monotonic()
        if api.has_ended(found) or now - asked > ASK_S:
            latest, asked = api.status(found), now
        return latest.state in api.OVER

    prefix, terminal = logs.prefixed(found, rank, attempt, following=True), sys.stdout.isatty()
    for line in logs.follow(found, over, rank, attempt, tail):
        print(logs.printable(line, prefix, terminal), flush=True)
    print(f"{found.id} {latest.state}{f': {latest.reason}' if latest.reason else ''}", file=sys.stderr)
    return 1 if latest.state == "failed" else 0


def _rank(text: str) -> int | None:
    if text == "all":
        return None
    if text.isdecimal() and text.isascii():
        return int(text)
    raise UserError(f"--rank {text}: give a rank's number, or all")


def _check_there(found: Run, rank: int | None, attempt: int | None) -> None:
    """Nothing at all would look as if the program had printed nothing."""
    from llmops.monitor.logs import written

    there = written(found)
    attempts = sorted({each.attempt for each in there} | set(found.by_number))
    if attempt is not None and attempt not in attempts:
        known = f"attempts {attempts[0]} to {attempts[-1]}" if attempts else "no attempt yet"
        raise UserError(f"--attempt {attempt}: {found.id} has {known}")
    ranks = sorted({each.rank for each in there if attempt in (None, each.attempt)})
    if ranks and rank is not None and rank not in ranks:
        raise UserError(f"--rank {rank}: {found.id} has output of ranks {ranks[0]} to {ranks[-1]}")
