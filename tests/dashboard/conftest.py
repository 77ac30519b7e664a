"""A dashboard as a user starts it, and a browser that looks at it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from selenium.webdriver import Chrome

from tests.dashboard.team import Alive
from tests.launcher.harness import LLMOPS, TREE
from tests.sweep.browser import HEIGHT, WIDTH, chromium

READY_S = 30.0
WAIT_S = 20.0


@dataclass
class Served:
    """A running ``llmops dashboard``."""

    process: subprocess.Popen[str]
    printed: str  # the address, with its token
    said: list[str] = field(default_factory=list)  # on stderr

    @property
    def url(self) -> str:
        return self.printed.split("#")[0]

    @property
    def token(self) -> str | None:
        return self.printed.partition("#token=")[2] or None

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, what the answer holds, and its headers. ``_`` in a header's name stands for ``-``."""
        data = None if body is None else msgspec.json.encode(body)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, raw, got = answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            status, raw, got = error.code, error.read(), dict(error.headers)
        is_json = got.get("content-type") == "application/json"
        return status, msgspec.json.decode(raw) if is_json else raw.decode(), got

    def end(self, timeout: float = 10) -> int:
        """As a service manager ends it; its exit code."""
        self.process.terminate()
        return self.process.wait(timeout)


Serve = Callable[..., Served]


def until(condition: Callable[[], Any], what: str, timeout: float = WAIT_S) -> Any:
    """What the condition gives once it is true."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.05)
    return value


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts dashboards of a store, looking every second; ends them, which they must do without complaint."""
    started: list[tuple[Served, bool]] = []

    def start(runs_url: str, *arguments: str, quiet: bool = True, **env: str) -> Served:
        process = subprocess.Popen(
            [*LLMOPS, "dashboard", "--runs-url", runs_url, "--port", "0", "--interval", "1", *arguments],
            env={**os.environ, "PYTHONPATH": str(TREE), "LLMOPS_CACHE_DIR": str(tmp_path / "cache"), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        killer = threading.Timer(READY_S, process.kill)
        killer.start()
        served = Served(process, process.stdout.readline().strip())
        killer.cancel()
        threading.Thread(target=lambda: served.said.extend(process.stderr or ()), daemon=True).start()
        assert served.printed.startswith("http://"), process.stderr.read()
        started.append((served, quiet))
        return served

    yield start
    for served, quiet in started:
        if served.process.poll() is None:
            try:
                assert served.end() == 0
            finally:
                served.process.kill()
                served.process.wait()
        assert not quiet or served.said == []


@pytest.fixture
def alive() -> Iterator[Alive]:
    """What runs that are live have for a supervisor."""
    supervisor = Alive()
    yield supervisor
    supervisor.close()


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


def resize(browser: Chrome, width: int = WIDTH, height: int = HEIGHT) -> None:
    """As if the window were so large."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture
def browser(_chromium: Chrome, serve: Serve) -> Iterator[Chrome]:
    """At its usual size; it leaves before servers end. Whatever a test does, the page must not complain."""
    _chromium.get("about:blank")
    resize(_chromium)
    _chromium.get_log("browser")
    yield _chromium
    _chromium.get("about:blank")
    # A busy machine may take longer than the server waits for an answer; the page asks again.
    complaints = [each["message"] for each in _chromium.get_log("browser") if "504 (" not in each["message"]]
    assert complaints == []
