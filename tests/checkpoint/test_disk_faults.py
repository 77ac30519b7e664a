"""Real file systems that fill up, or stop answering: saves fail cleanly, and training goes on."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llm.checkpoint.lineage import commits
from llm.checkpoint.retention import Retention
from llm.train import saver
from llm.train.checkpoint import Checkpointer, Event
from llm.train.logging import Metrics
from llm.train.world import World
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import open_storage
from tests.checkpoint.ranks import DEADLINE_S, Nursery, alive, fill, states, until

MEGABYTES = 2.0


def test_a_disk_that_fills_up_later(nursery: Nursery, tmp_path: Path, small_disk: Path) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    ranks = nursery.start(tmp_path / "ranks", str(run), keep_last=1, megabytes=MEGABYTES).wait_ready()
    first = ranks.save()
    assert ranks.outcome(first)["event"] == "committed"
    for spare in (1_500_000, 500_000, 0):  # one rank's files fit, none, nothing at all
        fill(ballast, spare)
        commit = ranks.save()
        assert ranks.outcome(commit)["event"] == "failed"
        ranks.wait_step(20)  # training goes on, and writes its metrics
        failed = [event for rank in (0, 1) for event in ranks.events(rank, "failed") if event["commit"] == commit]
        reasons = "\n".join(event["reason"] for event in failed)
        assert "No space left on device, " in reasons
        assert "bytes do not fit: " in reasons
        check = nursery.check(tmp_path / f"check{spare}", str(run), MEGABYTES)
        assert (check["good"], check["bad"]) == ([first], [])
    left = [str(path) for path in (run / "checkpoints").rglob("rank*") if first not in str(path)]
    assert left == [], "what failed takes up space"
    ballast.unlink()
    last = ranks.save()
    assert ranks.outcome(last)["event"] == "committed"
    ranks.stop()
    check = nursery.check(tmp_path / "check", str(run), MEGABYTES)
    assert (check["good"], check["bad"]) == ([last], [])
    assert check["lines"]["0000"] == list(range(1, len(check["lines"]["0000"]) + 1)), "each line is there once"
    assert len(check["lines"]["0000"]) >= int(last.split("/")[1].removeprefix("step_"))


def test_small_files_on_a_full_disk(small_disk: Path) -> None:
    storage = LocalStorage(small_disk)
    storage.create("there", b"value")
    fill(small_disk / "ballast")
    for method in (storage.create, storage.replace, storage.write):
        with pytest.raises(OSError, match=r"No space left on device, 10000 of 10000 bytes do not fit: '.*/new'"):
            method("new", b"x" * 10_000)
    with pytest.raises(OSError, match="No space left"):
        storage.replace("there", b"x" * 10_000)
    assert storage.read("there") == b"value"
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "there"]


def test_metrics_lose_no_line_on_a_full_disk(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics()
    metrics.open(LocalStorage(small_disk), 0)
    metrics.write("step", step=1)
    fill(small_disk / "ballast")
    for step in range(2, 200):  # more than the page that the file has already
        metrics.write("step", step=step, text="x" * 100)
    handed = metrics.hand_over()
    assert handed, "a commit of now takes along what could not be written"
    assert capfd.readouterr().err.count("warning: cannot append to metrics/0000/000000.jsonl") == 1
    (small_disk / "ballast").unlink()
    metrics.write("step", step=200)
    metrics.close()
    parts = sorted((small_disk / "metrics" / "0000").iterdir())
    assert [path.name for path in parts] == [f"{number:06d}.jsonl" for number in range(len(parts))]
    lines = [line for part in parts for line in part.read_text().splitlines()]
    assert [line.split(",")[1] for line in lines] == [f' "step": {step}' for step in range(1, 201)]


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Whoever writes waits in the kernel, and cannot be killed."""
    subprocess.run(["fsfreeze", "--freeze", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(folder)], check=True)


def wait(checkpointer: Checkpointer) -> Event:
    """The end of a save, as a training loop finds it."""
    return until(lambda: checkpointer.poll(), "the end of a save")[0]


def test_a_disk_that_does_not_answer(freezable_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "GRACE_S", 0.5)
    storage = open_storage(str(freezable_disk / "run"))
    world = World(0, 1, 0, torch.device("cpu"), grouped=False)
    checkpointer = Checkpointer(storage, world, 0, 0, Retention(), limit_s=DEADLINE_S)
    values = {"w": torch.zeros(1000, 1000)}
    checkpointer.attach(values)
    try:
        values["w"].fill_(1)
        checkpointer.save(1, {})
        assert wait(checkpointer).committed
        stuck = checkpointer.saver.writer_pid or 0
        with frozen(freezable_disk):
            checkpointer.limit_s = 2.0
            checkpointer.save(2, {})
            until(lambda: "D" in states(stuck), "a writer that waits in the kernel")
            assert "did not end within" in (wait(checkpointer).reason or "")
            assert "D" in states(stuck), "training did not wait for it"
            checkpointer.limit_s = DEADLINE_S
            values["w"].fill_(3)
            checkpointer.save(3, {})  # by another writer
            values["w"].fill_(99)
            assert checkpointer.poll() == []
        assert wait(checkpointer).committed
        until(lambda: not alive(stuck), "the end of the writer that was stuck")
    finally:
        checkpointer.close()
    assert [commit.step for commit in commits(storage)] == [1, 3]
    found = {"w": torch.zeros(1000, 1000)}
    reader = Checkpointer(storage, world, 1, 0, Retention(), limit_s=DEADLINE_S)
    reader.attach(found)
    reader.load(commits(storage)[-1])
    reader.close()
    assert (found["w"] == 3).all()
