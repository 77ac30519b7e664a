"""Apps that TorchX runs as processes of this machine: it forgets and ends them with the program that started them.

So one is started that stays: it hands the app to TorchX, waits until it is over, and is found by its environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmops.agent.local import start_ticks

MARK = "LLMOPS_TORCHX_APP"
POLL_S = 0.5


def start(name: str, request: Mapping[str, Any], log_file: Path, hidden_env: Sequence[str]) -> None:
    """Start the keeper of the app ``name``. Raises OSError when it cannot be."""
    env = {key: value for key, value in os.environ.items() if key not in hidden_env}
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmops.backends.torchx.processes"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**env, MARK: name},
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps(request).encode())
    process.stdin.close()
    process.returncode = 0  # nobody waits for it here: it outlives the launcher


def alive(name: str) -> list[int]:
    """Processes of the app, its keeper first."""
    needle, found = f"{MARK}={name}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append((start_ticks(int(entry.name)), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def end(name: str) -> None:
    """Tell the keeper, which ends the app."""
    for pid in alive(name)[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def main() -> int:
    """Keep one app, read from standard input. Returns 0 when it has succeeded."""
    from llmops.backends.torchx.app import app_def
    from llmops.backends.torchx.schedulers import connected, options

    told: list[int] = []
    request = json.load(sys.stdin)
    with connected(request["scheduler"]) as scheduler:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: told.append(number))
        values = options(scheduler, request["scheduler"], request["options"])
        app_id = scheduler.schedule(scheduler.submit_dryrun(app_def(request["app"]), values))
        while (found := scheduler.describe(app_id)) is not None and found.state not in _over():
            if told:
                scheduler.cancel(app_id)  # TERM, and KILL after a while, to every replica
                return 1
            time.sleep(POLL_S)
        return 0 if found is not None and found.state.name == "SUCCEEDED" else 1


def _over() -> tuple[Any, ...]:
    from torchx.specs import AppState

    return (AppState.SUCCEEDED, AppState.FAILED, AppState.CANCELLED)


if __name__ == "__main__":
    sys.exit(main())
