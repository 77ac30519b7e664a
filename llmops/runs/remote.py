"""``python -m llmops.runs.remote URL``: the run store for a supervisor, which is standard library alone.

Requests come on standard input and answers go to standard output, one JSON object a line. Between requests it stores
what appears in the spool of output streams. It ends when its standard input does: its supervisor is gone, or done.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llmops.errors import ClusterError, UserError
from llmops.runs.spool import SpoolReader
from llmops.runs.store import Store, open_store

POLL_S = 0.5
FLUSH_S = 8.0  # for the last output, once the supervisor is gone or done
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class Server:
    """Answers the requests of one supervisor, one after the other."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.streams: list[SpoolReader] = []
        self.spool: Path | None = None
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """Opened on first use, so that what is wrong with it is an answer."""
        if self._store is None:
            self._store = open_store(self.url)
        return self._store

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """``value``, or in one line an ``error`` and whether to try ``again``."""
        try:
            return {"value": self._value(request["op"], request)}
        except ClusterError as error:
            return {"error": str(error), "again": True}
        except UserError as error:
            return {"error": str(error), "again": False}
        except OSError as error:
            return {"error": f"{self.url}: {error}", "again": False}

    def _value(self, op: str, request: dict[str, Any]) -> Any:
        if op == "get":
            try:
                return base64.b64encode(self.store.get(request["name"])).decode("ascii")
            except FileNotFoundError:
                return None
        if op == "create":
            return self.store.create(request["name"], base64.b64decode(request["data"]))
        if op == "list":
            return self.store.list(request["name"])
        if op == "exists":
            return self.store.exists(request["name"])
        if op == "fetch":
            folder, _, name = request["url"].rpartition("/")
            Path(request["to"]).write_bytes(open_store(folder).get(name))
            return True
        if op == "spool":
            self.spool = Path(request["folder"])
            return True
        if op == "stream":
            self.streams.append(SpoolReader(self.store, request["name"], Path(request["folder"])))
            return True
        raise UserError(f"the helper knows no request {op}: supervisor and llmops are of different versions")

    def flush(self) -> None:
        """Store all that is left; tried until somebody ends this process."""
        left = self.streams
        while left := [stream for stream in left if not stream.tend(everything=True)]:
            time.sleep(POLL_S)


def main(url: str) -> None:
    """Serve until the end of standard input."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no answer
    server = Server(url)
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def give_up() -> None:
        print(f"llmops: {url}: the last output could not be stored in {FLUSH_S:.0f} s", file=sys.stderr, flush=True)
        leave()

    def leave() -> None:
        if server.spool is not None:
            shutil.rmtree(server.spool, ignore_errors=True)
        os._exit(0)

    def read() -> None:
        for line in sys.stdin.buffer:
            requests.put(json.loads(line))
        threading.Timer(FLUSH_S, give_up).start()
        requests.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            request = requests.get(timeout=POLL_S if server.streams else None)
        except queue.Empty:
            for stream in server.streams:
                stream.tend()
            continue
        if request is None:
            server.flush()
            leave()
        else:
            answer = server.answer(request)
            if "id" in request:
                answers.write(json.dumps({**answer, "id": request["id"]}).encode() + b"\n")
            elif "error" in answer:
                print(f"llmops: {answer['error']}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
