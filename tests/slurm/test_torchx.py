"""TorchX's own command line and its ``dist.ddp`` component on a real SLURM, through our launcher."""

from __future__ import annotations

import re

import pytest

from tests.slurm import cluster
from tests.torchx.commands import COUNTER, Torchx


@pytest.fixture
def torchx(slurm, tmp_path):
    (tmp_path / "work").mkdir()
    yield Torchx(tmp_path / "runs", tmp_path / "work")
    cluster.cancel_all()


def test_ddp_is_preempted_and_goes_on(torchx, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    (torchx.folder / "count.py").write_text(COUNTER)
    component = ("dist.ddp", "-j", "2x1", "--script", "count.py", "--env", "WHERE=node-${replica_id}")
    options = ("-s", "llmops_slurm", "-cfg", "partition=low,time=30")
    handle = torchx.ok("run", *options, *component, "--", str(state), "80").strip()
    run = tmp_path / "runs" / handle.rpartition("/")[2]
    logs = lambda: "".join(path.read_text() for path in run.glob("logs/0000/*/*.log"))  # noqa: E731
    cluster.wait_for(lambda: logs().count(" starts at 0") == 2, 240, "both ranks to start")
    assert torchx.state(handle) == "RUNNING"
    cluster.preempt()
    cluster.wait_for(lambda: torchx.state(handle) == "SUCCEEDED", 240, f"{handle} to finish")
    status = torchx.ok("status", handle)
    assert "Num Restarts: 1" in status
    assert re.search(r"\*count\[0\]:SUCCEEDED\s+count\[1\]:SUCCEEDED", status), status
    shown = torchx.ok("log", f"{handle}/count/1")
    reached = int((state / "1").read_text())
    assert 0 < reached < 80
    assert len(re.findall("rank . of 2 starts at 0 in node-1\n", shown)) == 1
    assert len(re.findall(f"rank . of 2 starts at {reached} in node-1\n", shown)) == 1
    assert len(re.findall("rank . done at 80\n", shown)) == 1
    assert "node-0" not in shown
    assert handle in torchx.ok("list", "-s", "llmops_slurm")
    assert "'num_replicas': 2" in torchx.ok("describe", handle)


def test_cancelled_and_never_again(torchx):
    handle = torchx.ok("run", "-s", "llmops_slurm", "utils.sh", "sleep", "600").strip()
    cluster.wait_for(lambda: torchx.state(handle) == "RUNNING", 120, f"{handle} to run")
    torchx.ok("cancel", handle)
    cluster.wait_for(lambda: torchx.state(handle) == "CANCELLED", 120, f"{handle} to be cancelled")
    cluster.wait_for(lambda: not cluster.run(["squeue", "-h"]).stdout, 60, "the queue to be empty")


def test_what_cannot_run_is_refused_in_one_line(torchx, tmp_path):
    done = torchx.call("run", "-s", "llmops_slurm", "-cfg", "partition=nope", "utils.echo")
    assert done.returncode == 1
    assert "cluster.partition=nope: there is no such partition" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
