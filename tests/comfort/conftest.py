"""Runs and a study that are only names, and the command as a shell finds it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from llmops.cli import complete_index
from llmops.runs import records

TREE = Path(__file__).parents[2]
NAMES = ("base", "two words", "col:on", "it's", "größe", "a=b", "st*r $x")


def add(root: Path | str, name: str, created: float = 0.0) -> str:
    """A run that was never submitted; its id."""
    record = records.RunRecord(
        id=records.new_run_id(name, created),
        name=name,
        owner="me",
        host="here",
        created=created,
        backend="local",
        kind="command",
        command=["true"],
        nodes=1,
        ranks_per_node=1,
    )
    records.create_run(str(root), record, b"{}")
    return record.id


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run store with runs of awkward names, and a study."""
    root = tmp_path_factory.mktemp("named") / "runs"
    for number, name in enumerate(NAMES):
        add(root, name, float(number))
    study = root / records.study_id(records.new_run_id("lr grid", 99.0))
    study.mkdir()
    (study / "study.json").write_text(json.dumps({"name": "lr grid"}))
    return root


@pytest.fixture(scope="session")
def shell_env(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which ``llmops`` is this tree's, with an index that is made already."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "bin").mkdir()
    command = folder / "bin" / "llmops"
    command.write_text(f"#!{sys.executable}\nfrom llmops.cli.main import entry\n\nentry()\n")
    command.chmod(0o755)
    (folder / "conf" / "model").mkdir(parents=True)
    (folder / "conf" / "model" / "ours.yaml").write_text("name: ours\n")
    env = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(TREE),
        "LLMOPS_RUNS_URL": str(runs),
        "LLMOPS_CACHE_DIR": str(folder / "cache"),
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TERM": "xterm",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMOPS_CACHE_DIR", env["LLMOPS_CACHE_DIR"])
        complete_index.load()
    return env
