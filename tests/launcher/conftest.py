"""Fixtures for runs on this machine."""

from __future__ import annotations

import pytest

from tests.launcher.harness import TINY, Launcher


@pytest.fixture
def local(tmp_path):
    """A run store of its own on this machine."""
    return Launcher(tmp_path / "runs", "local")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Losses of the tiny run that nobody disturbed: what every other one must equal, bit by bit."""
    launcher = Launcher(tmp_path_factory.mktemp("undisturbed"), "local")
    run_id = launcher.submit(*TINY, "--name", "undisturbed")
    launcher.wait(run_id, "finished")
    losses = launcher.losses(run_id)
    assert list(losses) == list(range(1, 61))
    return losses
