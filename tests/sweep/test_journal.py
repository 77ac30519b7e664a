"""Appends of processes that are killed: none that was acknowledged is lost, doubled or out of order."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmops.errors import ClusterError, UserError
from llmops.runs.store import PosixStore, open_store
from llmops.sweep import journal
from llmops.sweep.journal import CHUNK, StoreJournal


def start(url: str, name: str, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.sweep.journal_writer", url, name, str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def logs_of(url: str) -> list[dict[str, object]]:
    return StoreJournal(open_store(url)).read_logs(0)


def check(url: str, acknowledged: dict[str, list[int]]) -> None:
    """Each writer's numbers rise, each once and whole; all acknowledged ones are there."""
    logs = logs_of(url)
    assert [(log["writer"], log["number"], log["part"]) for log in logs[::2]] == [
        (log["writer"], log["number"], 0) for log in logs[1::2]
    ]
    assert all(log["part"] == 1 for log in logs[1::2])
    for name, known in acknowledged.items():
        numbers = [int(str(log["number"])) for log in logs[::2] if log["writer"] == name]
        assert numbers == sorted(set(numbers))
        assert set(known) <= set(numbers)


def test_killed_writers_lose_and_double_nothing(tmp_path: Path) -> None:
    dice = random.Random(3)
    names = [f"w{index}" for index in range(8)]
    acknowledged: dict[str, list[int]] = {}
    running = [start(str(tmp_path), name, 0, 60) for name in names]
    assert running[-1].stdout is not None
    running[-1].stdout.readline()  # the last one to start is at work
    for process in dice.sample(running, 5):
        process.kill()
        time.sleep(dice.uniform(0.0, 0.1))
    for name, process in zip(names, running, strict=True):
        output, _ = process.communicate(timeout=60)
        acknowledged[name] = [int(line) for line in output.split()]
    acknowledged["w7"] = [0, *acknowledged["w7"]]
    assert any(process.returncode == -signal.SIGKILL for process in running)
    check(str(tmp_path), acknowledged)
    # Whoever is next goes on behind them.
    process = start(str(tmp_path), "late", 0, 3)
    assert process.communicate(timeout=60)[0].split() == ["0", "1", "2"]
    assert [log["writer"] for log in logs_of(str(tmp_path))[-6:]] == ["late"] * 6
    check(str(tmp_path), acknowledged)


def test_object_store(s3_url: str) -> None:
    running = {name: start(s3_url, name, 0, 12) for name in ("a", "b", "c")}
    acknowledged = {
        name: [int(line) for line in process.communicate(timeout=90)[0].split()] for name, process in running.items()
    }
    assert acknowledged == {name: list(range(12)) for name in running}
    check(s3_url, acknowledged)


def test_chunks_say_the_same_as_their_parts(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    watcher, writer = StoreJournal(store), StoreJournal(store)
    for number in range(CHUNK + 3):
        writer.append_logs([{"number": number}])
    expected = list(range(CHUNK + 3))
    first = f"chunk-{0:08d}.json"
    written = store.get(first)
    assert [log["number"] for log in watcher.read_logs(0)] == expected
    for number in range(CHUNK):  # as a store that can delete might
        (tmp_path / f"{number:08d}.json").rename(tmp_path / f"{number:08d}.kept")
    assert [log["number"] for log in StoreJournal(store).read_logs(0)] == expected
    for number in range(CHUNK):
        (tmp_path / f"{number:08d}.kept").rename(tmp_path / f"{number:08d}.json")
    # Where its writer was killed before it, the next process makes it, to the bit.
    (tmp_path / first).unlink()
    assert [log["number"] for log in StoreJournal(store).read_logs(0)] == expected
    assert store.get(first) == written


def test_reading_goes_on_where_it_was(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    reader, writer = StoreJournal(store), StoreJournal(store)
    writer.append_logs([{"number": 0}, {"number": 1}])
    assert [log["number"] for log in reader.read_logs(0)] == [0, 1]
    writer.append_logs([{"number": 2}])
    assert [log["number"] for log in reader.read_logs(2)] == [2]
    assert reader.read_logs(3) == []
    assert [log["number"] for log in reader.read_logs(1)] == [1, 2]
    assert StoreJournal(store).read_logs(3) == []


def test_a_part_after_a_missing_one_waits(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    store.put(f"{1:08d}.json", json.dumps({"id": "x", "logs": [{"number": 1}]}).encode())
    reader = StoreJournal(store)
    assert reader.read_logs(0) == []
    store.put(f"{0:08d}.json", json.dumps({"id": "y", "logs": [{"number": 0}]}).encode())
    assert [log["number"] for log in reader.read_logs(0)] == [0, 1]


class Deaf(PosixStore):
    """A store that loses the answers to some requests: they were carried out, or not."""

    lose: list[bool]  # of each create to come: was it carried out before its answer was lost?

    def create(self, path: str, data: bytes, mode: int = 0o644) -> bool:
        if self.lose:
            if self.lose.pop(0):
                super().create(path, data, mode)
            raise ClusterError("the answer was lost")
        return super().create(path, data, mode)


@pytest.mark.parametrize("lose", [[True], [False], [False, True], [True, True, False]])
def test_a_lost_answer_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: list[bool]) -> None:
    monkeypatch.setattr(journal, "FIRST_PAUSE_S", 0.01)
    store = Deaf(tmp_path)
    store.lose = list(lose)
    writer = StoreJournal(store)
    writer.append_logs([{"number": 0}])
    writer.append_logs([{"number": 1}])
    assert [log["number"] for log in StoreJournal(store).read_logs(0)] == [0, 1]


def test_a_store_that_stays_away_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "FIRST_PAUSE_S", 0.001)
    store = Deaf(tmp_path)
    store.lose = [False] * 100
    with pytest.raises(ClusterError):
        StoreJournal(store).append_logs([{"number": 0}])
    assert len(store.lose) == 100 - journal.TRIES


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    PosixStore(tmp_path).put(f"{0:08d}.json", b'{"id": ')
    with pytest.raises(UserError, match=r"00000000\.json is damaged"):
        StoreJournal(PosixStore(tmp_path)).read_logs(0)
