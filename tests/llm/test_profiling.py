"""Profiles of chosen steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from llm.train.phases import Phases
from llm.utils.config import ProfileConfig
from llm.utils.profiling import Profiler
from llm.utils.storage import open_storage

CPU = torch.device("cpu")


def profiler(folder: Path, rank: int = 0) -> Profiler:
    config = ProfileConfig(steps=[2, 4], rank=0, memory=True)
    return Profiler(config, rank, CPU, open_storage(str(folder)), 1)


def train(profiler: Profiler, phases: Phases) -> None:
    for step in range(1, 6):
        phases.show_to_profiler(profiler.wants(step))
        with profiler.step(step), phases("forward"):
            torch.ones(50, 50) @ torch.ones(50, 50)


def test_chosen_steps_are_recorded_with_their_parts(tmp_path: Path) -> None:
    train(profiler(tmp_path), Phases(CPU))
    folder = tmp_path / "profiles" / "0001"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000002.rank00000.trace.json.gz",
        "step_00000002.rank00000.txt",
        "step_00000004.rank00000.trace.json.gz",
        "step_00000004.rank00000.txt",
    ]
    assert "aten::mm" in (folder / "step_00000002.rank00000.txt").read_text()
    trace = json.loads(gzip.decompress((folder / "step_00000004.rank00000.trace.json.gz").read_bytes()))
    assert {"aten::mm", "forward"} <= {event["name"] for event in trace["traceEvents"]}


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    train(profiler(tmp_path, rank=1), Phases(CPU))
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profiles").write_text("in the way")
    train(profiler(tmp_path), Phases(CPU))
    assert "warning: profiles/0001/step_00000002.rank00000.txt was not written" in capfd.readouterr().err


def test_out_of_memory_goes_on_as_itself(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), profiler(tmp_path).memory():
        raise torch.OutOfMemoryError
