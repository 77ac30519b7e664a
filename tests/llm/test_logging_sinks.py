"""TensorBoard and Weights & Biases, read back by the programs that they are meant for."""

from __future__ import annotations

import builtins
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm.train import sinks, tensorboard
from llm.train.sinks import Sinks
from llm.utils.config import ConfigError, LoggingConfig
from llm.utils.storage import open_storage


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "PART_SECONDS", 0.0)  # every event in a file of its own, where the one before is there
    written = Sinks()
    written.open(LoggingConfig(tensorboard=True), open_storage(str(tmp_path)), 3, "run", {})
    for step in range(1, 301):
        written.write("step", step, loss=1.0 / step, mfu=None, grad_norm=float("nan"))
    written.write("eval", 1 << 40, loss=0.25)
    written.close()
    folder = tmp_path / "tensorboard" / "0003"
    assert len(list(folder.iterdir())) > 1
    found = curves(folder)
    assert found.keys() == {"step/loss", "eval/loss"}
    assert [step for step, _ in found["step/loss"]] == list(range(1, 301))
    assert [value for _, value in found["step/loss"]] == pytest.approx([1.0 / step for step in range(1, 301)])
    assert found["eval/loss"] == [(1 << 40, 0.25)]


def test_a_torn_event_file_is_noticed_by_its_checksums(tmp_path: Path) -> None:
    data = tensorboard.header(0.0) + tensorboard.scalars({"a": 1.0}, 1, 0.0) + tensorboard.scalars({"a": 2.0}, 2, 0.0)
    (tmp_path / tensorboard.file_name(0)).write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    assert curves(tmp_path) == {"a": [(1, 1.0)]}


def test_a_sink_that_fails_warns_once_and_training_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written = Sinks()
    (tmp_path / "tensorboard").mkdir()
    written.open(LoggingConfig(tensorboard=True), open_storage(str(tmp_path)), 0, "run", {})
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    written.write("step", 1, loss=1.0)
    written.close()
    written.write("step", 2, loss=1.0)
    assert capfd.readouterr().err.count("warning: nothing more goes to tensorboard") == 1


def test_a_missing_library_is_named_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"logging\.wandb=offline needs the package wandb.*llmops\[logging\]"):
        Sinks().open(LoggingConfig(wandb="offline"), open_storage(str(tmp_path)), 0, "run", {})


OFFLINE = """
import sys
from llm.train.sinks import Sinks
from llm.utils.config import LoggingConfig
from llm.utils.storage import open_storage
run, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
written = Sinks()
config = LoggingConfig(wandb="offline", wandb_project="tests")
written.open(config, open_storage(run), 0, "run-17", {"train": {"lr": 0.1}})
for step in range(first, last + 1):
    written.write("step", step, loss=1.0 / step)
written.close()
"""


def records(file: Path) -> list[bytes]:
    """Of a file in LevelDB's log format, after wandb's own header of 7 bytes."""
    data, at, found = file.read_bytes(), 7, [b""]
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        found[-1] += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(b"")
    return found[:-1]


def history(folder: Path) -> list[dict[str, Any]]:
    """What `wandb sync` would send of an offline run: its rows, in order."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    (file,) = folder.glob("*.wandb")
    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            assert record.run.run_id == "run-17"
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def test_wandb_offline_goes_on_after_going_back(tmp_path: Path) -> None:
    """Two attempts, the second from an earlier step: both are there, with our step beside them."""
    for first, last in ((1, 4), (3, 5)):
        subprocess.run(
            [sys.executable, "-c", OFFLINE, str(tmp_path), str(first), str(last)],
            cwd=Path(__file__).parents[2],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path)},
            check=True,
            timeout=120,
        )
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    steps = [[row["trainer/step"] for row in history(folder)] for folder in folders]
    assert sorted(steps) == [[1, 2, 3, 4], [3, 4, 5]]
    assert history(folders[0])[0]["step/loss"] == 1.0
