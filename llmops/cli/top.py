"""``llmops top``."""

from __future__ import annotations

import argparse
import sys

from llmops.errors import UserError

MAX_INTERVAL_S = 86400
LEAVE_S = 1.0  # for what is still being read when the view ends


def configure(parser: argparse.ArgumentParser) -> None:
    """How often."""
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="S", help="seconds between two looks (%(default)s, at least 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Show the screen until the user has seen enough. The runs go on."""
    if not 1 <= arguments.interval < MAX_INTERVAL_S:
        raise UserError(f"--interval {arguments.interval:g}: give seconds, from 1 to less than {MAX_INTERVAL_S}")
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise UserError("llmops top needs a terminal; llmops status prints the same")
    try:
        from llmops.top.app import TopApp
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "textual":
            raise
        raise UserError("llmops top needs Textual: pip install 'llmops[ui]'") from error
    from rich.console import Console

    from llmops.monitor.feed import leave
    from llmops.runs.store import default_runs_url, open_store
    from llmops.top.source import Source

    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    if ascii_only and sys.__stderr__ is not None:
        sys.__stderr__.reconfigure(errors="replace")  # where Textual draws
    colours = {"truecolor": 1 << 24, "256": 256}.get(Console().color_system or "", 16)
    url = arguments.runs_url or default_runs_url()
    store = open_store(url)
    if store.login is not None:
        store.exists("")  # who types a password for it does so before the screen is drawn
    TopApp(Source(url), arguments.interval, ascii_only, colours).run()
    leave(LEAVE_S)
    return 0
