"""``python -m llm.train`` as a Hydra application."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.llm.harness import REPOSITORY, tiny

SMALL = ["recipe=tiny", "train.seq_len=64", "train.global_batch_size=8", "train.micro_batch_size=4"]
SMALL += ["train.warmup_steps=2", "train.max_steps=4", "eval.batches=1", "eval.sample_prompts=[]"]
ENV = {"PYTHONPATH": str(REPOSITORY), "HYDRA_FULL_ERROR": "0"}


def start(folder: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """``python -m llm.train`` in ``folder``."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LLMOPS_", "SLURM_"))}
    command = [sys.executable, "-m", "llm.train", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env={**environment, **ENV, **env}, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def train(folder: Path, *arguments: str, code: int = 0, **env: str) -> str:
    process = start(folder, *arguments, **env)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def steps(run: Path, attempt: int = 0) -> list[int]:
    lines = [line for part in run.glob(f"metrics/{attempt:04d}/*.jsonl") for line in part.read_text().splitlines()]
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "step"]


def test_a_single_run(tmp_path: Path) -> None:
    assert "held-out loss" in train(tmp_path, *SMALL)
    (run,) = tmp_path.glob("outputs/*/*")
    assert steps(run) == [1, 2, 3, 4]
    assert (run / "train.log").exists(), "hydra.job.name"
    assert (run / ".hydra" / "overrides.yaml").exists()


def test_several_in_one_process_and_each_goes_on_in_its_own_directory(tmp_path: Path) -> None:
    points = ["--multirun", "hydra.sweep.dir=sweep", *SMALL, "train.lr=1e-4,3e-4"]
    train(tmp_path, *points)
    train(tmp_path, *points, "train.max_steps=6")
    for number in ("0", "1"):
        assert steps(tmp_path / "sweep" / number, 0) == [1, 2, 3, 4]
        assert steps(tmp_path / "sweep" / number, 1) == [5, 6]


def test_two_local_tasks_are_ranks_of_one_training(tmp_path: Path) -> None:
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    train(tmp_path, "--multirun", "hydra.sweep.dir=sweep", *launcher, *SMALL)
    run = tmp_path / "sweep" / "0"
    assert steps(run) == [1, 2, 3, 4]
    (manifest,) = run.glob("checkpoints/step_00000004/*/manifest.json")
    assert json.loads(manifest.read_text())["world_size"] == 2


def test_the_held_out_loss_is_returned(tmp_path: Path) -> None:
    """As a sweeper gets it: a training calls back with what the job returned."""
    callback = tmp_path / "caller.py"
    callback.write_text(
        "from hydra.experimental.callback import Callback\n"
        "class Tell(Callback):\n"
        "    def on_job_end(self, config, job_return, **kwargs):\n"
        "        print('returned', job_return.return_value)\n"
    )
    path = f"{REPOSITORY}{os.pathsep}{tmp_path}"
    output = train(tmp_path, *SMALL, "+hydra.callbacks.tell._target_=caller.Tell", PYTHONPATH=path)
    loss = float(next(line for line in output.splitlines() if line.startswith("returned")).split()[1])
    assert f"held-out loss {loss:.4f}" in output
    output = train(tmp_path, *SMALL, "eval.batches=0", "+hydra.callbacks.tell._target_=caller.Tell", PYTHONPATH=path)
    assert "returned None" in output


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.global_batch_size=7", "error: train.global_batch_size=7 is not a multiple"),
        ("train.max_steps=many", "at `$.train.max_steps`"),
        ("data.source=/nowhere.txt", "/nowhere.txt"),
        ("train.lr=1e30", "failed; its log says why"),
    ],
)
def test_a_failure_is_raised(tmp_path: Path, override: str, said: str) -> None:
    output = train(tmp_path, *SMALL, override, code=1)
    assert said in output
    assert "Traceback" not in output


def test_term_saves_and_ends_all(tmp_path: Path) -> None:
    points = ["--multirun", "hydra.sweep.dir=sweep", *SMALL, "train.max_steps=5000", "train.lr=1e-4,3e-4"]
    process = start(tmp_path, *points)
    run = tmp_path / "sweep" / "0"
    deadline = time.monotonic() + 60
    while len(steps(run)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    last = steps(run)[-1]
    assert list(run.glob(f"checkpoints/step_{last:08d}/*/manifest.json"))
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_rank_of_a_run_imports_no_hydra(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny(train__max_steps=1, train__warmup_steps=1)))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--run-url", str(tmp_path / "run")]
    command = [sys.executable, "-X", "importtime", "-m", "llm.train", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **ENV}, capture_output=True, text=True, check=True)
    assert "llm.train.attempt" in done.stderr
    assert "hydra" not in done.stderr
    assert "omegaconf" not in done.stderr
