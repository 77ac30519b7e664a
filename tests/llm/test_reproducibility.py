"""What is recorded of a machine, and two runs held against each other."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch

from llm.tools import compare_runs, merge_traces
from llm.train.tracing import Trace
from llm.utils.reproducibility import differences, note, record
from llm.utils.storage import open_storage

LAYOUT = {"dp_shard": 2, "tp": 1}


def test_a_record_is_plain_and_equal_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    now = record(LAYOUT, torch.device("cpu"), "abc")
    assert now["torch"] == torch.__version__
    assert now["environment"]["NCCL_ALGO"] == "Ring"
    assert "hidden" not in json.dumps(now)
    assert "NCCL_DEBUG" not in now["environment"]
    assert differences(msgspec.json.decode(msgspec.json.encode(now)), now) == []  # as a checkpoint keeps it
    assert note(now, now) is None


def test_changes_are_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    then = record(LAYOUT, torch.device("cpu"), "abc")
    threads = torch.get_num_threads()
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    try:
        torch.set_num_threads(threads + 1)
        now = record({**LAYOUT, "tp": 2}, torch.device("cpu"), "abc")
    finally:
        torch.set_num_threads(threads)
    then["torch"] = "2.12"
    assert note(then, now) == (
        "note: not to be expected bit-identical to a run that was never stopped: "
        f"torch 2.12 -> {torch.__version__}, threads {threads} -> {threads + 1}, tp 1 -> 2, MKL_CBWR unset -> AVX2"
    )


def run(folder: Path, losses: dict[int, float], attempt: int = 0) -> str:
    path = folder / "metrics" / f"{attempt:04d}"
    path.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "step", "step": step, "loss": loss, "grad_norm": 1.0, "lr": 0.1} for step, loss in losses.items()]
    text = "".join(json.dumps(line) + "\n" for line in [{"kind": "phase", "phase": "started"}, *lines])
    (path / "000000.jsonl").write_text(text)
    return str(folder)


def test_runs_that_are_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", {1: 3.0, 2: 2.9, 3: 9.9})
    run(tmp_path / "a", {3: 2.8, 4: 2.7}, attempt=1)  # step 3 again, after a resume
    b = run(tmp_path / "b", {1: 3.0, 2: 2.9, 3: 2.8})
    assert compare_runs.main([a, b]) == 0
    assert "steps: 4 and 3, 3 in both\nequal, bit by bit" in capsys.readouterr().out


def test_the_first_step_that_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", {1: 3.0, 2: 2.9, 3: 2.8})
    b = run(tmp_path / "b", {1: 3.0, 2: 2.9000000000000004, 3: 2.7})
    assert compare_runs.main([a, b]) == 1
    out = capsys.readouterr().out
    assert "step 2 is the first that differs: loss 2.9 and 2.9000000000000004" in out
    assert "step 3, the last in both: loss 2.8 and 2.7" in out


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", {1: 3.0})
    assert compare_runs.main([a, str(tmp_path / "nothing")]) == 2
    assert "nothing has no metrics of steps" in capsys.readouterr().err


def test_traces_of_all_ranks_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(3):
        trace = Trace(open_storage(str(tmp_path)), 0, rank)
        for step in range(1, 4):
            trace.add("backward", step, step + 0.1 * (rank + 1), step)
        trace.close()
    merged = tmp_path / "trace.json"
    assert merge_traces.main([str(tmp_path), "--output", str(merged)]) == 0
    found = json.loads(merged.read_text())["traceEvents"]
    assert sorted({event["pid"] for event in found}) == [0, 1, 2]
    assert "median of ranks    200.0 ms; slowest: rank 2 300.0, rank 1 200.0" in capsys.readouterr().out
    assert merge_traces.main([str(tmp_path / "none")]) == 2
