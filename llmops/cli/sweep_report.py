"""``llmops sweep report``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llmops import studies


def configure(parser: argparse.ArgumentParser) -> None:
    """Which study, and as what."""
    parser.usage = "llmops sweep report [STUDY] [--html FILE | --json]"
    parser.add_argument("study", nargs="?", metavar="STUDY", help="name, id or prefix; default: the newest")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--html", metavar="FILE", type=Path, help="write a page with all trials, for a browser")
    output.add_argument("--json", action="store_true", help="counts, best trial and importance as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Show what the study has found."""
    from rich.console import Console

    from llmops.sweep import report

    study = studies.find(arguments.study, arguments.runs_url)
    rows = studies.trials(study, with_points=arguments.html is not None)
    if arguments.html is not None:
        from llmops.sweep import page

        arguments.html.write_text(page.html(study.record, rows), encoding="utf-8")
        print(f"wrote {arguments.html}")
    elif arguments.json:
        print(json.dumps(report.summary(study.record, rows), indent=1))
    else:
        report.show(study.record, rows, Console())
    return 0
