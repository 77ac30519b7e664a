"""``llmops sweep best``."""

from __future__ import annotations

import argparse
import json
import shlex

from llmops import studies
from llmops.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """Which study, and how its best trial is shown."""
    parser.usage = "llmops sweep best [STUDY] [--as-overrides | --json]"
    parser.add_argument("study", nargs="?", metavar="STUDY", help="name, id or prefix; default: the newest")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--as-overrides", action="store_true", help="its values, to be given to `llmops submit`")
    output.add_argument("--json", action="store_true", help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the best trial. Exit code 1 when there is none yet."""
    from llmops.sweep import report

    study = studies.find(arguments.study, arguments.runs_url)
    found = report.best(study.record, studies.trials(study))
    if found is None:
        raise UserError(f"{study.id}: no trial has a value yet; `llmops sweep status` tells why")
    overrides = report.as_overrides(study.record, found)
    if arguments.json:
        print(
            json.dumps({"id": found.id, "trial": found.trial, "value": found.value, "params": found.params}, indent=1)
        )
    elif arguments.as_overrides:
        print(shlex.join(overrides))
    else:
        print(f"{found.id}  {study.record.sweep.objective} {found.value:g} at step {found.step}")
        print(f"  {shlex.join(overrides)}")
    return 0
