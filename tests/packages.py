"""Real programs for the tests: Debian's packages, installed where they are missing. None is ever skipped."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

LOCK = Path("/var/lock/llmops-apt")  # also slurm/dev-cluster.sh takes it: apt-get refuses to run twice at a time


def programs(*names: str, packages: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the programs, from the packages if need be. Fails where they cannot be had."""
    found = [shutil.which(name) for name in names]
    if all(found):
        return tuple(path for path in found if path)
    if os.geteuid() == 0 and shutil.which("apt-get"):
        with LOCK.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not all(shutil.which(name) for name in names):  # else somebody was faster
                _install(packages)
        found = [shutil.which(name) for name in names]
    if not all(found):
        pytest.fail(f"missing for the tests: apt-get install {' '.join(packages)}", pytrace=False)
    return tuple(path for path in found if path)


def _install(packages: tuple[str, ...]) -> None:
    # Debian starts the services that it installs, on their usual ports; the tests start their own.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    subprocess.run(["apt-get", "update", "--quiet"], check=False, capture_output=True, timeout=300)
    command = ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *packages]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900, env=environment)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}: {done.stderr[-1000:]}", pytrace=False)
