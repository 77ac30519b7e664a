"""``llmops clone``."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmops import api, clone
from llmops.cli.submit import show
from llmops.launch import dry_run


def configure(parser: argparse.ArgumentParser) -> None:
    """A run, and what its clone has in another way."""
    parser.add_argument("ref", metavar="RUN", help="name, id or unambiguous prefix")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="OVERRIDE", help="what to change, such as train.lr=1e-4 or model=7b"
    )
    parser.add_argument("--code", action="store_true", help="run the code that RUN ran, not the current one")
    parser.add_argument("--backend", metavar="B", help="local, slurm or k8s (default: where RUN ran)")
    parser.add_argument("--name", metavar="N", help="the new run's name (default: that of RUN, and -clone)")
    parser.add_argument("--config-dir", metavar="DIR", type=Path, help="a folder with config groups of your own")
    output = parser.add_mutually_exclusive_group()  # what is on stdout
    output.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")
    output.add_argument("-f", "--follow", action="store_true", help="show the output until the run is over")
    output.add_argument("--json", action="store_true", help="print the run as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Submit a run like another one."""
    api.check_backend(arguments.backend)
    prepared = clone.prepare(
        api.find(arguments.ref, arguments.runs_url),
        arguments.overrides,
        backend=arguments.backend,
        name=arguments.name,
        own_code=arguments.code,
        config_dir=arguments.config_dir,
    )
    if arguments.dry_run:
        print(dry_run(prepared), end="")
        return 0
    return show(api.submit(prepared), arguments)
