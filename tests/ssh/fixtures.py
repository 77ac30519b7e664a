"""A host to log in to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ssh.sshd import Sshd


@pytest.fixture(scope="session")
def session_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """One for all tests that do it no harm."""
    daemon = Sshd(tmp_path_factory.mktemp("sshd"))
    yield daemon
    daemon.stop()


@pytest.fixture
def sshd(session_sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    """A host called ``login`` in the user's ssh configuration."""
    monkeypatch.setenv("LLMOPS_SSH_CONFIG", str(session_sshd.config))
    return session_sshd


@pytest.fixture
def ssh_url(sshd: Sshd, tmp_path: Path) -> str:
    """An empty run store on that host."""
    return f"ssh://{sshd.name}{tmp_path}/runs"
