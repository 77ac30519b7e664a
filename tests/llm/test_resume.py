"""Runs that are stopped, signalled and resumed must be the run that was left alone."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import msgspec
import pytest

from llm.checkpoint.format import Commit, seal
from llm.checkpoint.lineage import commits, newest_commit, read_manifest
from llm.utils.storage import open_storage
from tests.llm.harness import Attempt, fingerprints, lines, start, tiny, trajectory

STEPS = 60


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, from the first step to the last."""
    run = tmp_path_factory.mktemp("undisturbed")
    assert start(run, tiny(), ranks=2).finish() == [0, 0]
    return run


def stop_at(attempt: Attempt, step: int) -> int:
    """Request a stop once ``step`` is done; returns the step after which the ranks stopped."""
    attempt.wait_for_step(step)
    attempt.stop()
    assert attempt.finish() == [75] * len(attempt.ranks)
    markers = [json.loads((attempt.control / f"stopped.{rank}").read_text()) for rank in range(len(attempt.ranks))]
    assert len({(marker["step"], marker["commit"]) for marker in markers}) == 1
    commit = Commit.parse(markers[0]["commit"])
    assert commit == newest_commit(open_storage(str(attempt.run)))
    assert commit.step == markers[0]["step"] < STEPS
    return commit.step


def test_undisturbed_run_learns_and_reports(undisturbed: Path) -> None:
    steps = trajectory(undisturbed)
    assert list(steps) == list(range(1, STEPS + 1))
    assert steps[1][0] > 5.4
    assert steps[STEPS][0] < 3.4
    assert [line["step"] for line in lines(undisturbed, 0, "eval")] == [20, 40, 60]
    phases = [line["phase"] for line in lines(undisturbed, 0, "phase")]
    assert phases[:5] == ["started", "imported", "distributed", "loaded", "first_step"]
    assert phases[-1] == "finished"
    assert [commit.step for commit in commits(open_storage(str(undisturbed)))] == [25, 50, 60]
    first, second = (undisturbed / "samples.txt").read_text().split("\n\n", 1)
    assert first.startswith("To be")
    assert second.startswith("HAMLET.")
    heartbeat = json.loads((undisturbed / "control-0" / "heartbeat.1").read_text())
    assert (heartbeat["step"], heartbeat["first_step"], heartbeat["phase"]) == (STEPS, 1, "finished")


def test_stopped_and_resumed_is_bit_identical(undisturbed: Path, tmp_path: Path) -> None:
    config = tiny(data__num_workers=0)  # reading ahead changes nothing
    first = start(tmp_path / "run", config, ranks=2)
    first.wait_for_step(3)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        first.signal_everything(number)
    stopped = stop_at(first, 7)
    second = start(tmp_path / "run", config, ranks=2, attempt=1)
    assert second.finish() == [0, 0]
    assert second.heartbeat()["first_step"] == stopped + 1
    run = tmp_path / "run"
    for kind in ("step", "eval"):
        assert trajectory(run, kind) == trajectory(undisturbed, kind)
    assert (run / "samples.txt").read_text() == (undisturbed / "samples.txt").read_text()
    ends = [newest_commit(open_storage(str(where))) for where in (run, undisturbed)]
    assert fingerprints(run, ends[0]) == fingerprints(undisturbed, ends[1])


def test_resumes_on_another_number_of_ranks(undisturbed: Path, tmp_path: Path) -> None:
    expected = trajectory(undisturbed)
    run = tmp_path / "run"
    stopped = stop_at(start(run, tiny(), ranks=1), 4)
    stopped = stop_at(start(run, tiny(), ranks=2, attempt=1), stopped + 10)
    assert start(run, tiny(), ranks=1, attempt=2).finish() == [0]
    found = trajectory(run)
    assert list(found) == list(expected)
    for step, (loss, rate, norm, tokens) in found.items():
        assert (rate, tokens) == (expected[step][1], expected[step][3])
        assert loss == pytest.approx(expected[step][0], rel=2e-3), step
        assert norm == pytest.approx(expected[step][2], rel=5e-2), step
    for step in range(1, 6):  # before rounding has had time to spread
        assert found[step][0] == pytest.approx(expected[step][0], rel=1e-6)


def test_stop_before_the_first_step_keeps_the_commit(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "checkpoints", run / "checkpoints")
    attempt = start(run, tiny(), ranks=1, attempt=1, resume="checkpoints/step_00000025/0000-0000")
    attempt.stop()
    assert attempt.finish() == [75]
    marker = json.loads((attempt.control / "stopped.0").read_text())
    assert (marker["step"], marker["commit"]) == (25, "checkpoints/step_00000025/0000-0000")
    assert [commit.attempt for commit in commits(open_storage(str(run)))] == [0, 0, 0]


def test_an_imported_checkpoint_starts_where_its_step_is(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "checkpoints", run / "checkpoints")
    storage = open_storage(str(run))
    commit = newest_commit(storage)
    assert commit is not None
    state = {"step": commit.step, "imported": {"values": {"optimizer.step": 7}}}
    foreign = msgspec.structs.replace(read_manifest(storage, commit), state=state)
    storage.replace(f"{commit.path}/manifest.json", seal(foreign))
    config = tiny()
    config["train"]["max_steps"] = commit.step + 3
    attempt = start(run, config, ranks=1, attempt=1, resume="newest")
    (output,) = (rank.communicate(timeout=90)[0] for rank in attempt.ranks)
    assert attempt.ranks[0].returncode == 0, output
    assert f"the data goes on at batch {commit.step}" in output
    assert [line["step"] for line in lines(run, 1, "step")] == [commit.step + 1, commit.step + 2, commit.step + 3]


def flip_a_bit(run: Path, step: int, rank: int) -> None:
    shard = run / f"checkpoints/step_{step:08d}/0000-0000/rank{rank:05d}-000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 4
    shard.write_bytes(data)


def test_damage_that_one_rank_finds_sends_all_to_the_commit_before(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "checkpoints", run / "checkpoints")
    flip_a_bit(run, 60, rank=1)
    attempt = start(run, tiny(), ranks=2, attempt=1)
    outputs = [rank.communicate(timeout=90)[0] for rank in attempt.ranks]
    assert [rank.returncode for rank in attempt.ranks] == [0, 0]
    warning = next(line for line in outputs[0].splitlines() if "warning" in line)
    assert "rank 1: checkpoints/step_00000060/0000-0000/rank00001-000.safetensors" in warning
    assert "going back to checkpoints/step_00000050/0000-0000" in warning
    newest = newest_commit(open_storage(str(run)))
    assert newest is not None
    assert (newest.attempt, newest.step) == (1, 60)
    first, again = (newest_commit(open_storage(str(where))) for where in (undisturbed, run))
    assert first is not None
    assert again is not None
    assert fingerprints(undisturbed, first) == fingerprints(run, again)


def test_damage_everywhere_is_named_by_all(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "checkpoints", run / "checkpoints")
    for step in (25, 50, 60):
        flip_a_bit(run, step, rank=1)
    attempt = start(run, tiny(), ranks=2, attempt=1)
    outputs = [rank.communicate(timeout=90)[0] for rank in attempt.ranks]
    assert [rank.returncode for rank in attempt.ranks] == [1, 1]
    for output in outputs:
        assert "rank 1: checkpoints/step_00000025/0000-0000/rank00001-000.safetensors" in output
        assert "there is no earlier checkpoint" in output
        assert "Traceback" not in output
