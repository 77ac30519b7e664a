"""``llmops render``: ``submit --dry-run`` under the name people look for."""

from __future__ import annotations

import argparse

from llmops.cli import submit
from llmops.launch import dry_run


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments that decide what is rendered."""
    submit.configure(parser, rendering=True)


def run(arguments: argparse.Namespace) -> int:
    """Print the script, or the command line of the local supervisor."""
    print(dry_run(submit.prepare(arguments)), end="")
    return 0
