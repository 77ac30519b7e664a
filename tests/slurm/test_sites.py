"""``llmops init`` and ``llmops doctor`` of the real cluster: what is written can be submitted with at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.launcher.harness import Launcher
from tests.slurm import cluster


def test_what_init_writes_runs_and_the_doctor_finds_nothing_broken(slurm: object, scratch: Path) -> None:
    launcher = Launcher(scratch / "runs", "slurm")
    path = scratch / "conf" / "cluster" / "here.yaml"
    made = launcher.call("init", "--backend", "slurm", "--output", str(path))
    assert made.returncode == 0, made.stderr
    use = made.stdout.split("llmops submit ")[1].split()
    assert use[:4] == ["--config-dir", str(scratch / "conf"), "cluster=here", "recipe=tiny"]
    arguments = [*use[:3], "code.enabled=false", "--name", "first", "--follow"]
    done = launcher.call("submit", *arguments, "--", "true")
    assert done.returncode == 0, done.stderr
    found = launcher.call("doctor", *use[:3], "checkpoint.save_seconds=60", "--json")
    assert found.returncode == 0, found.stdout + found.stderr
    checks = {(check["section"], check["name"]): check for check in json.loads(found.stdout)["checks"]}
    wait = cluster.show_config("KillWait").split()[0]
    room = checks["slurm", "time to save"]
    assert room["result"] == "warn"
    assert f"KILL comes {wait} s after TERM" in room["found"]
    assert "ask for KillWait=65" in room["remedy"]
    tracker = "ok" if cluster.proctrack() == "cgroup" else "warn"
    assert checks["slurm", "ProctrackType"]["result"] == tracker
    names = ("controller", "version", "clock", "accounting", "accounts", "test submission")
    assert {checks["slurm", name]["result"] for name in names} == {"ok"}
    assert checks["run store", "reached from slurm"]["result"] == "ok"
    assert shutil.which("sacctmgr") is None or 'account: "' in path.read_text()


def test_a_controller_that_is_frozen_is_a_failed_check_in_time(slurm: object, scratch: Path) -> None:
    launcher = Launcher(scratch / "runs", "slurm")
    with cluster.frozen("slurmctld"):
        found = launcher.call("doctor", "--backend", "slurm", "--timeout", "8", "--json")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    checks = {check["name"]: check for check in json.loads(found.stdout)["checks"]}
    assert checks["controller"]["result"] == "fail"
    assert checks["commands"]["result"] == "ok"
