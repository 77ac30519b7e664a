"""An element of a study's array: which trial it is, and that trial's run.

The run is made by its first attempt, with what the configuration needs (Hydra's data, samplers): a helper process from
the job's environment. Later lives of the element find it by themselves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from llmops.agent.follower import study_environment
from llmops.agent.log import log
from llmops.agent.policy.k8s import codes
from llmops.agent.rundir import RunDir, StoreError, open_rundir
from llmops.agent.signals import STOP_SIGNALS, be_deaf

MAKE_S = 300.0  # for the helper: samplers read what all other trials have reported
NEVER = 2  # what the helper returns for what no later attempt would change
LOOK_S, LOOK_MAX_S = 0.5, 5.0  # between looks of a pod that waits for node 0's


class NothingToDo(Exception):
    """The element has no work; the message says why. ``exit_code``: what its process returns."""

    def __init__(self, why: str, exit_code: int = 0) -> None:
        super().__init__(why)
        self.exit_code = exit_code


def open_trial(study: str, submission: int, index: int) -> tuple[RunDir, int]:
    """The run of element ``index`` of a study's submission, and which of that run's submissions this is.

    Of a trial of several pods, node 0's makes the run and the others wait for it: a sampler is asked once. Raises
    :class:`NothingToDo` where the trial or the study was cancelled, or no pod could ever run it, and
    :class:`StoreError` or :class:`ValueError` where the run cannot be made.
    """
    folder = f"job/{submission:04d}"
    root = open_rundir(study)
    try:
        spec = root.get(f"{folder}/spec.json")
        if spec is None:
            raise ValueError(f"{root.path(folder)}/spec.json is not there")
        trial = _trial(spec["array"]["trials"], index)
        _check_wanted(root, submission, trial)
        run = open_rundir(f"{study.rstrip('/')}/trials/{spec['run_id']}.{trial:04d}")
        number = _submission(run, submission)
        if number is None and _is_follower(dict(os.environ)):
            number = _wait(root, run, submission, trial, spec["options"])
    finally:
        root.close()
    if number is None:
        number = _make(study, submission, trial, spec)
    return run, number


def _check_wanted(root: RunDir, submission: int, trial: int) -> None:
    folder = f"job/{submission:04d}"
    if root.exists(f"{folder}/intent.json"):
        raise NothingToDo("the study was cancelled")
    if root.exists(f"{folder}/cancelled/{trial:04d}.json"):
        raise NothingToDo(f"trial {trial} was cancelled")


def element(environ: dict[str, str]) -> int:
    """This element's index, as the scheduler tells it."""
    for name in ("LLMOPS_ELEMENT", "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        if environ.get(name, ""):
            return int(environ[name])
    raise ValueError("no index of an array is in the environment: this program is started by a study's job")


def _trial(spans: list[list[int]], index: int) -> int:
    left = index
    for first, last in spans:
        if left <= last - first:
            return first + left
        left -= last - first + 1
    raise ValueError(f"element {index} has no trial: the array has {index - left}")


def _submission(run: RunDir, submission: int) -> int | None:
    """The newest submission of the run that belongs to this submission of the study, if it is whole."""
    for name in reversed([name for name in run.list("job") if name.isdigit()]):
        record = run.get(f"job/{name}/submission.json") or {}
        if record.get("study_submission") == submission and run.exists(f"job/{name}/spec.json"):
            return int(name)
    return None


def _is_follower(environ: dict[str, str]) -> bool:
    """Whether this is a pod of another node than 0, as its manifest says."""
    return int(environ.get("LLMOPS_FIRST_NODE", "0")) + int(environ.get("LLMOPS_REPLICA", "0")) > 0


def _wait(root: RunDir, run: RunDir, submission: int, trial: int, options: dict[str, Any]) -> int:
    """The submission that node 0's pod makes. Stop signals, which are blocked until then, end the wait."""
    stopped = codes(options["workload"]).stopped
    began, pause, wait_s = time.monotonic(), LOOK_S, float(options["wait_s"])
    log(f"waiting for node 0's pod to make the run of trial {trial}")
    while (number := _submission(run, submission)) is None:
        _check_wanted(root, submission, trial)
        if time.monotonic() - began > wait_s:
            raise NothingToDo(f"node 0's pod made no run of trial {trial} within {wait_s:.0f} s", stopped)
        if signal.sigtimedwait(STOP_SIGNALS, pause) is not None:
            raise NothingToDo("this pod was told to go", stopped)
        pause = min(1.5 * pause, LOOK_MAX_S)
    return number


def _make(study: str, submission: int, trial: int, spec: dict[str, Any]) -> int:
    # A stop signal must not tear what it writes.
    command = [sys.executable, "-m", "llmops.sweep.trial"]
    command += ["--study", study, "--submission", str(submission), "--trial", str(trial)]
    try:
        done = subprocess.run(
            command,
            cwd="/",
            env=study_environment(spec),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=MAKE_S,
            preexec_fn=be_deaf,
        )
    except subprocess.TimeoutExpired:
        raise StoreError(f"the run of trial {trial} was not made within {MAKE_S:.0f} s") from None
    if done.returncode == NEVER and "workload" in spec["options"]:
        # Elsewhere a job that fails is not started again; a pod is, a thousand times.
        raise NothingToDo(f"there can be no run of trial {trial}", codes(spec["options"]["workload"]).give_up)
    if done.returncode:
        raise StoreError(
            f"the run of trial {trial} could not be made (exit code {done.returncode}); is llmops, with what the study "
            f"needs, installed for {sys.executable}?"
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    log(f"trial {trial}: {answer['params']}")
    return int(answer["submission"])
