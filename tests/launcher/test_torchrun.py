"""A real torchrun as a run's command: told nothing, its workers are stopped as they want to be."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.launcher.harness import Launcher

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1")
# Free of torch, so that it starts at once; each worker has a process that must outlive the stop, as for loading data.
WORKER = """
import os, signal, sys, time
from pathlib import Path

folder, kind, rank = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
helper = os.fork()
if not helper:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while os.getppid() != 1:
        time.sleep(0.05)
    os._exit(0)
told = []
if kind == "handler":
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
if kind == "preempt":
    from llmops import preempt
step = 0
while not told:
    step += 1
    time.sleep(0.02)
    if kind == "preempt":
        preempt.beat(step)
        told = [1] if preempt.should_stop() else []
    if step == 5:
        (folder / f"up.{rank}").touch()
if rank == "1":
    time.sleep(2)  # one saves for longer than the other
if os.waitpid(helper, os.WNOHANG) == (0, 0):
    (folder / f"saved.{rank}").touch()
if kind == "preempt":
    preempt.exit_stopped()
while not (folder / "saved.1").exists():  # torchrun ends the others when the first leaves with an error
    time.sleep(0.02)
sys.exit(75)
"""


KINDS = ("preempt", "handler", "neither")


class Started(NamedTuple):
    launcher: Launcher
    folders: dict[str, Path]
    runs: dict[str, str]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """A run of each kind, at the same time."""
    root = tmp_path_factory.mktemp("torchrun")
    (root / "worker.py").write_text(WORKER)
    launcher = Launcher(root / "runs", "local")
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    runs = {
        kind: launcher.submit("code.enabled=false", command=(*TORCHRUN, str(root / "worker.py"), str(folder), kind))
        for kind, folder in folders.items()
    }
    return Started(launcher, folders, runs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_reaches_the_workers_alone(kind: str, started: Started) -> None:
    launcher, folder, run_id = started.launcher, started.folders[kind], started.runs[kind]
    up = [folder / "up.0", folder / "up.1"]
    launcher.wait_for(lambda: all(path.exists() for path in up), 120, "both workers", run_id)
    if kind == "preempt":
        # As where a cluster signals all that a job has started; torchrun would give up at the third.
        (top,) = launcher.ranks(run_id).values()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(top, number)
    began = time.monotonic()
    launcher.ok("cancel", "--graceful", run_id)
    launcher.wait(run_id, "cancelled", timeout=100)
    assert time.monotonic() - began < 60, "long before the deadline"
    end = json.loads((launcher.root / run_id / "attempts" / "0000" / "end.json").read_text())
    saved = sorted(path.name for path in folder.glob("saved.*"))
    assert saved == ([] if kind == "neither" else ["saved.0", "saved.1"]), launcher.trace(run_id)
    assert (end["saved"], end["last_step"] is not None) == (kind == "preempt", kind == "preempt")
    if kind == "preempt":
        assert end["exit_codes"] == {"0": 0}, "torchrun saw no error, and the run is not taken for finished"
    launcher.wait_for(lambda: launcher.alive(run_id) == [], 60, "all processes to be gone", run_id)
