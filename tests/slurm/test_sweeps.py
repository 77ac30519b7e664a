"""Studies on a real SLURM: one array, whatever happens to its elements and to whoever submitted it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import time

import pytest

from tests.launcher.harness import LLMOPS, TREE
from tests.slurm import cluster
from tests.sweep.driver import CURVE, PROGRAM, Sweeper

SLOW = {"STEPS": "60", "STEP_S": "0.15"}


@pytest.fixture
def sweeper(slurm, tmp_path):
    yield Sweeper(tmp_path / "runs", "slurm")
    cluster.cancel_all()


@pytest.fixture
def counted(sweeper, tmp_path):
    """The number of calls of each of SLURM's commands from here on."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    log.touch()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "sinfo", "scancel"):
        script = folder / name
        script.write_text(f'#!/bin/sh\necho {name} >>{log}\nexec {shutil.which(name)} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    sweeper.env["PATH"] = f"{folder}:{sweeper.env['PATH']}"

    def count() -> dict[str, int]:
        calls = log.read_text().split()
        log.write_text("")
        return {name: calls.count(name) for name in set(calls)}

    return count


def table(trials):
    return [(trial["trial"], trial["params"], trial["state"], trial["value"], trial["step"]) for trial in trials]


def job_of(sweeper, study):
    """The array's id; a study that was resumed has a submission more."""
    newest = max(sweeper.root.glob(f"{study}/job/*/job.json"))
    return json.loads(newest.read_text())["job_id"]


def test_a_thousand_trials_are_one_call(sweeper, counted):
    count = 1000
    study = sweeper.sweep(f"env.LR=range(1,{count + 1})", "cluster.extra=[--hold]", "--max-parallel", "16")
    assert counted()["sbatch"] == 1
    job = job_of(sweeper, study)
    held = cluster.run(["squeue", "-h", "-r", "-j", job, "-o", "%i"]).stdout.split()
    assert len(held) == count
    assert "%16" in cluster.run(["squeue", "-h", "-j", job, "-o", "%i"]).stdout
    trials = sweeper.study(study)["trials"]
    assert [trial["state"] for trial in trials] == ["pending"] * count
    assert {"squeue", "sacct"} >= set(calls := counted())
    assert max(calls.values()) == 1, calls
    (row,) = json.loads(sweeper.ok("status", "--json", study))
    assert (row["state"], row["step"], row["max_steps"]) == ("pending", 0, count)
    assert max(counted().values()) == 1
    sweeper.ok("cancel", study)
    trials = sweeper.study(study)["trials"]
    assert [trial["state"] for trial in trials] == ["cancelled"] * count


def test_a_grid_is_run_and_compared(sweeper):
    study = sweeper.sweep("env.LR=0.001,0.01,0.1", "env.SEED=range(0,2)", "--max-parallel", "4")
    trials = sweeper.until_over(study)
    assert [trial["state"] for trial in trials] == ["complete"] * 6
    job = job_of(sweeper, study)
    assert sweeper.status(f"{study}.0004")["job_ids"] == [f"{job}_4"]
    assert json.loads(sweeper.ok("sweep", "best", "--json", study))["params"]["env.LR"] == 0.01


def test_a_preempted_element_requeues_alone(sweeper):
    study = sweeper.sweep("env.LR=0.001,0.01,0.1", env=SLOW)
    for trial in range(3):
        folder = sweeper.run_folder(study, trial)
        sweeper.wait_for(lambda folder=folder: (folder / "state.json").exists(), 60, "all trials to save", study)
    cluster.requeue(f"{job_of(sweeper, study)}_1")
    trials = sweeper.until_over(study)
    assert [trial["state"] for trial in trials] == ["complete"] * 3
    assert [trial["attempts"] for trial in trials] == [1, 2, 1]
    assert len(sweeper.values(study, 1)) == 60
    ends = sweeper.attempts_of(study, 1)
    assert [end["reason"] for end in ends] == ["preempted", "finished"]
    assert ends[1]["first_step"] > ends[0]["first_step"], "it went on from what it had saved"


def test_a_successor_of_one_element_where_requeue_is_refused(sweeper):
    study = sweeper.sweep("env.LR=0.001,0.01,0.1", env=SLOW)
    folder = sweeper.run_folder(study, 2)
    sweeper.wait_for(lambda: (folder / "state.json").exists(), 60, "trial 2 to save", study)
    element = f"{job_of(sweeper, study)}_2"
    cluster.run(["scontrol", "update", f"jobid={element}", "requeue=0"])
    cluster.run(["scancel", "--batch", "--signal=USR1", element])
    trials = sweeper.until_over(study)
    assert [trial["state"] for trial in trials] == ["complete"] * 3
    assert len(sweeper.status(f"{study}.0002")["job_ids"]) == 2
    assert len(sweeper.values(study, 2)) == 60


def storm(sweeper, study, seed, blows):
    """Requeues and kills at random, until so many have struck, or nothing is left to strike."""
    chance = random.Random(seed)
    job, struck = job_of(sweeper, study), 0
    deadline = time.monotonic() + 60
    while struck < blows and time.monotonic() < deadline:
        running = cluster.run(
            ["squeue", "-h", "-r", "-t", "running", "-j", job, "-o", "%i"], check=False
        ).stdout.split()
        if not running:
            if not cluster.run(["squeue", "-h", "-j", job], check=False).stdout.strip():
                break
            time.sleep(0.2)
            continue
        element = chance.choice(running)
        if chance.random() < 0.5:
            cluster.run(["scontrol", "requeue", element], check=False)
            struck += 1
        else:
            trial = int(element.split("_")[1])
            for pid in sweeper.ranks(f"{study}.{trial:04d}").values():
                os.kill(pid, signal.SIGKILL)
                struck += 1
        time.sleep(chance.random())
    return struck


@pytest.mark.parametrize("sampler", ["grid", pytest.param("random", marks=pytest.mark.long)])
def test_the_table_is_the_same_whatever_happened(sweeper, sampler):
    arguments = ["env.LR=0.003,0.01,0.03", "env.SEED=range(0,4)"]
    if sampler == "random":
        arguments = ["env.LR=tag(log,interval(0.001,0.1))", "sweep=random", "sweep.seed=5", "--trials", "12"]
    env = {"STEPS": "40", "STEP_S": "0.1"}
    quiet = sweeper.sweep(*arguments, env={"STEPS": "40", "STEP_S": "0"})
    study = sweeper.sweep(*arguments, env=env)
    assert storm(sweeper, study, 7, 10) >= 5
    trials, expected = sweeper.until_over(study, 180), sweeper.until_over(quiet, 60)
    assert {trial["state"] for trial in trials} == {"complete"}
    assert table(trials) == [(number, {**params}, *rest) for number, params, *rest in table(expected)]
    for trial in range(12):
        assert sweeper.values(study, trial) == sweeper.values(quiet, trial)


def test_asha_loses_and_doubles_no_trial(sweeper):
    arguments = ["env.LR=tag(log,interval(0.0001,1))", "sweep=random", "--trials", "24", "sweep.report_every=1"]
    arguments += ["sweep.pruner.name=asha", "sweep.pruner.min_step=5"]
    everything = sweeper.sweep(*arguments[:2], "--trials", "24", env={"STEPS": "60", "STEP_S": "0"})
    command = [*LLMOPS, "sweep", "--backend", "slurm", "--json", *CURVE, "env.STEPS=60", "env.STEP_S=0.1", *arguments]
    submitter = subprocess.Popen(
        [*command, "--", "python3", str(PROGRAM)], env=sweeper.env, cwd=TREE, stdout=subprocess.PIPE, text=True
    )
    sweeper.wait_for(lambda: len(list(sweeper.root.glob("*/job/0000/spec.json"))) == 2, 60, "the submission", "")
    submitter.kill()  # while or after it calls sbatch: whoever looks next finds the array by its tag
    submitter.wait()
    (study,) = {path.parts[-4] for path in sweeper.root.glob("*/job/0000/spec.json")} - {everything}
    first = sweeper.study(study)
    if all(trial["state"] == "unknown" for trial in first["trials"]):
        sweeper.ok("sweep", "resume", study)
    sweeper.wait_for(lambda: list(sweeper.root.glob(f"{study}/job/*/job.json")), 60, "its job to be known", study)
    struck = storm(sweeper, study, 3, 12)
    trials, whole = sweeper.until_over(study, 240), sweeper.until_over(everything, 120)
    assert struck >= 5
    assert [trial["trial"] for trial in trials] == list(range(24))
    assert {trial["state"] for trial in trials} <= {"complete", "pruned"}
    assert {trial["state"] for trial in trials} == {"complete", "pruned"}
    assert [trial["params"] for trial in trials] == [trial["params"] for trial in whole]
    for trial in range(24):
        mine, reference = sweeper.values(study, trial), sweeper.values(everything, trial)
        assert mine.items() <= reference.items(), f"trial {trial} has other values at the same steps"
    assert len(list(sweeper.root.glob(f"{study}/results/*.json"))) == 24


def test_a_pruned_trial_frees_its_slot_within_seconds(sweeper):
    """One bad trial beside three good ones that have passed its step long before."""
    arguments = ["env.LR=0.01,0.011,0.009,1000", "sweep.pruner.name=median", "sweep.pruner.startup_trials=3"]
    study = sweeper.sweep(
        *arguments, "sweep.report_every=1", "--max-parallel", "3", env={"STEPS": "300", "STEP_S": "0.02"}
    )
    trials = sweeper.until_over(study, 90)
    assert [trial["state"] for trial in trials] == ["complete"] * 3 + ["pruned"]
    (end,) = sweeper.attempts_of(study, 3)
    assert end["reason"] == "cancelled"
    intent = json.loads((sweeper.run_folder(study, 3) / "job" / "0000" / "intent.json").read_text())
    assert end["time"] - intent["time"] < 8
    assert "pruned" in sweeper.status(f"{study}.0003")["reason"]


def test_more_trials_than_the_cluster_holds_are_refused(sweeper):
    done = sweeper.call("sweep", "--backend", "slurm", *CURVE, "env.LR=range(0,99999)", "--", "true")
    assert done.returncode == 2
    assert "99,999 trials" in done.stderr
    assert "MaxJobCount" in done.stderr
    assert not sweeper.root.exists()


def test_a_dry_run_is_one_script(sweeper):
    shown = sweeper.ok(
        "sweep", "--backend", "slurm", "--dry-run", *CURVE, "env.LR=1,2,3", "--max-parallel", "2", "--", "true"
    )
    assert re.search(r'^#SBATCH --array="?0-2%2"?$', shown, re.MULTILINE)
    assert "slurm --study" in shown
    assert "3 trials" in shown
