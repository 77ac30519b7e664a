"""Pods of a trial of several nodes: node 0's makes the trial's run, and the others wait for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmops import agent_zip
from llmops.agent import trial as elements
from llmops.agent.trial import NothingToDo, open_trial

STUDY = "20260101-000000-lr-abcd-sweep"


def put(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_study(folder: Path, workload: str = "job", wait_s: float = 60.0) -> Path:
    """A study of one trial, without what makes its run."""
    options = {"workload": workload, "wait_s": wait_s}
    put(
        folder / "job/0000/spec.json",
        {"run_id": STUDY, "array": {"trials": [[0, 0]]}, "secrets": [], "options": options},
    )
    return folder


class Pod:
    """The supervisor in the pod of node 1."""

    def __init__(self, study: Path, **environment: str) -> None:
        agent = study / "agent.pyz"
        agent.write_bytes(agent_zip.build()[1])
        command = [sys.executable, str(agent), "k8s", "--study", str(study), "--submission", "0"]
        places = {"LLMOPS_FIRST_NODE": "0", "LLMOPS_REPLICA": "1", "LLMOPS_ELEMENT": "0", **environment}
        self.log = study / "pod.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **places}, stdout=log, stderr=log)

    def until_waiting(self) -> None:
        deadline = time.monotonic() + 30
        while "waiting for node 0's pod" not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def ends(self) -> int:
        return self.process.wait(20)


@pytest.fixture
def started() -> Iterator[list[Pod]]:
    pods: list[Pod] = []
    yield pods
    for each in pods:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@pytest.mark.parametrize(("workload", "code"), [("jobset", 75), ("pytorchjob", 143)])
def test_a_pod_that_is_told_to_go_while_it_waits_comes_back(
    started: list[Pod], tmp_path: Path, workload: str, code: int
) -> None:
    started.append(Pod(write_study(tmp_path, workload)))
    started[0].until_waiting()
    started[0].process.send_signal(signal.SIGTERM)
    assert started[0].ends() == code


def test_it_does_not_wait_for_ever(started: list[Pod], tmp_path: Path) -> None:
    started.append(Pod(write_study(tmp_path, wait_s=1.0)))
    assert started[0].ends() == 75
    assert "made no run of trial 0 within 1 s" in started[0].log.read_text()


def test_a_study_that_is_cancelled_ends_the_wait(started: list[Pod], tmp_path: Path) -> None:
    started.append(Pod(write_study(tmp_path)))
    started[0].until_waiting()
    put(tmp_path / "job/0000/intent.json", {"graceful": False, "by": "me", "time": 0})
    assert started[0].ends() == 0
    assert "the study was cancelled" in started[0].log.read_text()


def test_it_goes_on_with_the_run_that_node_0_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPS_REPLICA", "1")
    run = write_study(tmp_path) / "trials" / f"{STUDY}.0000"

    def appear(*arguments: Any) -> None:
        put(run / "job/0000/submission.json", {"study_submission": 0})
        put(run / "job/0000/spec.json", {})

    monkeypatch.setattr(signal, "sigtimedwait", appear)
    found, number = open_trial(str(tmp_path), 0, 0)
    assert (found.path("x"), number) == (str(run / "x"), 0)


@pytest.mark.parametrize(("workload", "code"), [("array", 77), ("pytorchjob", 1)])
def test_a_trial_that_no_run_can_be_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload: str, code: int
) -> None:
    """A pod that fails is made again, many times."""
    monkeypatch.setattr(elements.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 2, b""))
    with pytest.raises(NothingToDo, match="no run of trial 0") as caught:
        open_trial(str(write_study(tmp_path, workload)), 0, 0)
    assert caught.value.exit_code == code
