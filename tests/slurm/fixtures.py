"""The real SLURM for tests. Without it they fail; they are skipped only when LLMOPS_SKIP_SLURM=1 says so."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import cluster


@dataclass(frozen=True)
class Slurm:
    """The running development cluster."""

    nodes: tuple[str, ...]
    cpus_per_node: int
    kill_wait: int
    """Seconds between TERM and KILL."""
    log_dir: Path


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The cluster, healthy and without jobs; jobs left over are cancelled at the end."""
    if os.environ.get("LLMOPS_SKIP_SLURM") == "1":
        pytest.skip("LLMOPS_SKIP_SLURM=1")
    with only_session():
        try:
            cluster.dev_cluster("up", **cluster.STOCK)
            cluster.dev_cluster("reset")
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            pytest.fail(f"no SLURM for the tests (LLMOPS_SKIP_SLURM=1 skips them): {error}", pytrace=False)
        kill_wait = int(cluster.show_config("KillWait").split()[0])
        yield Slurm(cluster.NODES, cluster.CPUS_PER_NODE, kill_wait, cluster.STATE_DIR / "log")
        cluster.dev_cluster("up", **cluster.STOCK)
        cluster.dev_cluster("reset")


@pytest.fixture(scope="module")
def proctrack(slurm: Slurm, request: pytest.FixtureRequest) -> str:
    """The process tracker that the cluster has: each of `trackers()` in turn for tests marked `signals`."""
    tracker: str = getattr(request, "param", cluster.PROCTRACK)
    if cluster.proctrack() != tracker:
        try:
            cluster.dev_cluster("up", LLMOPS_PROCTRACK=tracker)
        except AssertionError as error:
            if tracker != "cgroup" or Path("/sys/fs/cgroup/freezer").is_dir():
                raise
            cluster.dev_cluster("up", **cluster.STOCK)
            pytest.skip(f"proctrack/cgroup does not start here, on cgroup v2: {error}")
        cluster.dev_cluster("reset")
    return tracker


def trackers() -> list[str]:
    """The process trackers that tests marked `signals` run under."""
    if (
        os.environ.get("LLMOPS_SKIP_SLURM") == "1"
        or os.environ.get("LLMOPS_THOROUGH") != "1"
        or cluster.cgroup_problem()
    ):
        return [cluster.PROCTRACK]
    return sorted(["cgroup", "linuxproc"], key=lambda tracker: tracker != cluster.PROCTRACK)


Submit = Callable[..., str]


@pytest.fixture
def submit(slurm: Slurm) -> Iterator[Submit]:
    """`cluster.submit`, whose jobs end with the test."""
    submitted: list[str] = []

    def submit(script: str, *options: str, **more: Any) -> str:
        submitted.append(cluster.submit(script, *options, **more))
        return submitted[-1]

    yield submit
    if submitted:
        cluster.run(["scancel", *submitted], check=False)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that jobs of every user can write to (tmp_path belongs to whoever runs pytest)."""
    with tempfile.TemporaryDirectory(prefix="llmops-slurm-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


@contextlib.contextmanager
def only_session(timeout: float = 1800) -> Iterator[None]:
    """One pytest session at a time: tests preempt jobs, down nodes and stop daemons."""
    with (Path(tempfile.gettempdir()) / "llmops-slurm-tests.lock").open("w") as lock:

        def locked() -> bool:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        cluster.wait_for(locked, timeout, f"another pytest session to release {lock.name}")
        yield
