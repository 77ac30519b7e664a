"""Fixtures for runs on this machine."""

from __future__ import annotations

import pytest

from tests.launcher.harness import Launcher


@pytest.fixture
def local(tmp_path):
    """A run store of its own on this machine."""
    return Launcher(tmp_path / "runs", "local")
