"""``llmops ckpt save``."""

from __future__ import annotations

import argparse
import sys

from llmops.checkpoints.request import save_now
from llmops.checkpoints.target import resolve
from llmops.errors import UserError


def run(arguments: argparse.Namespace) -> int:
    """Ask, wait, and say what was committed."""
    target = resolve(arguments.ref, arguments.runs_url)
    if target.selector is not None:
        raise UserError(f"{arguments.ref}: a run saves the step that it is at; leave out what follows the @")
    if arguments.timeout <= 0:
        raise UserError(f"--timeout {arguments.timeout:g}: give seconds above 0")
    from rich.console import Console

    with Console(file=sys.stderr).status("") as status:
        commit = save_now(target, arguments.timeout, status.update)
    print(f"step {commit.step} is committed: {target.url}/{commit.path}")
    return 0
