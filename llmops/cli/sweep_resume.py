"""``llmops sweep resume``."""

from __future__ import annotations

import argparse

from llmops import studies


def configure(parser: argparse.ArgumentParser) -> None:
    """Which study, and what it gets in addition."""
    parser.usage = "llmops sweep resume STUDY [OVERRIDE …] [options]"
    parser.add_argument("study", metavar="STUDY", help="name, id or prefix")
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="of where and how trials run: cluster.time=4:00:00 …"
    )
    parser.add_argument("--trials", metavar="N", type=int, default=0, help="add so many trials")
    parser.add_argument("--max-parallel", metavar="P", type=int, help="trials at a time")
    parser.add_argument("--allow-changes", action="store_true", help="take a changed space or base configuration")
    parser.add_argument("--dry-run", action="store_true", help="say which trials would run, and submit nothing")


def run(arguments: argparse.Namespace) -> int:
    """Submit what is left, and say what that is."""
    study = studies.find(arguments.study, arguments.runs_url)
    plan = studies.plan(study, arguments.overrides, arguments.trials, arguments.allow_changes)
    given_up = f"; {len(plan.given_up)} failed too often (sweep.max_reruns)" if plan.given_up else ""
    said = f"{len(plan.again)} trials run again, {len(plan.new)} are new{given_up}"
    if arguments.dry_run:
        print(f"{study.id}: {said}; nothing was submitted")
        return 0
    if not plan.trials:
        print(f"{study.id}: nothing is left to run{given_up}")
        return 0
    before = len(study.submissions)
    resumed = studies.resume(study, plan, arguments.max_parallel)
    jobs = ", ".join(each.job_id for each in resumed.submissions[before:] if each.job_id)
    print(f"resumed {study.id}: {said} ({resumed.submissions[-1].backend} job {jobs})")
    return 0
