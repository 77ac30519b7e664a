"""A small trained run with a tokenizer of its own, and the same weights as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.eval.suite import quiet_harness
from llm.tools.convert import main as convert
from tests.data.preparing import jsonl, shakespeare
from tests.launcher.harness import Launcher
from tests.llm.harness import start, tiny

VOCABULARY = 320


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with commits of steps 20, 40 and 60; nothing may be written into it but by its copies."""
    from llm.tools.prepare_data import main as prepare

    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "text.jsonl").write_bytes(jsonl(text for text in shakespeare()[:800] if text))
    options = ["--input", str(folder / "text.jsonl"), "--output", str(folder / "data"), "--workers", "1"]
    assert prepare([*options, "--train-tokenizer", str(VOCABULARY), "--validation", "0.02"]) == 0
    config = tiny(
        model__vocab_size=VOCABULARY, model__tie_embeddings=False, train__max_steps=60, checkpoint__every_steps=20,
        data__source=str(folder / "data"), data__num_workers=0, eval__sample_prompts=[], eval__every_steps=0,
        eval__batches=1,
    )  # fmt: skip
    run = start(folder / "run", config, ranks=1)
    assert run.finish() == [0]
    return folder / "run"


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its newest weights, with the tokenizer, as transformers reads them."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert convert(["export", str(trained), str(folder), "--format", "hf"]) == 0
    return folder


@pytest.fixture(scope="session", autouse=True)
def harness() -> Iterator[None]:
    """lm-evaluation-harness as jobs use it."""
    with quiet_harness(hub=False):
        yield


def scores(run: Path) -> dict[str, dict[str, Any]]:
    """Results in a run directory, by task and step."""
    found = {}
    for path in sorted((run / "evals").glob("*.json")):
        result = yaml.safe_load(path.read_text())
        name = f"{result['task']}@{result['step']}"
        assert name not in found, "evaluated twice"
        found[name] = result
    return found


@pytest.fixture
def local(tmp_path: Path) -> Launcher:
    """A run store of its own on this machine."""
    return Launcher(tmp_path / "runs", "local")
