"""``llmops completion``."""

from __future__ import annotations

import argparse
from pathlib import Path

SHELLS = ("bash", "zsh", "fish")


def configure(parser: argparse.ArgumentParser) -> None:
    """Which shell."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


def run(arguments: argparse.Namespace) -> int:
    """Print the script that the shell is to read."""
    print(Path(__file__).with_name("shells").joinpath(f"llmops.{arguments.shell}").read_text(), end="")
    return 0
