"""``llmops status``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from llmops import api, studies
from llmops.errors import UserError

MAX_INTERVAL_S = 86400


def configure(parser: argparse.ArgumentParser) -> None:
    """Which runs, and how they are shown."""
    parser.add_argument("refs", nargs="*", metavar="RUN", help="name, id or prefix of a run or study; STUDY/12")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("-w", "--watch", action="store_true", help="show them live until all are over")
    output.add_argument("--json", action="store_true", help="one object a run, on stdout alone")
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="S", help="seconds between two looks (%(default)s, at least 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Show the runs. Exit code 1 when a run that was asked for by name has failed."""
    from llmops.monitor import status as view

    if not 0 < arguments.interval < MAX_INTERVAL_S:
        raise UserError(f"--interval {arguments.interval:g}: give seconds, less than {MAX_INTERVAL_S}")

    def fetch() -> list[dict[str, Any]]:
        return studies.overview(arguments.refs, arguments.runs_url)

    if arguments.watch:
        view.watch(fetch, max(arguments.interval, 1.0))
    described = fetch()
    if arguments.json:
        print(json.dumps(described, indent=1))
    elif len(arguments.refs) == 1 and "trials" in described[0]:
        from llmops.cli import sweep_status

        return sweep_status.show(studies.find(described[0]["id"], arguments.runs_url))
    elif len(arguments.refs) == 1:
        view.render_run(described[0], view.loss_points(api.find(described[0]["id"], arguments.runs_url)))
    elif not arguments.watch:
        view.render(described)
    failed = any(item["state"] == "failed" for item in described)
    return 1 if failed and arguments.refs else 0
