"""Scores through our model are those through the harness's own backend for transformers, and do not depend on how."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from llm.eval.__main__ import main
from llm.eval.suite import find
from llm.utils.config import EvalConfig
from tests.eval.conftest import scores

TASKS = ["local_choice", "local_passages", "local_echo"]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def theirs(folder: Path, limit: int) -> dict[str, Any]:
    """What the harness's own backend says of the exported weights."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    suites = find(EvalConfig(tasks=TASKS))
    tasks = [task for suite in suites.values() for task in suite.loaded["tasks"].values()]
    model = HFLM(pretrained=str(folder), tokenizer=str(folder), batch_size=4, device="cpu", dtype="float32")
    found = simple_evaluate(model=model, tasks=tasks, limit=limit, bootstrap_iters=0)
    assert found is not None
    return dict(found)


def test_scores_equal_those_of_the_harness_backend(run: Path, exported: Path) -> None:
    assert main(["--run-url", str(run), "--limit", "12", "--log-samples"]) == 0
    ours, reference = scores(run), theirs(exported, 12)
    for task in TASKS:
        own = ours[f"{task}@60"]
        for given, value in reference["results"][task].items():
            metric, _, kind = given.partition(",")
            if kind == "none" and not metric.endswith("_stderr"):
                assert own["scores"][metric] == pytest.approx(value, rel=1e-4), (task, metric)
        assert own["examples"] == 12
        assert own["checksums"].keys() >= {"manifest.json", "tokenizer", f"{task.removeprefix('local_')}.yaml"}
    # Each answer, too: equal scores could be chance.
    import json

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
