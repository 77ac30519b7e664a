from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmops.config.compose import load_config
from llmops.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of compositions of this test's own."""
    monkeypatch.setenv("LLMOPS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "config"


@pytest.fixture
def refused() -> Callable[..., str]:
    """The one line that refuses a configuration."""

    def refuse(*overrides: str, config_dir: Path | None = None) -> str:
        with pytest.raises(UserError) as caught:
            load_config(overrides, config_dir)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return refuse


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Path]:
    """A folder for ``--config-dir`` with the given files: ``own(cluster__site="...")``."""

    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / "own" / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "own"

    return write
