"""``llmops cancel``."""

from __future__ import annotations

import argparse
import sys

from llmops import api


def configure(parser: argparse.ArgumentParser) -> None:
    """Runs, and how gently."""
    parser.add_argument("refs", nargs="+", metavar="RUN", help="name, id or unambiguous prefix")
    parser.add_argument("--graceful", action="store_true", help="let the ranks save their state first")
    parser.add_argument("--no-wait", action="store_true", help="return before the jobs are gone")


def run(arguments: argparse.Namespace) -> int:
    """Cancel each run; those that are over stay as they are."""
    # All are looked up before the first is touched: a typo in the third must not leave two cancelled.
    found = [api.find(ref, arguments.runs_url) for ref in arguments.refs]
    for each in found:
        before = api.status(each)
        if before.state in api.OVER:
            print(f"{each.id} is over already: {before.state}")
            continue
        if arguments.graceful and not arguments.no_wait:
            print(f"{each.id}: waiting for it to save its state", file=sys.stderr, flush=True)
        after = api.cancel(each, arguments.graceful, wait=not arguments.no_wait)
        print(f"{each.id}: {after.state if after.state in api.OVER else 'told to end, not over yet'}")
    return 0
