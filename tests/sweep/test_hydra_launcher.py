"""``hydra/launcher=llmops``: the multirun of any Hydra program as a study, waited for or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launcher.harness import TREE, Launcher
from tests.sweep.driver import Sweeper

APP = """
import os
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    print("point", config.a, config.get("text"), os.environ["LLMOPS_RUN_ID"], flush=True)
    if config.a == 13:
        raise ValueError("unlucky")
    return config.a * 2.0

main()
"""


@pytest.fixture
def app(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    return tmp_path / "app.py"


def multirun(app: Path, runs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LLMOPS_RUNS_URL": str(runs), "PYTHONPATH": str(TREE)}
    command = [sys.executable, app.name, "--multirun", "hydra/launcher=llmops", "hydra.launcher.poll_s=0.3"]
    return subprocess.run([*command, *overrides], cwd=app.parent, env=env, capture_output=True, text=True, timeout=120)


def test_jobs_are_the_trials_of_one_study(app, tmp_path):
    runs = tmp_path / "runs"
    done = multirun(app, runs, "+a=1,2,3", "+text='a $HOME, \"really\"'", "hydra.sweep.dir=out", "hydra.job.chdir=true")
    assert done.returncode == 0, done.stderr
    (study,) = runs.glob("*-sweep")
    for number in range(3):
        folder = app.parent / "out" / str(number)
        assert json.loads((folder / ".llmops-returned.json").read_text()) == {"value": 2.0 * (number + 1)}
        assert f"a: {number + 1}" in (folder / ".hydra" / "config.yaml").read_text()
        (log,) = study.glob(f"trials/*.{number:04d}/logs/*/*/rank0.*.log")
        assert f"point {number + 1} " in log.read_text()
    status = Launcher(runs, "local").status(f"{study.name}.0002")
    assert (status["state"], status["name"]) == ("finished", "app/2")


def test_a_job_that_fails_is_told_after_all_have_ended(app, tmp_path):
    runs = tmp_path / "runs"
    overrides = (
        "+a=13,1",
        "hydra.sweep.dir=out",
        "hydra.launcher.overrides=['retry.max_failures=1','retry.backoff_s=0']",
    )
    done = multirun(app, runs, *overrides)
    assert done.returncode != 0
    assert "exit code 1" in done.stderr
    assert "llmops logs" in done.stderr
    assert (app.parent / "out" / "1" / ".llmops-returned.json").exists()


def test_without_waiting_it_returns_at_once(app, tmp_path):
    runs = tmp_path / "runs"
    app.write_text(APP.replace('    print("point"', '    import time; time.sleep(3)\n    print("point"'))
    began = time.monotonic()
    done = multirun(
        app, runs, "+a=1,2", "hydra.launcher.wait=false", "hydra.sweep.subdir=a-${a}", "hydra.sweep.dir=out"
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 10
    assert not (app.parent / "out" / "a-1" / ".llmops-returned.json").exists()
    (study,) = (path.name for path in runs.glob("*-sweep"))
    Sweeper(runs, "local").until_over(study)
    assert (app.parent / "out" / "a-1" / ".llmops-returned.json").exists()
    assert (app.parent / "out" / "a-2" / ".llmops-returned.json").exists()


def test_what_llmops_refuses_is_one_line(app, tmp_path):
    done = multirun(app, tmp_path / "runs", "+a=1,2", "hydra.launcher.overrides=['cluster.partion=gpu']")
    assert done.returncode != 0
    assert "did you mean" in done.stderr or "there is no key cluster.partion" in done.stderr


@pytest.mark.long
def test_the_trainer_as_a_hydra_program_trains_into_its_trials_run(tmp_path):
    runs = tmp_path / "runs"
    env = {**os.environ, "LLMOPS_RUNS_URL": str(runs), "PYTHONPATH": str(TREE)}
    small = ["recipe=tiny", "train.max_steps=4", "train.warmup_steps=1", "eval.batches=1", "eval.sample_prompts=[]"]
    launcher = ["hydra/launcher=llmops", "hydra.launcher.poll_s=0.3", f"hydra.sweep.dir={tmp_path}/out"]
    command = [sys.executable, "-m", "llm.train", "--multirun", *launcher, *small, "train.lr=0.001,0.003"]
    more = ["hydra.launcher.overrides=['sweep.objective=eval/loss','cluster.ranks_per_node=2']"]
    done = subprocess.run([*command, *more], cwd=TREE, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    (study,) = (path.name for path in runs.glob("*-sweep"))
    sweeper = Sweeper(runs, "local")
    trials = sweeper.study(study)["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 2
    for number in range(2):
        returned = json.loads((tmp_path / "out" / str(number) / ".llmops-returned.json").read_text())
        assert returned["value"] == trials[number]["value"]
        assert (sweeper.run_folder(study, number) / "checkpoints" / "step_00000004").is_dir()
