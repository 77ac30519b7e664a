"""``llmops metrics``."""

from __future__ import annotations

import argparse
import ipaddress
import json
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from llmops.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from llmops.monitor.metrics import Look

PORT = 9464
MAX_INTERVAL_S = 86400
LATE_S = 30.0  # a look that takes longer is told as a store that does not answer
LIVE = frozenset({"running"})


def configure(parser: argparse.ArgumentParser) -> None:
    """Where it listens, and how often it looks."""
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help="0 for a free one (%(default)s)")
    parser.add_argument(
        "--interval", type=float, default=15.0, metavar="S", help="seconds between two looks (%(default)s, at least 1)"
    )
    parser.add_argument("--once", action="store_true", help="look once, print what would be served, and exit")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    if not 0 < arguments.interval < MAX_INTERVAL_S:
        raise UserError(f"--interval {arguments.interval:g}: give seconds, less than {MAX_INTERVAL_S}")
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port}: give a number from 1 to 65535, or 0 for a free port")
    if arguments.once:
        return _once(arguments.runs_url)
    return _serve(arguments.host, arguments.port, max(arguments.interval, 1.0), arguments.runs_url)


def look(runs_url: str | None) -> Look:
    """Runs, studies, and where all that run serve their metrics. Raises as the run store does."""
    from llmops import overview
    from llmops.monitor.metrics import Look
    from llmops.monitor.targets import live_targets
    from llmops.runs.store import default_runs_url, open_store

    url = runs_url or default_runs_url()
    began = time.monotonic()
    rows = overview.overview(runs_url=url).rows
    running = [each for each in rows if "trials" not in each]
    for each in rows:
        if each.get("trials", {}).get("running"):
            running += overview.trials(each["id"], url, overview.Wanted(states=LIVE)).rows
    targets = live_targets(open_store(url), running)
    return Look(_scored(rows), targets, time.monotonic() - began)


def _scored(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the newest scores of the trainings that get series of their own."""
    from llmops.errors import ClusterError
    from llmops.monitor.metrics import choose
    from llmops.monitor.scores import newest

    shown = {each["id"] for each in choose(rows, time.time())[0] if each.get("kind") == "llm"}
    found = []
    for each in rows:
        if each["id"] in shown:
            try:
                each = {**each, "scores": newest(each["url"])}
            except (UserError, ClusterError, OSError):  # one run that cannot be read hides no other
                each = {**each, "scores": []}
        found.append(each)
    return found


def _once(runs_url: str | None) -> int:
    from llmops.monitor.feed import Seen
    from llmops.monitor.metrics import text

    seen = Seen(look(runs_url), time.time(), number=1)
    sys.stdout.buffer.write(text(seen, time.time()))
    return 0


def _serve(host: str, port: int, interval_s: float, runs_url: str | None) -> int:
    from llm.utils.metrics_server import JSON, TEXT, Server, join_bind
    from llmops.monitor.feed import Feed
    from llmops.monitor.metrics import served

    feed = Feed(lambda: look(runs_url), interval_s, late_s=min(max(5.0, 3 * interval_s), LATE_S))

    def targets() -> bytes:
        found = feed.seen().value
        return json.dumps([target.to_json() for target in found.targets] if found else []).encode()

    try:
        server = Server(host, port, {"/metrics": (TEXT, lambda: served(feed.seen)), "/sd": (JSON, targets)})
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose others") from error
    where = f"http://{join_bind(host, server.server_port)}"
    print(f"serving {where}/metrics, and {where}/sd for http_sd_configs; Ctrl-C ends it", flush=True)
    if not _is_loopback(host):
        print(f"warning: whoever reaches {host} sees names and owners of all runs: there is no login", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        feed.close()
        server.close()
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
