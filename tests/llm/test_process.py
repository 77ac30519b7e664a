"""One rank as a process: its start, its exit codes, its environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.train.control import Control
from llm.train.environment import rank_environment
from llm.train.logging import Metrics
from llm.utils.config import ConfigError, check, load
from llm.utils.storage import open_storage
from tests.llm.harness import DEADLINE_S, REPOSITORY, lines, start, tiny, trajectory


def alone(arguments: list[str], code: str | None = None) -> subprocess.CompletedProcess[str]:
    """The trainer without supervisor and without peers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLMOPS_", "SLURM_"))}
    command = ["-c", code] if code else ["-m", "llm.train"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=REPOSITORY,
        env={**kept, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def write(path: Path, config: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_plain_runs_resume_by_themselves_and_start_without_the_compiler(tmp_path: Path) -> None:
    code = "import sys; from llm.train.__main__ import main; print('code', main()); "
    code += "print({name: name in sys.modules for name in ('torch', 'torch._dynamo', 'sympy', 'fsspec')})"
    run = tmp_path / "run"
    config = tiny(
        dist__dp_shard=1, train__max_steps=4, eval__every_steps=0, train__dtype="bfloat16", train__warmup_steps=0
    )
    arguments = ["--config", write(tmp_path / "c.yaml", config), "--run-url", str(run)]
    first = alone(arguments, code)
    assert "code 0" in first.stdout, first.stderr
    assert "{'torch': True, 'torch._dynamo': False, 'sympy': False, 'fsspec': False}" in first.stdout
    write(tmp_path / "c.yaml", {**config, "train": {**config["train"], "max_steps": 6}})
    second = alone(arguments)
    assert second.returncode == 0, second.stderr
    assert "the config differs" in second.stdout
    assert list(trajectory(run)) == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(run, 1, "step")] == [5, 6]
    write(tmp_path / "c.yaml", {**config, "train": {**config["train"], "seq_len": 32}})
    third = alone(arguments)
    assert third.returncode == 2
    assert "train.seq_len: 64 -> 32" in third.stderr
    code = "import sys; from llm.inference.generate import main; sys.exit(main())"
    text = alone([*arguments[:-2], "--run-url", str(run), "--prompt", "O, ", "--tokens", "8"], code)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("O, ")


def test_a_lone_rank_takes_sigterm_as_a_stop_request(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", tiny(dist__dp_shard=1, train__max_steps=10000))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMOPS_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "llm.train", "--config", config, "--run-url", str(tmp_path / "run")],
        cwd=REPOSITORY,
        env={**kept, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 75
    assert lines(tmp_path / "run", 0, "phase")[-1]["phase"] == "stopped"


def test_signals_during_the_imports_are_survived(tmp_path: Path) -> None:
    attempt = start(tmp_path / "run", tiny(dist__dp_shard=1, train__max_steps=5), ranks=1)
    attempt.wait_until(lambda: attempt.heartbeat().get("phase") == "import")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        attempt.signal_everything(number)
    assert attempt.finish() == [0]


def test_a_diverging_run_fails_before_the_update(tmp_path: Path) -> None:
    config = tiny(dist__dp_shard=1, train__lr=1e30, train__grad_clip=0.0, train__warmup_steps=0, train__max_steps=9)
    attempt = start(tmp_path / "run", config, ranks=1)
    output = attempt.ranks[0].communicate(timeout=DEADLINE_S)[0]
    assert attempt.ranks[0].returncode == 1
    assert "nothing was updated. Lower train.lr" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__lr": -1}, "train.lr"),
        ({"train__learning_rate": 1}, "learning_rate"),
        ({"model__n_heads": 5}, "model.n_heads=5"),
        ({"data__source": "embedded:bible"}, "data.source=embedded:bible"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_code_2(
    tmp_path: Path, changes: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    file = write(tmp_path / "c.yaml", tiny(**changes))
    if "source" in message:  # found out only by the process that reads the text
        done = alone(["--config", file, "--run-url", str(tmp_path / "run")])
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        return
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        check(load(file), 1)


def test_config_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: [")
    for file in ("c.yaml", "missing.yaml"):
        with pytest.raises(ConfigError, match=file):
            load(str(tmp_path / file))
    assert load(f"file://{write(tmp_path / 'd.yaml', tiny())}").train.max_steps == 60
    done = alone(["--config", write(tmp_path / "d.yaml", tiny())])
    assert (done.returncode, done.stderr) == (2, "error: no run directory: give --run-url or set LLMOPS_RUN_URL\n")


def test_the_environment_of_a_plain_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert rank_environment() == (0, 1, 0)
    slurm = {"JOB_ID": "77", "PROCID": "3", "LOCALID": "1", "NTASKS": "4", "JOB_NUM_NODES": "2", "NODEID": "1"}
    for name, value in {**slurm, "JOB_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "")  # so that it is taken back afterwards
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    assert rank_environment() == (3, 4, 1)
    assert os.environ["MASTER_ADDR"] == "n1"
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # not monkeypatch.delenv: it would bring the value back at the end, for all later tests
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert rank_environment() == (3, 4, 1)
    assert os.environ["MASTER_ADDR"] == "10.0.0.1"  # where a node's name means nothing to the others
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        del os.environ[name]
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ConfigError, match="RANK"):
        rank_environment()


def test_control_directory(tmp_path: Path) -> None:
    control = Control(3, str(tmp_path))
    assert not control.stop_requested()
    (tmp_path / "stop").write_text("{}")
    assert control.stop_requested()
    control.heartbeat("load")
    assert json.loads((tmp_path / "heartbeat.3").read_text())["step"] is None
    control.heartbeat("train", 8)
    control.heartbeat("train", 9)
    control.heartbeat("save")
    beat = json.loads((tmp_path / "heartbeat.3").read_text())
    assert (beat["step"], beat["first_step"], beat["phase"]) == (9, 8, "save")
    assert abs(beat["time"] - time.time()) < 60
    control.stopped(9, "checkpoints/step_00000009/0000-0000")
    assert json.loads((tmp_path / "stopped.3").read_text())["commit"] == "checkpoints/step_00000009/0000-0000"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heartbeat.3", "stop", "stopped.3"]
    Control(0).heartbeat("train", 1)


def test_metrics_parts(tmp_path: Path, memory_url: str) -> None:
    for url in (str(tmp_path), memory_url):
        storage = open_storage(url)
        for value in (0.1 + 0.2, 1e-300):
            metrics = Metrics()
            metrics.write("phase", phase="started", at=1.5)
            metrics.open(storage, 4)
            metrics.write("step", step=1, loss=value)
            for path, data in metrics.hand_over().items():  # as a commit takes them along
                storage.create(path, data)
            metrics.committed()
            metrics.write("step", step=2, loss=value)
            metrics.close()
        names = storage.list("metrics/0004")
        text = b"".join(storage.read(f"metrics/0004/{name}") for name in names).decode()
        parsed = [json.loads(line) for line in text.splitlines()]
        assert [line.get("loss") for line in parsed] == [None, 0.1 + 0.2, 0.1 + 0.2, None, 1e-300, 1e-300]
        assert parsed[0] == {"kind": "phase", "phase": "started", "time": 1.5}
    silent = Metrics(active=False)
    silent.write("step", step=1)
    silent.close()
