"""``llmops goodput``."""

from __future__ import annotations

import argparse
import json
import math
import time

from llmops import overview
from llmops.cli.status import seconds
from llmops.errors import UserError
from llmops.runs.store import default_runs_url


def configure(parser: argparse.ArgumentParser) -> None:
    """Of what, and how it is told apart."""
    parser.add_argument("refs", nargs="*", metavar="RUN", help="runs and studies; default: all")
    parser.add_argument("--by", choices=overview.BY, default="run", help="a line for each (default: %(default)s)")
    parser.add_argument("--user", metavar="U", help="of this user; me = you")
    parser.add_argument("--since", metavar="T", help="from then on: a date, a date and time, or how long ago, as 7d")
    parser.add_argument("--until", metavar="T", help="up to then")
    parser.add_argument("--price", type=float, metavar="P", help="of an hour of one rank: also shows the cost")
    parser.add_argument("--json", action="store_true", help="one object, on stdout alone")


def run(arguments: argparse.Namespace) -> int:
    """Show where the node-hours went."""
    from rich.console import Console

    from llmops.cli.progress import patiently, reading
    from llmops.monitor import goodput_table
    from llmops.runs.records import whoami

    price = arguments.price
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise UserError(f"--price {price:g}: give what an hour of one rank costs, 0 or more")
    now = time.time()
    since = 0.0 if arguments.since is None else moment(arguments.since, "--since", now)
    until = now if arguments.until is None else moment(arguments.until, "--until", now)
    if until <= since:
        raise UserError(f"--until {arguments.until or 'now'} is not after --since {arguments.since}")
    user = whoami()[0] if arguments.user == "me" else arguments.user
    wanted = overview.Wanted(owner=user)

    def look(progress: overview.Progress | None) -> dict[str, object]:
        return overview.goodput(arguments.refs, arguments.runs_url, wanted, arguments.by, since, until, price, progress)

    with reading("reading runs") as progress:
        found = patiently(lambda: look(progress), arguments.runs_url or default_runs_url())
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        goodput_table.show(found["groups"], found["total"], arguments.by, Console())  # type: ignore[arg-type]
    return 0


def moment(text: str, option: str, now: float) -> float:
    """Epoch seconds of ``2026-11-23``, ``2026-11-23T12:00`` (local time unless it says otherwise) or ``7d`` ago."""
    import datetime

    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        pass
    try:
        return now - seconds(text, option)
    except UserError:
        raise UserError(f"{option} {text}: give a date, as 2026-11-23 or 2026-11-23T12:00, or a time, as 7d") from None
