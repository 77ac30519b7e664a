"""``llmops diff`` and ``clone`` on real runs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llm.tools import compare_runs
from llmops.config.compose import load_config
from llmops.config.recompose import changed
from llmops.config.schema import SlurmCluster
from llmops.monitor.difference import rows
from llmops.runs.records import load_run
from llmops.runs.store import open_store
from tests.comfort.conftest import add
from tests.launcher.harness import LLMOPS, Launcher

SHORT = (
    "train.max_steps=4",
    "train.warmup_steps=1",
    "checkpoint.every_steps=2",
    "eval.batches=1",
    "eval.sample_prompts=[]",
)
QUICK = ("retry.backoff_s=0.1", "retry.max_no_progress=1")


class Project:
    """A folder with a program, and runs of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launcher = Launcher(folder / "runs", "local")
        (folder / "work").mkdir()

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*LLMOPS, *arguments],
            env={**self.launcher.env, "COLUMNS": "80"},
            cwd=self.folder / "work",
            text=True,
            capture_output=True,
            timeout=240,
        )

    def ok(self, *arguments: str) -> str:
        done = self.call(*arguments)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def id_of(self, output: str) -> str:
        return output.split()[1]

    def diff(self, left: str, right: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ok("diff", left, right, "--json"))
        assert found["problems"] == []
        return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three runs of a program, whose code changed after the first; the third is a clone with ``--code``."""
    made = Project(tmp_path_factory.mktemp("project"))
    work = made.folder / "work"
    (work / "say.sh").write_text("echo one\n")
    (work / "old.txt").touch()
    made.first = made.id_of(made.ok("submit", *QUICK, "--name", "first", "--follow", "--", "sh", "say.sh"))
    (work / "say.sh").write_text("echo two\n")
    (work / "old.txt").rename(work / "new.txt")
    out = made.ok("clone", "first", "env.GREETING=hello", "--follow")
    assert " two\n" in out
    made.second = made.id_of(out)
    out = made.ok("clone", "first", "--code", "--name", "third", "--follow")
    assert " one\n" in out
    made.third = made.id_of(out)
    return made


def record(project: Project, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project.folder / "runs" / run_id / "run.json").read_text())
    return found


def test_a_clone_is_a_new_run_that_says_where_it_is_from(project: Project) -> None:
    first, second, third = (record(project, each) for each in (project.first, project.second, project.third))
    assert [each["cloned_from"] for each in (first, second, third)] == [None, project.first, project.first]
    assert [each["name"] for each in (first, second, third)] == ["first", "first-clone", "third"]
    assert [each["parent"] for each in (first, second, third)] == [None, None, None]
    assert second["code"]["sha256"] != first["code"]["sha256"] == third["code"]["sha256"]
    (status,) = json.loads(project.ok("status", "--json", project.second))
    assert status["cloned_from"] == project.first
    assert status["state"] == "finished"
    run = load_run(open_store(project.folder / "runs" / project.second))
    assert run.attempts[0].start.resume_from is None


def test_diff_names_keys_and_files(project: Project) -> None:
    found = project.diff(project.first, project.second)
    assert {"key": "env.GREETING", "left": None, "right": "hello"} in found["config"]
    assert {row["key"] for row in found["config"]} == {"name", "env.GREETING"}
    assert found["code"]["same"] is False
    assert found["code"]["files"] == [
        {"file": "new.txt", "how": "right"},
        {"file": "old.txt", "how": "left"},
        {"file": "say.sh", "how": "changed"},
    ]
    same = project.diff(project.first, project.third)
    assert same["code"]["same"] is True
    assert same["code"]["files"] == []
    assert same["environment"] == same["data"] == []


def test_diff_is_read_at_80_columns(project: Project) -> None:
    shown = project.ok("diff", project.first, project.second)
    assert "env.GREETING" in shown
    assert re.search(r"changed +say\.sh", shown)
    assert re.search(r"left only +old\.txt", shown)
    assert "data: nothing that is recorded differs" in shown


def test_an_archive_that_is_gone_and_a_damaged_one(project: Project) -> None:
    sha256 = record(project, project.second)["code"]["sha256"]
    archive = project.folder / "runs" / "code" / f"{sha256}.tar.gz"
    kept = archive.read_bytes()
    try:
        archive.unlink()
        assert project.diff(project.first, project.second)["code"]["files"] is None
        refused = project.call("clone", project.second, "--code")
        assert refused.returncode == 2
        assert "is gone; leave --code out" in refused.stderr
        archive.write_bytes(kept[: len(kept) // 2])
        found = json.loads(project.ok("diff", project.first, project.second, "--json"))
        assert "is damaged" in found["problems"][0]
        assert found["code"]["right"]["sha256"] == sha256
    finally:
        archive.write_bytes(kept)


def test_runs_of_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = Project(tmp_path)
    config = ("recipe=tiny", "cluster.ranks_per_node=1", "dist=single", *SHORT)
    first = project.id_of(project.ok("submit", *config, "--name", "base", "--follow"))
    second = project.id_of(project.ok("clone", "base", "train.lr=1e-3", "train.seed=1", "--follow"))
    found = project.diff(first, second)
    changed = {row["key"]: (row["left"], row["right"]) for row in found["config"]}
    assert changed == {"name": ("base", "base-clone"), "train.lr": (0.003, 0.001), "train.seed": (0, 1)}
    assert found["environment"] == []
    assert found["data"] == [{"key": "train.seed", "left": 0, "right": 1}]
    results = {row["key"]: (row["left"], row["right"]) for row in found["metrics"]}
    assert results["step"] == results["committed step"] == (4, 4)
    assert results["loss"][0] != results["loss"][1]
    assert all(results["held-out loss"])
    assert compare_runs.main([str(tmp_path / "runs" / each) for each in (first, second)]) == 1
    assert "machines: nothing that is recorded differs" in capsys.readouterr().out
    # It has begun anew: as many steps as the first, none of them the first's.
    steps = [
        json.loads(line) for line in (tmp_path / "runs" / second / "metrics" / "0000").joinpath("000000.jsonl").open()
    ]
    assert [each["step"] for each in steps if each.get("kind") == "step"] == [1, 2, 3, 4]


def test_a_dry_run_writes_nothing(project: Project) -> None:
    before = sorted(path.name for path in (project.folder / "runs").iterdir())
    shown = project.ok("clone", "third", "model=7b", "train.seq_len=256", "--name", "large", "--dry-run")
    assert "large" in shown
    assert sorted(path.name for path in (project.folder / "runs").iterdir()) == before


def test_groups_replace_sections_before_keys_change_them() -> None:
    text = load_config(["recipe=tiny"]).yaml_text
    config = changed(text, ["cluster.partition=gpu", "cluster=slurm", "dist=fsdp_tp", "dist.tp=1"], "moved").config
    assert isinstance(config.cluster, SlurmCluster)
    assert (config.cluster.partition, config.name, config.dist.tp) == ("gpu", "moved", 1)
    assert config.train.max_steps == 200  # of the old run


REFUSED = [
    (("diff", "first", "nowhere"), "there is no run 'nowhere'"),
    (("diff", "first"), "the following arguments are required: RUN"),
    (("diff", "first", "grid"), "grid is a study of many runs"),
    (("clone", "grid"), "grid is a study of many runs"),
    (("clone", "frist"), "did you mean first"),
    (("clone", "third", "train.lrr=1"), "there is no key train.lrr; did you mean train.lr?"),
    (("clone", "third", "train.lr=0"), "train.lr=0 does not fit: expected a number > 0"),
    (("clone", "third", "train.lr=1,2"), "a clone takes key=value only"),
    (("clone", "third", "model=7B"), "group model has no 7B.yaml; did you mean 7b?"),
    (("clone", "third", "recipe=tiny"), "has taken in its recipe"),
    (("clone", "third", "train={lr: 1}"), "group train has no"),
    (("clone", "third", "lr"), "is not of the form key=value"),
    (("clone", "third", "--backend", "slrum"), "did you mean slurm?"),
    (("clone", "third", "--name", " "), "use printable characters"),
    (("clone", "never"), "config.yaml is damaged"),
    (("clone", "never", "--code"), "config.yaml is damaged"),
    (("clone", "third", "code.enabled=false", "--dry-run", "--json"), "not allowed with argument"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED)
def test_bad_input_is_one_line(project: Project, arguments: tuple[str, ...], said: str) -> None:
    root = project.folder / "runs"
    study = root / "20260101-000000-grid-aaaa-sweep"
    if not study.exists():
        study.mkdir()
        (study / "study.json").write_text('{"name": "grid"}')
        never = add(root, "never", 1.0)
        (root / never / "config.yaml").write_text("- no keys\n")
    done = project.call(*arguments)
    assert done.returncode == 2, done.stdout
    assert re.fullmatch(r"llmops: error: [^\n]+\n", done.stderr), done.stderr
    assert said in done.stderr


def test_rows_keep_the_order_and_tell_null_from_absent() -> None:
    assert rows({"b": 1, "a": 2, "n": None}, {"a": 2, "b": 3, "z": 4, "n": None}) == [
        {"key": "b", "left": 1, "right": 3},
        {"key": "z", "left": None, "right": 4},
    ]
    assert rows({"a": None}, {}) == [{"key": "a", "left": None, "right": None}]
