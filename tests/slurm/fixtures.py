"""The real SLURM for tests. Without it they fail; they are skipped only when LLMOPS_SKIP_SLURM=1 says so."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
            cluster.dev_cluster("up")
            cluster.dev_cluster("reset")
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            pytest.fail(f"no SLURM for the tests (LLMOPS_SKIP_SLURM=1 skips them): {error}", pytrace=False)
        yield Slurm(cluster.NODES, cluster.CPUS_PER_NODE, kill_wait(), cluster.STATE_DIR / "log")
        cluster.dev_cluster("reset")


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


def kill_wait() -> int:
    for line in cluster.run(["scontrol", "show", "config"]).stdout.splitlines():
        if line.startswith("KillWait "):
            return int(line.split("=")[1].split()[0])
    raise AssertionError("scontrol show config does not name KillWait")
