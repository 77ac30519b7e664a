"""What completion knows, how it keeps it, and what it costs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmops.cli import complete_index, complete_names
from llmops.cli.complete import complete, split
from llmops.cli.main import VERBS
from llmops.config.errors import schema_keys
from tests.comfort.conftest import TREE, add

BREAKS = " \t\n\"'@><=;|&(:"
CPU_S = 0.15  # of a TAB, interpreter included: measured 0.09 s


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOPS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "completion"


SPLIT = [
    ("llmops logs two\\ w", (["logs"], "two w", 0, "")),
    ("llmops logs 'two w", (["logs"], "two w", 0, "'")),
    ("llmops logs \"it's", (["logs"], "it's", 0, '"')),
    ('llmops logs "a\\"b', (["logs"], 'a"b', 0, '"')),
    ("llmops submit model=7", (["submit"], "model=7", 6, "")),
    ("llmops submit 'model=7", (["submit"], "model=7", 0, "'")),
    ("llmops logs a:b:c", (["logs"], "a:b:c", 4, "")),
    ("llmops logs ", (["logs"], "", 0, "")),
    ("A=b /usr/bin/llmops logs x", (["logs"], "x", 0, "")),
    ("llmops logs 'a b' c\\", (["logs", "a b"], "c", 0, "")),
]


@pytest.mark.parametrize(("line", "expected"), SPLIT)
def test_a_line_is_split_as_bash_does(line: str, expected: tuple[list[str], str, int, str]) -> None:
    assert split(line, BREAKS) == expected


def words(before: str, current: str) -> list[str]:
    return [word for word, _ in complete(before.split(), current)[0] if word.startswith(current)]


def test_all_verbs_and_keys_are_known(shell_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPS_CACHE_DIR", shell_env["LLMOPS_CACHE_DIR"])
    assert words("", "") == list(VERBS)
    index = complete_index.load()
    sections = {key.rpartition(".")[0] for key in schema_keys()}
    assert index["keys"].keys() == {key for key in schema_keys() if "[]" not in key} - sections
    assert index["keys"]["train.optimizer"]["values"] == ["adamw", "adamw8bit", "muon"]
    assert "cluster.partition=" not in words("submit --backend k8s", "cluster.p")
    assert "cluster.partition=" in words("submit --backend slurm", "cluster.p")
    assert words("submit", "train") == ["train=", "train."]
    assert words("submit", "sweep.pruner.n") == ["sweep.pruner.name="]
    assert "--json" in words("status", "--j")
    assert words("logs --color", "a") == ["auto", "always"]
    assert complete(["nonsense"], "") == ([], "files")


def test_the_index_is_kept_and_made_anew_when_it_must(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = complete_index.load()
    kept = cache / "index.json"
    assert json.loads(kept.read_text()) == first
    made: list[int] = []
    build = complete_index.build
    monkeypatch.setattr(complete_index, "build", lambda: made.append(1) or build())
    assert complete_index.load() == first
    assert not made
    kept.write_text("half a fi")
    assert complete_index.load() == first
    monkeypatch.setattr(complete_index, "_stamp", lambda: "another program")
    assert complete_index.load()["stamp"] == "another program"
    assert len(made) == 2
    monkeypatch.setenv("LLMOPS_CACHE_DIR", "/proc/nowhere")  # a cache that cannot be written costs time alone
    assert complete_index.load()["keys"] == first["keys"]


def test_new_runs_are_named_and_old_ones_are_not_read_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    old = add(root, "old", 1.0)
    assert complete_names.names("run", str(root), "") == [("old", old)]
    new = add(root, "new", 2.0)
    (root / old / "run.json").unlink()
    assert complete_names.names("run", str(root), "") == [("new", new), ("old", old)]
    damaged = add(root, "bad\x1bname", 3.0)
    assert complete_names.names("run", str(root), "bad") == [(new, "new"), (old, "old")]
    (root / damaged / "run.json").write_text("[]")
    assert [name for name, _ in complete_names.names("any", f"file://{root}", "")] == ["new", "old"]
    assert complete_names.names("run", str(tmp_path / "none"), "") == []


def test_names_in_an_object_store_come_from_the_last_look(cache: Path, s3_url: str) -> None:
    url = f"{s3_url}/runs"
    add(url, "far away", 1.0)
    assert complete_names.names("run", url, "") == []  # nobody has looked yet; somebody does now
    deadline = time.monotonic() + 90
    while not (found := complete_names.names("run", url, "")) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert [name for name, _ in found] == ["far away"]


def test_a_tab_imports_next_to_nothing_and_is_quick(shell_env: dict[str, str]) -> None:
    code = (
        "import sys; from llmops.cli.main import entry\n"
        "try: entry()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'yaml', 'msgspec', 'rich', 'fsspec', 'llmops.config.schema'}\n"
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    took = []
    for line in ("llmops submit train.l", "llmops submit model=", "llmops logs ") * 3:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, "__complete", "bash", line, BREAKS],
            env={**os.environ, **shell_env},
            cwd=TREE,
            capture_output=True,
            text=True,
            timeout=60,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stderr.strip() == ""
        assert len(done.stdout.splitlines()) > 3
    assert min(took) < CPU_S, took  # of processor time: others may keep the machine busy
