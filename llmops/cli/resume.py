"""``llmops resume``."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmops import api


def configure(parser: argparse.ArgumentParser) -> None:
    """A run, and what to change."""
    parser.add_argument("ref", metavar="RUN", help="name, id or unambiguous prefix")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="OVERRIDE", help="values to change, such as train.max_steps=400"
    )
    parser.add_argument("--backend", metavar="B", help="local, slurm or k8s: go on there (default: where it ran)")
    parser.add_argument("--config-dir", metavar="DIR", type=Path, help="a folder with config groups of your own")
    parser.add_argument("-f", "--follow", action="store_true", help="show the output until the run is over")


def run(arguments: argparse.Namespace) -> int:
    """Submit the run again."""
    found = api.find(arguments.ref, arguments.runs_url)
    resumed = api.resume(found, arguments.overrides, arguments.backend, arguments.config_dir)
    if resumed is None:
        print(f"{found.id} has finished; to train it further, raise train.max_steps")
        return 0
    print(f"resumed {resumed.id} ({resumed.backend} job {resumed.job_id})", flush=True)
    if arguments.follow:
        from llmops.cli.logs import follow

        return follow(resumed)
    return 0
