"""``llmops status``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, get_args

from llmops import api, overview, studies
from llmops.errors import UserError
from llmops.runs.store import default_runs_url
from llmops.suggest import hint

if TYPE_CHECKING:
    from llmops.monitor.describe import Described

MAX_INTERVAL_S = 86400
SHOWN = 30  # of those that are over, unless more are asked for


def configure(parser: argparse.ArgumentParser) -> None:
    """Which runs, and how they are shown."""
    parser.add_argument("refs", nargs="*", metavar="RUN", help="name, id or prefix of a run or study; STUDY/12")
    which = parser.add_argument_group("which runs")
    which.add_argument("--state", action="append", metavar="S", help="in this state, or one of S,S; may be repeated")
    which.add_argument("--name", metavar="GLOB", help="whose name or id matches, or contains it")
    which.add_argument("--user", metavar="U", help="submitted by this user; me = you")
    which.add_argument("--sweep", metavar="STUDY", help="the trials of a study, each as a run")
    which.add_argument("--age", metavar="T", help="submitted within this time, as 90m, 12h, 7d, 2w")
    which.add_argument("--limit", type=int, metavar="N", help=f"newest N of those that are over (default: {SHOWN})")
    which.add_argument("--all", action="store_true", help="all of those that are over")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("-w", "--watch", action="store_true", help="show them live until all are over")
    output.add_argument("--json", action="store_true", help="one object a run, on stdout alone; without a limit")
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="S", help="seconds between two looks (%(default)s, at least 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Show the runs. Exit code 1 when a run that was asked for by name has failed."""
    from llmops.monitor import status as view

    if not 0 < arguments.interval < MAX_INTERVAL_S:
        raise UserError(f"--interval {arguments.interval:g}: give seconds, less than {MAX_INTERVAL_S}")
    wanted, over = _wanted(arguments), _limit(arguments)

    def fetch() -> list[Described]:
        return _look(arguments, wanted, over, None).rows

    if arguments.watch:
        found = _first(arguments, wanted, over)  # what cannot be found is said before anything is drawn
        view.watch(fetch, max(arguments.interval, 1.0))
        found = overview.Overview(fetch())
    else:
        found = _first(arguments, wanted, over)
    described = found.rows
    if arguments.json:
        print(json.dumps(described, indent=1))
    elif len(arguments.refs) == 1 and len(described) == 1 and "trials" in described[0]:
        from llmops.cli import sweep_status

        return sweep_status.show(studies.find(described[0]["id"], arguments.runs_url))
    elif len(arguments.refs) == 1 and len(described) == 1:
        view.render_run(api.detail(api.find(described[0]["id"], arguments.runs_url)))
    elif not arguments.watch:
        view.render(described)
    if found.omitted and not arguments.json:
        print(f"{found.omitted:,} older runs that are over are not shown: --all, or --limit N", file=sys.stderr)
    failed = any(item["state"] == "failed" for item in described)
    return 1 if failed and arguments.refs else 0


def _look(
    arguments: argparse.Namespace, wanted: overview.Wanted, over: int | None, progress: overview.Progress | None
) -> overview.Overview:
    if arguments.sweep is not None:
        return overview.trials(arguments.sweep, arguments.runs_url, wanted)
    return overview.overview(arguments.refs, arguments.runs_url, wanted, over, progress)


def _first(arguments: argparse.Namespace, wanted: overview.Wanted, over: int | None) -> overview.Overview:
    """With a progress bar where there is much to read."""
    from llmops.cli.progress import patiently, reading

    url = arguments.runs_url or default_runs_url()
    with reading("reading runs") as progress:
        return patiently(lambda: _look(arguments, wanted, over, progress), url)


def _wanted(arguments: argparse.Namespace) -> overview.Wanted:
    from llmops.runs.records import whoami
    from llmops.runs.state import State

    if arguments.sweep is not None and arguments.refs:
        raise UserError("--sweep shows the trials of one study: leave the names out, or --sweep")
    states = [state for each in arguments.state or () for state in each.split(",")]
    known = get_args(State)
    for state in states:
        if state not in known:
            raise UserError(f"--state {state}: choose of {', '.join(known)}{hint(state, known)}")
    since = None if arguments.age is None else time.time() - seconds(arguments.age, "--age")
    user = whoami()[0] if arguments.user == "me" else arguments.user
    return overview.Wanted(frozenset(states), arguments.name, user, since)


def _limit(arguments: argparse.Namespace) -> int | None:
    if arguments.limit is not None and (arguments.limit < 0 or arguments.all):
        raise UserError(f"--limit {arguments.limit}: give a number, 0 or more, or --all")
    if arguments.limit is not None:
        return int(arguments.limit)
    return None if arguments.all or arguments.json or arguments.refs else SHOWN


def seconds(text: str, option: str) -> float:
    """``90m``, ``12h``, ``7d``, ``2w``."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    number, unit = text[:-1], text[-1:]
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"{option} {text}: give a time, as 90m, 12h, 7d or 2w")
    return value
