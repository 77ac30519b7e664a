"""``llmops render``: ``submit --dry-run`` under the name people look for."""

from __future__ import annotations

import argparse

from llmops import api
from llmops.cli import submit


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments that decide what is rendered."""
    submit.configure(parser, rendering=True)


def run(arguments: argparse.Namespace) -> int:
    """Print the script, or the command line of the local supervisor."""
    print(api.launch.dry_run(submit.prepare(arguments)), end="")
    return 0
