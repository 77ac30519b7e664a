"""A real server over a model that nobody has trained."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from llm.data.streaming import TOKENIZER
from tests.data.tokenizer_files import json_file, json_tokenizer
from tests.inference.models import save_run
from tests.llm.test_hf_families import ours, shape

KEY = "a secret"
LIMIT_S = 120.0


def make_run(folder: Path, **changes: Any) -> Path:
    """A run's directory: random weights, and a tokenizer with ChatML's tokens."""
    tokenizer = json_tokenizer("llama3")
    model = ours(shape(**{"vocab_size": tokenizer.vocab_size, "max_seq_len": 512, **changes}))
    save_run(folder, model)
    (folder / TOKENIZER).mkdir()
    (folder / TOKENIZER / "tokenizer.json").write_bytes(json_file("llama3"))
    return folder


class ServerProcess:
    """``python -m llm.inference.server`` on a free port."""

    def __init__(self, run: Path, *flags: str, control: Path | None = None, **environment: str) -> None:
        if control is not None:
            control.mkdir()
            environment["LLMOPS_CONTROL_DIR"] = str(control)
        command = [sys.executable, "-m", "llm.inference.server", "--run-url", str(run), *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )
        assert self.process.stdout is not None
        patience = threading.Timer(LIMIT_S, self.process.kill)
        patience.start()
        line = self.process.stdout.readline()
        patience.cancel()
        found = re.search(r"http://[^/]+:(\d+)", line)
        assert found, f"it said: {line!r}"
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code, after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(LIMIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def metrics(self) -> dict[str, float]:
        """What ``/metrics`` says."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=LIMIT_S) as answer:
            lines = answer.read().decode().splitlines()
        values = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in values}

    def threads(self) -> int:
        """How many it has."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def sockets(self) -> int:
        """How many it has open."""
        return sum(
            "socket:" in str(each.readlink())
            for each in Path(f"/proc/{self.process.pid}/fd").iterdir()
            if each.is_symlink()
        )

    def post(self, path: str, body: Any, key: str = KEY) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of an answer; ``body`` is JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
                return answer.status, json.loads(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read()), dict(error.headers)
