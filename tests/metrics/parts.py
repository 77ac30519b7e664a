"""Real Prometheus and Pushgateway, Debian's, each on a free loopback port with a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_ports

PACKAGES = ("prometheus", "prometheus-pushgateway")
TREE = Path(__file__).parents[2]
READY_S = 90.0
# What asks before a package starts its service. The tests start what they need, where they need it.
POLICY = Path("/usr/sbin/policy-rc.d")


def install() -> None:
    """Both packages, installed first where they are missing. Fails where they cannot be."""
    wanted = ("prometheus", "promtool", "prometheus-pushgateway")
    if all(shutil.which(name) for name in wanted):
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        made = not POLICY.exists()
        if made:
            POLICY.write_text("#!/bin/sh\nexit 101\n")
            POLICY.chmod(0o755)
        try:
            subprocess.run(["apt-get", "update", "--quiet"], check=False, capture_output=True, timeout=300)
            command = ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *PACKAGES]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
        finally:
            if made:
                POLICY.unlink()
        if done.returncode:
            pytest.fail(f"{' '.join(command)}: {done.stderr[-1000:]}", pytrace=False)
    if not all(shutil.which(name) for name in wanted):
        pytest.fail(f"no Prometheus for the tests: apt-get install {' '.join(PACKAGES)}", pytrace=False)


def promtool(*arguments: str, text: bytes | None = None) -> str:
    """What promtool says; it must find nothing wrong."""
    install()
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, timeout=60)
    said = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 0, said
    return said


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        data: bytes = answer.read()
        return data


def until(condition: Callable[[], Any], what: str, seconds: float = READY_S) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The vector that an instant query returns."""
        try:
            answer = json.loads(get(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from error
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def targets(self) -> list[dict[str, Any]]:
        """Those that are scraped."""
        found: list[dict[str, Any]] = json.loads(get(f"{self.url}/api/v1/targets"))["data"]["activeTargets"]
        return found


@contextmanager
def prometheus(folder: Path, config: str) -> Iterator[Prometheus]:
    """Started with ``config``; ended, with its data, at the end."""
    (port,) = free_ports(1)
    (folder / "prometheus.yml").write_text(config)
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with _server(command, folder / "prometheus.log", f"http://127.0.0.1:{port}/-/ready"):
        yield Prometheus(f"http://127.0.0.1:{port}")


@contextmanager
def pushgateway(folder: Path) -> Iterator[str]:
    """Its URL."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    # Debian's keeps what was pushed in /var/lib unless it is told otherwise.
    command = [
        "prometheus-pushgateway",
        f"--web.listen-address=127.0.0.1:{port}",
        f"--persistence.file={folder}/pushed",
    ]
    with _server(command, folder / "gateway.log", f"{url}/-/ready"):
        yield url


@contextmanager
def _server(command: list[str], log: Path, ready: str) -> Iterator[None]:
    install()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            get(ready)
        except OSError:
            return False
        return True

    try:
        until(answers, f"{command[0]} to be ready")
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def llmops_metrics(env: dict[str, str], *arguments: str) -> Iterator[str]:
    """``llmops metrics`` on a free port; its URL."""
    import sys

    command = [sys.executable, "-m", "llmops", "metrics", "--port", "0", "--interval", "1", *arguments]
    process = subprocess.Popen(command, env=env, cwd=TREE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield line.split("/metrics", 1)[0].removeprefix("serving ")
    finally:
        process.terminate()
        assert process.wait(20) == 0
        assert process.stdout is not None
        process.stdout.close()
