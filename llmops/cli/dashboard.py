"""``llmops dashboard``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from llmops.errors import UserError

MAX_INTERVAL_S = 86400
TOKEN = "LLMOPS_DASHBOARD_TOKEN"  # noqa: S105  # the name of a variable
_PACKAGES = ("starlette", "uvicorn")


def configure(parser: argparse.ArgumentParser) -> None:
    """Where the page is, and who may see it."""
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8265, metavar="P", help="%(default)s; 0: a free one")
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="S", help="seconds between two looks (%(default)s, at least 1)"
    )
    parser.add_argument("--token-file", type=Path, metavar="F", help=f"holds the token; or set {TOKEN}")
    parser.add_argument("--allow-actions", action="store_true", help="runs can be cancelled and resumed on the page")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    if not 1 <= arguments.interval < MAX_INTERVAL_S:
        raise UserError(f"--interval {arguments.interval:g}: give seconds, from 1 to less than {MAX_INTERVAL_S}")
    if not 0 <= arguments.port < 1 << 16:
        raise UserError(f"--port {arguments.port}: give a port, from 0 (a free one) to 65535")
    try:
        from llmops.dashboard import access
        from llmops.dashboard.server import Options, serve
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _PACKAGES:
            raise
        raise UserError(f"llmops dashboard needs {' and '.join(_PACKAGES)}: pip install 'llmops[ui]'") from error
    from llmops.runs.store import default_runs_url, open_store

    url = open_store(arguments.runs_url or default_runs_url()).url
    local = access.is_loopback(arguments.host)
    token = _token(arguments.token_file)
    # Everybody on a login node reaches its loopback: what changes runs is for who has the token.
    made = token is None and (not local or arguments.allow_actions)
    if made:
        token = access.new_token()
    if not local:
        print("the page is not encrypted on its way: see the documentation for TLS", file=sys.stderr)
    serve(
        Options(
            url,
            arguments.host,
            arguments.port,
            arguments.interval,
            token,
            shown=made,
            allow_actions=arguments.allow_actions,
        )
    )
    return 0


def _token(path: Path | None) -> str | None:
    from llmops.dashboard.access import check_token

    if path is not None:
        try:
            return check_token(path.read_text(), f"--token-file {path}")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file {path}: it cannot be read ({error}); give another file") from error
    given = os.environ.get(TOKEN)
    return None if given is None else check_token(given, TOKEN)
