"""The follower as a process beside run directories that the tests write step by step."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmops.runs.records import RunRecord, create_run, load_run, trial_id
from llmops.runs.store import open_store
from llmops.sweep.follow import due
from llmops.sweep.model import Axis, Result
from llmops.sweep.optimizer import Optimizer
from llmops.sweep.records import Study, load_results, write_result
from tests.conftest import MadeRun
from tests.sweep.follow_study import make_study

GRID = (Axis(key="k", kind="choice", values=list(range(10))),)


class Trial(MadeRun):
    """A trial's run directory and its follower."""

    def __init__(self, study: Study, number: int, submission: int = 0) -> None:
        record = RunRecord(
            id=trial_id(study.id, number), name="t", owner="ada", host="h", created=1.0, backend="local", kind="llm",
            command=[], nodes=1, ranks_per_node=1, parent=study.id, params={"k": number},
        )  # fmt: skip
        super().__init__(create_run(f"{study.url}/trials", record, b"{}\n"))
        self.study, self.number = study, number
        self.submission(submission, backend="local")
        self.start(1, time=time.time())
        self.written: list[dict[str, Any]] = []

    def loss(self, step: int, value: float) -> None:
        self.written.append({"kind": "step", "step": step, "loss": value})
        data = "".join(json.dumps(each) + "\n" for each in self.written)
        self.store.put("metrics/0001/000000.jsonl", data.encode())

    def over(self, reason: str) -> None:
        self.end(1, reason, time=time.time())

    def follow(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "llmops.sweep.follow", "--study", self.study.url, "--trial", str(self.number)]
        command += ["--run", self.store.url, "--submission", "0"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def outcome(self) -> str:
        intent = self.load().submissions[-1].intent
        return intent.outcome if intent else ""

    def result(self) -> Result | None:
        return load_results(self.study.store).get(self.number)


@pytest.fixture
def followers() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that do not outlive the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def wait_for(there: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def close(process: subprocess.Popen[str]) -> str:
    """What the supervisor does at the end; what the follower said."""
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    return said


def study_with_history(url: str) -> Study:
    """Five good trials, which a median pruner compares with."""
    study = make_study(
        url, axes=GRID, objective="step/loss", sampler="random", report_every=10, pruner={"name": "median"}
    )
    optimizer = Optimizer.open(study)
    for trial in range(5):
        optimizer.ask(trial, {"k": trial})
        for step in range(10, 101, 10):
            optimizer.report(trial, step, 1.0 if step == 10 else 0.6)
        optimizer.tell(Result(trial=trial, outcome="complete", time=1.0, value=1.0))
    return study


def test_a_bad_trial_is_pruned_while_it_runs(tmp_path: Path, followers: list[subprocess.Popen[str]]) -> None:
    study = study_with_history(str(tmp_path))
    optimizer = Optimizer.open(study)
    optimizer.ask(7, {"k": 7})
    trial = Trial(study, 7)
    followers.append(trial.follow())
    for step in range(1, 20):
        trial.loss(step, 1.0)
    wait_for(lambda: optimizer._currents()[7].intermediate_values)
    trial.loss(20, 5.25)
    wait_for(trial.outcome, 5.0)
    intent = trial.load().submissions[-1].intent
    assert intent is not None
    assert (intent.outcome, intent.graceful, intent.by) == ("pruned", False, "sweep")
    assert "step/loss was 5.25 at step 20" in intent.reason
    trial.over("cancelled")
    assert close(followers[0]) == ""
    found = trial.result()
    assert found is not None
    assert (found.outcome, found.value, found.step, found.params) == ("pruned", 5.25, 20, {"k": 7})
    told = optimizer._currents()[7]
    assert (told.state.name, told.intermediate_values) == ("PRUNED", {10: 1.0, 20: 5.25})


def test_a_killed_follower_and_its_successor(tmp_path: Path, followers: list[subprocess.Popen[str]]) -> None:
    study = study_with_history(str(tmp_path))
    trial = Trial(study, 8)
    optimizer = Optimizer.open(study)
    optimizer.ask(8, {"k": 8})
    followers.append(trial.follow())
    for step in range(1, 26):
        trial.loss(step, 0.5)
    wait_for(lambda: optimizer._currents()[8].intermediate_values)
    followers[0].kill()
    followers.append(trial.follow())
    for step in range(26, 101):
        trial.loss(step, 0.25)
    trial.over("finished")
    assert close(followers[1]) == ""
    told = optimizer._currents()[8]
    assert sorted(told.intermediate_values) == list(range(10, 101, 10))
    assert (told.state.name, told.value) == ("COMPLETE", 0.25)
    before = trial.result()
    followers.append(trial.follow())  # a third has nothing to add
    assert close(followers[2]) == ""
    assert trial.result() == before
    assert len(list((tmp_path / study.id / "results").iterdir())) == 1


def test_signals_do_not_end_it_and_optuna_is_not_imported(
    tmp_path: Path, followers: list[subprocess.Popen[str]]
) -> None:
    study = make_study(str(tmp_path), axes=GRID, objective="step/loss", trial_minutes=1000.0)
    trial = Trial(study, 0)
    followers.append(trial.follow())
    trial.loss(1, 2.0)
    wait_for(lambda: ignores(followers[0].pid))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        followers[0].send_signal(number)
    time.sleep(1.5)  # a look or two
    assert followers[0].poll() is None
    # Optuna brings numpy, whose libraries would be mapped.
    assert "numpy" not in Path(f"/proc/{followers[0].pid}/maps").read_text()
    trial.over("finished")
    assert close(followers[0]) == ""
    found = trial.result()
    assert found is not None
    assert (found.outcome, found.value) == ("complete", 2.0)
    assert trial.outcome() == ""


def ignores(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    [mask] = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn")]
    return bool(mask & (1 << (signal.SIGHUP - 1)))


def test_nan_stops_a_trial(tmp_path: Path, followers: list[subprocess.Popen[str]]) -> None:
    study = make_study(str(tmp_path), axes=GRID, objective="step/loss", sampler="tpe")
    Optimizer.open(study).ask(0, {"k": 0})
    trial = Trial(study, 0)
    trial.loss(1, 2.0)
    trial.loss(2, math.nan)
    followers.append(trial.follow())
    wait_for(trial.outcome)
    trial.over("cancelled")
    assert close(followers[0]) == ""
    found = trial.result()
    assert found is not None
    assert (found.outcome, found.value) == ("nan", None)
    assert found.reason == "step/loss was nan at step 2"
    [told] = Optimizer.open(study)._currents().values()
    assert (told.state.name, told.value) == ("COMPLETE", math.inf)


def test_a_trial_has_so_many_minutes_over_all_attempts(tmp_path: Path, followers: list[subprocess.Popen[str]]) -> None:
    study = make_study(str(tmp_path), axes=GRID, objective="step/loss", trial_minutes=10.0)
    trial = Trial(study, 0)
    now = time.time()
    trial.start(1, time=now - 5000)
    trial.end(1, "preempted", then="requeue", time=now - 5000 + 599)
    trial.loss(5, 1.5)
    trial.start(2, time=now, resume="checkpoints/step_00000005/0001-0")
    followers.append(trial.follow())
    wait_for(trial.outcome)
    trial.end(2, "cancelled", time=time.time())
    close(followers[0])
    found = trial.result()
    assert found is not None
    assert (found.outcome, found.value, found.attempts) == ("timeout", 1.5, 2)
    assert 600 <= found.seconds < 630
    assert "of 10 minutes" in found.reason


def test_what_is_not_over_has_no_result(tmp_path: Path, followers: list[subprocess.Popen[str]]) -> None:
    study = make_study(str(tmp_path), axes=GRID, objective="step/loss")
    trial = Trial(study, 0)
    trial.end(1, "preempted", then="requeue", time=time.time())
    followers.append(trial.follow())
    close(followers[0])
    assert trial.result() is None


def test_a_store_that_is_away_is_waited_for(tmp_path: Path, followers: list[subprocess.Popen[str]]) -> None:
    study = make_study(str(tmp_path / "runs"), axes=GRID, objective="step/loss")
    trial = Trial(study, 0)
    (tmp_path / "runs").rename(tmp_path / "away")
    followers.append(trial.follow())
    time.sleep(2.5)
    assert followers[0].poll() is None
    (tmp_path / "away").rename(tmp_path / "runs")
    trial.loss(1, math.inf)
    wait_for(trial.outcome)
    trial.over("cancelled")
    said = close(followers[0]).splitlines()
    assert len(said) == 2
    assert "is not told how this trial goes for now" in said[0]
    assert "is told again" in said[1]


def test_an_object_store(s3_url: str, followers: list[subprocess.Popen[str]]) -> None:
    study = make_study(s3_url, axes=GRID, objective="step/loss", sampler="tpe", pruner={"name": "asha"})
    Optimizer.open(study).ask(0, {"k": 0})
    trial = Trial(study, 0)
    trial.loss(2, 1.0)
    followers.append(trial.follow())
    trial.over("finished")
    assert close(followers[0]) == ""
    found = trial.result()
    assert found is not None
    assert (found.outcome, found.value) == ("complete", 1.0)
    [told] = Optimizer.open(study)._currents().values()
    assert (told.state.name, told.value, told.intermediate_values) == ("COMPLETE", 1.0, {2: 1.0})
    assert not write_result(study.store, found)
    assert load_run(open_store(trial.store.url)).submissions[0].intent is None


def test_which_values_a_pruner_sees() -> None:
    dense = [(step, float(step)) for step in range(1, 26)]
    assert [step for step, _ in due(dense, 10, -1)] == [10, 20]
    assert [step for step, _ in due(dense, 10, 10)] == [20]
    sparse = [(50, 1.0), (100, 0.5), (130, 0.4)]
    assert list(due(sparse, 10, -1)) == sparse
    odd = [(step, 1.0) for step in range(1, 40, 3)]
    assert [step for step, _ in due(odd, 10, -1)] == [10, 22, 34]
    # What was seen early is what is seen in the end.
    assert [step for step, _ in due(odd[:5], 10, -1)] == [10]
