"""Fixtures of the tests that harm real ranks."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.ranks import Nursery


@pytest.fixture(scope="session")
def all_ranks() -> Iterator[Nursery]:
    """One process that has imported torch, and forks ranks."""
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def nursery(all_ranks: Nursery) -> Iterator[Nursery]:
    """Starts ranks that do not outlive the test."""
    yield all_ranks
    all_ranks.sweep()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MB."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as folder:
        yield folder


@pytest.fixture
def freezable_disk(tmp_path: Path) -> Iterator[Path]:
    """A real ext4 that :func:`frozen` can stop."""
    image = tmp_path / "image"
    with image.open("wb") as stream:
        stream.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    with mounted(tmp_path / "disk", "-o", "loop", str(image)) as folder:
        yield folder


@contextlib.contextmanager
def mounted(folder: Path, *what: str) -> Iterator[Path]:
    """Mount a file system. Skips the test for a user who may not; root may, and a build that cannot is broken."""
    folder.mkdir()
    done = subprocess.run(["mount", *what, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode and os.geteuid() == 0:
        pytest.fail(f"cannot mount a file system: {done.stderr.strip()}")
    if done.returncode:
        pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
