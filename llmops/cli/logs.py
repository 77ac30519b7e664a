"""``llmops logs``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmops import api
from llmops.cli import log_options
from llmops.errors import UserError
from llmops.runs.model import Run

if TYPE_CHECKING:
    from llmops.monitor import logs
    from llmops.monitor.log_streams import Selection, Stream

ASK_S = 10.0  # how often the scheduler is asked about a followed run; the run store is looked at all the time


def configure(parser: argparse.ArgumentParser) -> None:
    """Whose lines, which, and how they look."""
    parser.add_argument("ref", nargs="?", metavar="RUN", help="name, id or unambiguous prefix; default: the newest run")
    parser.add_argument("-f", "--follow", action="store_true", help="go on, over restarts, until the run is over")
    parser.add_argument("--errors", action="store_true", help="why the last failed attempt failed: the first rank to")
    whose = parser.add_argument_group("whose lines")
    whose.add_argument("--rank", default="all", metavar="R", help="ranks, as 0,3,8-15; or all (default)")
    whose.add_argument(
        "--node", action="append", metavar="NAME", help="a node, or a pattern as 'gpu-1*'; may be given several times"
    )
    whose.add_argument("--attempt", type=int, metavar="A", help="an attempt, -1 for the newest; default: all")
    whose.add_argument("--pods", action="store_true", help="what the pods print, from the Kubernetes API")
    which = parser.add_argument_group("which lines")
    which.add_argument("--since", metavar="TIME", help="10m, 2h, 1d; 14:30; or 2026-11-23T14:30, in local time")
    which.add_argument("--grep", metavar="REGEX", help="only lines in which this regular expression is found")
    which.add_argument("--tail", type=int, metavar="N", help="only the last N lines of each rank")
    look = parser.add_argument_group("how they look")
    look.add_argument("--time", action="store_true", help="begin each line with its local time")
    look.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="auto: on terminals")


def run(arguments: argparse.Namespace) -> int:
    """Print the lines."""
    rank = log_options.ranks(arguments.rank)
    if arguments.tail is not None and arguments.tail < 0:
        raise UserError(f"--tail {arguments.tail}: give a number of lines, 0 or more")
    since = None if arguments.since is None else log_options.since(arguments.since, time.time())
    pattern = None if arguments.grep is None else log_options.pattern(arguments.grep)
    _check_together(arguments)
    found = api.find(arguments.ref, arguments.runs_url)
    if arguments.pods:
        return _pods(found, arguments)
    from llmops.monitor.log_streams import Selection

    nodes = log_options.Nodes(tuple(arguments.node)) if arguments.node else None
    attempt = _attempt(found, arguments.attempt)
    wanted = Selection(rank, attempt, nodes=nodes, since=since, pattern=pattern)
    if arguments.errors:
        from llmops.cli.log_errors import show

        _check_there(found, wanted, arguments)
        return show(found, wanted)
    if not arguments.follow:
        return _print(found, wanted, arguments)
    return follow(found, tail=arguments.tail, arguments=arguments, wanted=wanted)


def _check_together(arguments: argparse.Namespace) -> None:
    given = {
        "--follow": arguments.follow,
        "--since": arguments.since is not None,
        "--grep": arguments.grep is not None,
        "--tail": arguments.tail is not None,
        "--time": arguments.time,
        "--rank": arguments.rank != "all",
        "--node": arguments.node,
        "--attempt": arguments.attempt is not None,
        "--pods": arguments.pods,
    }
    if arguments.pods and (wrong := [name for name in list(given)[:-1] if given[name] and name not in _OF_PODS]):
        raise UserError(f"--pods shows whole pods: leave {' and '.join(wrong)} out")
    if arguments.errors and (wrong := [name for name in (*list(given)[:5], "--pods") if given[name]]):
        raise UserError(f"--errors shows how ranks ended: leave {' and '.join(wrong)} out")


_OF_PODS = ("--follow", "--tail")


def _attempt(found: Run, number: int | None) -> int | None:
    """The number of the attempt that is meant; -1 is the newest."""
    if number is None or number >= 0:
        return number
    from llmops.monitor.logs import written

    attempts = sorted({each.attempt for each in written(found)} | set(found.by_number))
    if -number > len(attempts):
        raise UserError(f"--attempt {number}: {found.id} has {_span('attempt', attempts)}")
    return attempts[number]


def _print(found: Run, wanted: Selection, arguments: argparse.Namespace) -> int:
    from llmops.monitor import logs

    _check_there(found, wanted, arguments)
    style = _style(found, wanted, arguments)
    anything = arguments.tail == 0
    with _rare_collections():
        for line in logs.tail(found, n=arguments.tail, wanted=wanted):
            anything = True
            sys.stdout.write(f"{logs.printable(line, style)}\n")
    if not anything and (wanted.since is not None or wanted.pattern is not None or wanted.nodes is not None):
        there = [each for each in logs.written(found) if wanted.has(each)]
        print(f"no line of {_describe(there)} is what was asked for", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Millions of lines come and go, and none is part of a cycle: looking for one takes a third of the time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _style(found: Run, wanted: Selection, arguments: argparse.Namespace | None, following: bool = False) -> logs.Style:
    from llmops.monitor import logs

    terminal, choice = sys.stdout.isatty(), arguments.color if arguments else "auto"
    colour = choice == "always" or (choice == "auto" and terminal and not os.environ.get("NO_COLOR"))
    return logs.Style(
        prefix=logs.prefixed(found, wanted, following),
        node=wanted.nodes is not None,
        time=bool(arguments and arguments.time),
        terminal=terminal or colour,
        colour=colour,
    )


def _pods(found: Run, arguments: argparse.Namespace) -> int:
    """What the scheduler has of the pods: also of those that never got as far as to run anything."""
    from llmops.monitor.text import terminal_line

    terminal = sys.stdout.isatty()
    over = (lambda: api.status(found).state in api.OVER) if arguments.follow else None
    for line in api.pod_logs(found, arguments.tail, over):
        print(terminal_line(line) if terminal else line, flush=arguments.follow)
    return 0


def follow(
    found: Run,
    tail: int | None = None,
    arguments: argparse.Namespace | None = None,
    wanted: Selection | None = None,
) -> int:
    """Print lines as they come until the run is over. Exit code 1 when it failed."""
    from llmops.monitor import logs

    wanted = wanted or logs.Selection()
    latest = api.status(found)
    asked = time.monotonic()

    def over() -> bool:
        nonlocal latest, asked
        now = time.monotonic()
        if api.has_ended(found) or now - asked > ASK_S:
            latest, asked = api.status(found), now
        return latest.state in api.OVER

    style = _style(found, wanted, arguments, following=True)
    for line in logs.follow(found, over, n=tail, wanted=wanted):
        print(logs.printable(line, style), flush=True)
    print(f"{found.id} {latest.state}{f': {latest.reason}' if latest.reason else ''}", file=sys.stderr)
    return 1 if latest.state == "failed" else 0


def _check_there(found: Run, wanted: Selection, arguments: argparse.Namespace) -> None:
    """Nothing at all would look as if the program had printed nothing."""
    from llmops.monitor.logs import Selection, written

    there = written(found)
    attempts = sorted({each.attempt for each in there} | set(found.by_number))
    if wanted.attempt is not None and wanted.attempt not in attempts:
        raise UserError(f"--attempt {arguments.attempt}: {found.id} has {_span('attempt', attempts)}")
    there = [each for each in there if each.rank >= 0 and wanted.attempt in (None, each.attempt)]
    ranks = sorted({each.rank for each in there})
    if there and not any(Selection(wanted.ranks).has(each) for each in there):
        raise UserError(f"--rank {arguments.rank}: {found.id} has output of {_span('rank', ranks)}")
    if there and not any(Selection(nodes=wanted.nodes).has(each) for each in there):
        raise UserError(f"--node {' '.join(arguments.node)}: {found.id} has output of {_nodes(there)}")
    if there and not any(wanted.has(each) for each in there):
        raise UserError(f"--rank {arguments.rank}: not on {' '.join(arguments.node)}; there is {_describe(there)}")


def _describe(streams: list[Stream]) -> str:
    """``attempts 0 to 1, ranks 0 to 3, nodes n1 n2``."""
    spans = (("attempt", {each.attempt for each in streams}), ("rank", {each.rank for each in streams}))
    return ", ".join([*(_span(word, sorted(numbers)) for word, numbers in spans), _nodes(streams)])


def _span(word: str, numbers: list[int]) -> str:
    if not numbers:
        return f"no {word} yet"
    return f"{word}s {numbers[0]} to {numbers[-1]}"


def _nodes(streams: list[Stream]) -> str:
    names = sorted({each.node for each in streams})
    return f"nodes {' '.join(names[:10])}{' …' if len(names) > 10 else ''}"
