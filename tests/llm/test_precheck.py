"""Data that cannot be trained on is refused before anything is queued."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.data.precheck import check_sources
from llm.utils.config import ConfigError
from llm.utils.storage import open_storage
from llmops.config.compose import load_config
from tests.llm.datasets import documents, make


@pytest.mark.parametrize(
    ("place", "changes", "words"),
    [
        ("embedded:shakespeare", ["model.vocab_size=100"], r"model\.vocab_size=100 is smaller than the 256 tokens"),
        ("{}/data", [], r"model\.vocab_size=256 is smaller than the 50000 tokens"),
        ("{}/data", ["model.vocab_size=50000", "train.seq_len=64"], "packed for sequences of 128: set train"),
        ("{}", [], "is a folder without index.json"),
        ("{}/empty.txt", [], "is empty"),
    ],
)
def test_it_is_refused(tmp_path: Path, place: str, changes: list[str], words: str) -> None:
    make(open_storage(str(tmp_path / "data")), documents(50), row=129)
    (tmp_path / "empty.txt").touch()
    config = load_config(["recipe=tiny", f"data.source={place.format(tmp_path)}", *changes]).config
    with pytest.raises(ConfigError, match=words):
        check_sources(config)
