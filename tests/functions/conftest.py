"""Where functions run in these tests: a run store and a home of their own, in this tree without snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import llmops

FAST = ("code.enabled=false", "retry.backoff_s=0.1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's data folder, with their key; set for the whole module."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        patch.setenv("LLMOPS_RUNS_URL", str(folder / "runs"))
        yield folder


@pytest.fixture(scope="module")
def here(home: Path) -> llmops.Executor:
    """This machine."""
    return llmops.Executor(FAST)
