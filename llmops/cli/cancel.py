"""``llmops cancel``."""

from __future__ import annotations

import argparse

from llmops import api


def configure(parser: argparse.ArgumentParser) -> None:
    """Runs, and how gently."""
    parser.add_argument("refs", nargs="+", metavar="RUN", help="name, id or unambiguous prefix")
    parser.add_argument("--graceful", action="store_true", help="let the ranks save their state first")


def run(arguments: argparse.Namespace) -> int:
    """Cancel each run; those that are over stay as they are."""
    # All are looked up before the first is touched: a typo in the third must not leave two cancelled.
    found = [api.find(ref, arguments.runs_url) for ref in arguments.refs]
    for each in found:
        before = api.status(each)
        if before.state in api.OVER:
            print(f"{each.id} is over already: {before.state}")
            continue
        after = api.cancel(each, arguments.graceful)
        told = "is saving its state and will end" if arguments.graceful and after.state == "running" else after.state
        print(f"{each.id}: {told}")
    return 0
