"""``llmops sweep status``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from llmops import studies

if TYPE_CHECKING:
    from llmops.sweep.records import Study


def configure(parser: argparse.ArgumentParser) -> None:
    """Which study."""
    parser.usage = "llmops sweep status [STUDY] [--json]"
    parser.add_argument("study", nargs="?", metavar="STUDY", help="name, id or prefix; default: the newest")
    parser.add_argument("--json", action="store_true", help="the study and its trials as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Show the study's trials."""
    study = studies.find(arguments.study, arguments.runs_url)
    if arguments.json:
        print(json.dumps(studies.describe(study, studies.trials(study)), indent=1))
        return 0
    return show(study)


def show(study: Study) -> int:
    """The table."""
    from llmops.sweep import table

    table.show(study, studies.trials(study))
    return 0
