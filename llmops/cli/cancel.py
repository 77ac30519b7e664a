"""``llmops cancel``."""

from __future__ import annotations

import argparse
import sys

from llmops import api, studies


def configure(parser: argparse.ArgumentParser) -> None:
    """Runs, and how gently."""
    parser.add_argument("refs", nargs="+", metavar="RUN", help="name, id or prefix of a run or study; STUDY/12")
    parser.add_argument("--graceful", action="store_true", help="let the ranks save their state first")
    parser.add_argument("--no-wait", action="store_true", help="return before the jobs are gone")


def run(arguments: argparse.Namespace) -> int:
    """Cancel each run; those that are over stay as they are."""
    url = arguments.runs_url
    # All are looked up before the first is touched: a typo in the third must not leave two cancelled.
    found_studies = [studies.find(ref, url) for ref in arguments.refs if studies.is_study(ref, url)]
    others = [ref for ref in arguments.refs if not studies.is_study(ref, url)]
    waiting = [ref for ref in others if studies.is_waiting(ref, url)]
    found = [api.find(ref, url) for ref in others if ref not in waiting]
    for study in found_studies:
        after = studies.cancel(study, arguments.graceful, wait=not arguments.no_wait)
        print(f"{study.id}: {after['reason']}")
    for ref in waiting:
        studies.cancel_waiting(ref, url)
        print(f"{ref}: cancelled before it began")
    for each in found:
        before = api.status(each)
        if before.state in api.OVER:
            print(f"{each.id} is over already: {before.state}")
            continue
        if arguments.graceful and not arguments.no_wait:
            print(f"{each.id}: waiting for it to save its state", file=sys.stderr, flush=True)
        ended = api.cancel(each, arguments.graceful, wait=not arguments.no_wait)
        print(f"{each.id}: {ended.state if ended.state in api.OVER else 'told to end, not over yet'}")
    return 0
