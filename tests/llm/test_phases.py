"""The parts of a step, and the trace that ranks write of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from llm.train import tracing
from llm.train.phases import Phases
from llm.train.tracing import Trace
from llm.utils.storage import open_storage

CPU = torch.device("cpu")


def busy(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_parts_add_up_to_the_step() -> None:
    phases = Phases(CPU)
    phases.take(0)
    began = time.perf_counter()
    for _ in range(2):
        with phases("forward"):
            busy(0.01)
        with phases("backward"):
            busy(0.02)
    with phases("optimizer"):
        busy(0.01)
        with phases("stall"):
            busy(0.03)
    busy(0.005)
    parts = phases.take(1)
    seconds = time.perf_counter() - began
    assert list(parts) == ["other_s", "forward_s", "backward_s", "optimizer_s", "stall_s"]
    assert sum(parts.values()) == pytest.approx(seconds, abs=0.002)
    assert parts["forward_s"] >= 0.02
    assert parts["backward_s"] >= 0.04
    assert 0.01 <= parts["optimizer_s"] < 0.03 <= parts["stall_s"]  # what is inside does not count twice
    assert parts["other_s"] >= 0.005
    assert "forward_s" not in phases.take(2)


def test_a_part_that_fails_is_over() -> None:
    phases = Phases(CPU)
    with pytest.raises(ZeroDivisionError), phases("forward"):
        _ = 1 / 0
    with phases("backward"):
        pass
    assert phases.take(1).keys() == {"other_s", "forward_s", "backward_s"}


def test_costs_microseconds() -> None:
    phases = Phases(CPU)
    best = float("inf")
    for step in range(20):
        began = time.perf_counter()
        for _ in range(1000):
            with phases("forward"):
                pass
        best = min(best, (time.perf_counter() - began) / 1000)
        phases.take(step)
    assert best < 10e-6


def test_shown_to_the_profiler_when_asked() -> None:
    phases = Phases(CPU)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with phases("unseen"):
            pass
        phases.show_to_profiler(True)
        with phases("seen"):
            pass
        phases.show_to_profiler(False)
    names = {event.name for event in profile.events()}
    assert "seen" in names
    assert "unseen" not in names


def read(folder: Path) -> list[dict[str, object]]:
    return [event for path in sorted(folder.iterdir()) for event in json.loads(path.read_text())["traceEvents"]]


def test_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "SEGMENT_EVENTS", 3)
    phases = Phases(CPU, Trace(open_storage(str(tmp_path)), 2, 7))
    began = time.time()
    for step in (1, 2, 3):
        with phases("optimizer"), phases("stall"):
            busy(0.001)
        phases.take(step)
    with phases("evaluate"):
        busy(0.001)
    phases.close()
    ended = time.time()
    files = sorted(path.name for path in (tmp_path / "traces" / "0002").iterdir())
    assert files[0] == "rank00007.000000.json"
    assert len(files) > 1
    events = [event for event in read(tmp_path / "traces" / "0002") if event["ph"] == "X"]
    assert [(event["name"], event.get("args")) for event in events] == [
        *((name, {"step": step}) for step in (1, 2, 3) for name in ("stall", "optimizer")),
        ("evaluate", None),
    ]
    for event in events:
        assert event["pid"] == 7
        assert began * 1e6 - 1e4 <= event["ts"] <= ended * 1e6 + 1e4
        assert 1e3 <= event["dur"] < 1e6
    stall, optimizer = events[:2]
    assert optimizer["ts"] <= stall["ts"]
    assert optimizer["dur"] >= stall["dur"]


def test_a_trace_that_cannot_be_written_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracing, "SEGMENT_EVENTS", 1)
    (tmp_path / "traces").write_text("in the way")
    trace = Trace(open_storage(str(tmp_path)), 0, 0)
    for _ in range(20):
        trace.add("forward", 0.0, 1.0)
        busy(0.002)
    trace.close()
    assert capfd.readouterr().err.count("warning: the phase trace has gaps") == 1
