"""Studies on this machine, from the command line to the table."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest

from tests.sweep.driver import CURVE, Sweeper

LRS = "env.LR=0.001,0.01,0.1"


@pytest.fixture
def local(tmp_path):
    return Sweeper(tmp_path / "runs", "local")


def pool(local, study):
    record = json.loads((local.root / study / "job" / "0000" / "job.json").read_text())
    return int(record["job_id"].split(":")[1])


def test_a_grid_is_run_and_compared(local):
    study = local.sweep(LRS, "env.SEED=range(0,2)", "--name", "curves", "--max-parallel", "2")
    trials = local.until_over(study)
    assert [trial["state"] for trial in trials] == ["complete"] * 6
    assert [(trial["params"]["env.LR"], trial["params"]["env.SEED"]) for trial in trials] == [
        (lr, seed) for lr in (0.001, 0.01, 0.1) for seed in (0, 1)
    ]
    best = json.loads(local.ok("sweep", "best", "--json", study))
    assert best["params"]["env.LR"] == 0.01
    assert best["value"] == min(trial["value"] for trial in trials)
    # What the best trial was can be submitted as a run of its own.
    overrides = shlex.split(local.ok("sweep", "best", "--as-overrides", "curves"))
    assert overrides[0] == "env.LR=0.01"
    assert "curves" in local.ok("sweep", "status")
    assert "env.LR" in local.ok("sweep", "report", "curves")
    local.ok("sweep", "report", "curves", "--html", str(local.root / "report.html"))
    assert "<html" in (local.root / "report.html").read_text()


def test_trials_are_ordinary_runs(local):
    study = local.sweep(LRS, "--name", "three")
    local.until_over(study)
    assert local.status("three/1")["state"] == "finished"
    assert local.status(f"{study}.0001")["name"] == "three/1"
    assert "step=20 loss=" in local.ok("logs", "three/1")
    assert local.call("resume", "three/1").returncode == 0
    # The study is one line of the table, whatever number of trials it has.
    rows = [row for row in json.loads(local.ok("status", "--json")) if row["id"].startswith(study)]
    assert [(row["id"], row["state"]) for row in rows] == [(study, "finished")]
    assert local.ok("status").count(study[:15]) <= 1


def test_killing_pool_and_trials_loses_nothing(local):
    env = {"STEP_S": "0.1"}
    study = local.sweep(LRS, "env.SEED=range(0,2)", "--max-parallel", "2", env=env)
    first = local.run_folder(study, 0)
    local.wait_for(lambda: (first / "state.json").exists(), 60, "trial 0 to save", study)
    os.kill(pool(local, study), signal.SIGKILL)
    for pid in local.ranks(first.name).values():
        os.kill(pid, signal.SIGKILL)
    states = [trial["state"] for trial in local.study(study)["trials"]]
    assert states[-1] == "failed", "what the pool had not started is known to be left"
    said = local.ok("sweep", "resume", study)
    assert "4 trials run again, 0 are new" in said
    trials = local.until_over(study)
    assert [trial["state"] for trial in trials] == ["complete"] * 6
    quiet = local.sweep(LRS, "env.SEED=range(0,2)")
    same = local.until_over(quiet)
    assert [(t["params"], t["value"]) for t in trials] == [(t["params"], t["value"]) for t in same]
    assert [local.values(study, n) for n in range(6)] == [local.values(quiet, n) for n in range(6)]
    assert len(local.values(study, 0)) == 20


def test_misfortune_is_a_result(local):
    study = local.sweep("env.MISFORTUNE=none,crash,nan", "retry.max_failures=1", "env.LR=0.01")
    trials = local.until_over(study)
    assert [trial["state"] for trial in trials] == ["complete", "failed", "nan"]
    assert trials[2]["value"] is None
    assert "2 attempts failed" in trials[1]["reason"]
    assert json.loads(local.ok("sweep", "best", "--json", study))["trial"] == 0
    for again in (1, 2):
        assert "1 trials run again" in local.ok("sweep", "resume", study), again
        local.until_over(study)
    assert "nothing is left to run; 1 failed too often" in local.ok("sweep", "resume", study)


def test_a_trial_that_takes_too_long_is_stopped_with_what_it_has(local):
    study = local.sweep("env.LR=0.01,0.02", "sweep.trial_minutes=0.03", env={"STEPS": "1000", "STEP_S": "0.1"})
    trials = local.until_over(study)
    assert [trial["state"] for trial in trials] == ["timeout"] * 2
    assert all(trial["value"] is not None and trial["step"] < 1000 for trial in trials)


def test_cancelling_a_study_ends_all_of_it(local):
    study = local.sweep("env.LR=range(1,20)", "--max-parallel", "2", env={"STEPS": "1000", "STEP_S": "0.1"})
    first = local.run_folder(study, 0)
    local.wait_for(lambda: local.ranks(first.name), 60, "trial 0 to run", study)
    local.ok("cancel", study)
    trials = local.until_over(study, 60)
    assert {trial["state"] for trial in trials} == {"cancelled"}
    local.wait_for(lambda: local.alive(study) == [], 20, "its processes to be gone", study)


def test_cancelling_one_trial_leaves_the_others(local):
    study = local.sweep(LRS, "--max-parallel", "1", env={"STEPS": "100", "STEP_S": "0.05"})
    first = local.run_folder(study, 0)
    local.wait_for(lambda: local.ranks(first.name), 60, "trial 0 to run", study)
    local.ok("cancel", f"{study}/2")
    local.ok("cancel", f"{study}/0")
    trials = local.until_over(study, 60)
    assert [trial["state"] for trial in trials] == ["cancelled", "complete", "cancelled"]


def test_adding_trials_and_changing_where_they_run(local):
    arguments = ("sweep=random", "sweep.seed=3", "env.LR=tag(log,interval(0.001,0.1))")
    study = local.sweep(*arguments, "--trials", "2")
    local.until_over(study)
    assert "0 trials run again, 2 are new" in local.ok("sweep", "resume", study, "--trials", "2")
    more = local.until_over(study)
    whole = local.until_over(local.sweep(*arguments, "--trials", "4"))
    assert [(t["params"], t["value"]) for t in more] == [(t["params"], t["value"]) for t in whole]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.seed=7"], "another base configuration"),
        (["env.LR=1,2"], "another space"),
        (["sweep.direction=maximize"], "start another one"),
        (["train.nothing=1"], "no key train.nothing"),
    ],
)
def test_a_study_is_not_mixed_with_another(local, overrides, words):
    study = local.sweep(LRS)
    local.until_over(study)
    done = local.call("sweep", "resume", study, "--trials", "1", *overrides)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(list((local.root / study / "job").iterdir())) == 1


def test_changes_are_taken_when_told(local):
    study = local.sweep(LRS)
    local.until_over(study)
    local.ok("sweep", "resume", study, "--allow-changes", "--trials", "2", "env.LR=0.5,0.6", "env.STEPS=5")
    trials = local.until_over(study)
    assert [trial["params"]["env.LR"] for trial in trials] == [0.001, 0.01, 0.1, 0.5, 0.6]
    assert [trial["step"] for trial in trials] == [20, 20, 20, 5, 5]


def test_two_who_resume_at_once_do_not_double_trials(local):
    import subprocess

    from tests.launcher.harness import LLMOPS, TREE

    study = local.sweep("env.MISFORTUNE=crash,none", "env.LR=0.01", "retry.max_failures=1")
    local.until_over(study)
    command = [*LLMOPS, "sweep", "resume", study]
    both = [subprocess.Popen(command, env=local.env, cwd=TREE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.communicate(timeout=60)[1], process.returncode) for process in both]
    codes = sorted(code for _, code in ends)
    assert codes in ([0, 0], [0, 2]), ends
    trials = local.until_over(study)
    assert [trial["state"] for trial in trials] == ["failed", "complete"]
    numbers = [json.loads(p.read_text())["number"] for p in local.root.glob(f"{study}/trials/*/job/*/submission.json")]
    assert len(numbers) == len({*local.root.glob(f"{study}/trials/*/job/*/spec.json")})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe=tiny"], "nothing is swept"),
        (["train.lr=choice()"], "there is no value"),
        (["train.lr=1e-4,1e-4"], "is there twice"),
        (["train.lrr=1,2"], "did you mean train.lr?"),
        (["train.lr=interval(0.1,1)"], "an interval has no grid"),
        (["train.seed=range(0,400)", "env.X=range(0,400)"], "160,000 trials"),
        (["model.n_heads=4,5", "recipe=tiny"], "trial model.n_heads=5"),
        (["train.lr=1,2", "sweep.objective=what"], "sweep.objective=what"),
        (["train.lr=1,2", "sweep.pruner.name=asha"], "only one eval/loss"),
        (["train.lr=1,2", "sweep.sampler=cmaes", "sweep.trials=3"], "moves along intervals"),
        (["everything"], "neither an override"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(local, arguments, words):
    done = local.call("sweep", "--backend", "local", *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not local.root.exists()


def test_a_dry_run_shows_the_command_and_the_count(local):
    shown = local.ok("sweep", "--backend", "local", "--dry-run", *CURVE[1:], LRS, "recipe=tiny")
    assert "pool --study" in shown
    assert "3 trials" in shown
    assert not local.root.exists()


def test_trials_train(local):
    """The trainer itself, with its held-out loss as the objective."""
    tiny = ("recipe=tiny", "train.max_steps=12", "train.warmup_steps=2", "eval.sample_prompts=[]", "eval.batches=1")
    arguments = ("--json", *tiny, "cluster.ranks_per_node=1", "train.lr=0.003,0.000001")
    study = json.loads(local.ok("sweep", "--backend", "local", *arguments))["id"]
    trials = local.until_over(study)
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    assert trials[0]["value"] < trials[1]["value"]
    assert json.loads(local.ok("sweep", "best", "--json"))["trial"] == 0
    config = Path(local.run_folder(study, 1), "config.yaml").read_text()
    assert "lr: 1.0e-06" in config
