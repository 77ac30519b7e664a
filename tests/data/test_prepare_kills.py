"""Preparations that are killed, stopped, and done by several ranks: the same bytes, and nothing done twice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.preparing import contents, jsonl, shakespeare

TREE = Path(__file__).parents[2]
WAIT_S = 120


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_bytes(jsonl(shakespeare()))
    return folder / "a.jsonl"


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "llm.tools.prepare_data", "--input", str(corpus), "--output", str(out),
        "--unit-mb", "0.02", "--deduplicate", "--validation", "0.1", *more,
    ]  # fmt: skip


def start(*args, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*args), cwd=TREE, env={**os.environ, **environment}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        shown, _ = process.communicate(timeout=WAIT_S)
    finally:
        kill(process)
    assert process.returncode == code, shown
    return shown


def kill(process: subprocess.Popen[str]) -> None:
    """The process and all its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def counts(shown: str) -> tuple[int, int]:
    found = re.search(r"prepared (\d+) units; (\d+) had been prepared before", shown)
    assert found, shown
    return int(found[1]), int(found[2])


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def records(out: Path) -> set[str]:
    return {path.name for path in (out / "parts" / "units").glob("*.json")}


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> tuple[dict[str, bytes], int]:
    """What comes out of one process that nobody kills, and of how many units."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done, before = counts(finish(start(corpus, out, "--workers", "1")))
    assert before == 0
    assert done > 50
    return contents(out), done


def test_the_number_of_workers_changes_nothing(corpus, undisturbed, tmp_path):
    finish(start(corpus, tmp_path / "out", "--workers", "3"))
    assert contents(tmp_path / "out") == undisturbed[0]


def test_all_are_killed_and_only_what_is_missing_is_done_again(corpus, undisturbed, tmp_path):
    out = tmp_path / "out"
    at_once: dict[str, int] = {}
    redone = 0
    for wanted in (5, 25):
        process = start(corpus, out, "--workers", "2")
        until(lambda: len(records(out)) >= wanted, "no units are done")  # noqa: B023
        kill(process)
        kept = records(out)
        assert len(kept) < undisturbed[1], "it was over before it was killed"
        for name, changed in at_once.items():
            assert (out / name).stat().st_mtime_ns == changed
        shards = [path for path in out.glob("*.tokens") if f"{path.name.split('-')[1]}.json" in kept]
        at_once = {path.name: path.stat().st_mtime_ns for path in shards}
        redone = len(kept)
    done, before = counts(finish(start(corpus, out, "--workers", "2")))
    assert (done, before) == (undisturbed[1] - redone, redone)
    assert contents(out) == undisturbed[0]
    for name, changed in at_once.items():
        assert (out / name).stat().st_mtime_ns == changed


def test_a_worker_is_killed_and_its_unit_is_done_again(corpus, undisturbed, tmp_path):
    out = tmp_path / "out"
    process = start(corpus, out, "--workers", "2")
    killed = 0
    for wanted in (3, 20):
        until(lambda: len(records(out)) >= wanted, "no units are done")  # noqa: B023
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
                killed += 1
                break
    assert killed == 2
    assert counts(finish(process)) == (undisturbed[1], 0)
    assert contents(out) == undisturbed[0]


def test_a_unit_that_kills_its_workers_is_given_up(corpus, tmp_path):
    """A bounded number of tries, and an error that says what may help."""
    from llm.data.prepare import pool
    from llm.data.prepare.run import Watch, plan_job
    from llm.utils.config import PrepareConfig

    config = PrepareConfig(input=[str(corpus)], output=str(tmp_path / "out"))
    with pytest.raises(pool.WorkError, match=r"item 0 of no such stage has ended 3 processes \(exit code 1\)"):
        list(pool.run(config, plan_job(config).plan, "no such stage", [0], 1, Watch()))


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "stop file"])
def test_a_stop_leaves_what_is_done_and_the_next_run_goes_on(corpus, undisturbed, tmp_path, how):
    out, control = tmp_path / "out", tmp_path / "control"
    control.mkdir()
    watched = {"LLMOPS_CONTROL_DIR": str(control)} if how == "stop file" else {}
    process = start(corpus, out, "--workers", "1", **watched)
    until(lambda: len(records(out)) >= 3, "no units are done")
    if how == "stop file":
        (control / "stop").write_text(json.dumps({"cause": "test", "deadline": time.time() + 60}))
    else:
        process.send_signal(getattr(signal, how))
    shown = finish(process, 130 if how == "SIGINT" else 75)
    kept = records(out)
    assert 3 <= len(kept) < undisturbed[1]
    assert "the same command goes on from here" in shown
    if how == "stop file":
        assert json.loads((control / "stopped.0").read_bytes())["step"] == len(kept)
        assert json.loads((control / "heartbeat.0").read_bytes())["phase"] == "units"
    assert counts(finish(start(corpus, out, "--workers", "2"))) == (undisturbed[1] - len(kept), len(kept))
    assert contents(out) == undisturbed[0]


def test_ranks_share_the_work(corpus, undisturbed, tmp_path):
    """Three ranks, the last one late."""
    out = tmp_path / "out"
    first = [start(corpus, out, "--workers", "1", RANK=str(rank), WORLD_SIZE="3") for rank in (1, 0)]
    until(lambda: len(list((out / "parts" / "hashes").glob("*.json"))) > 10, "no hashes")
    first.append(start(corpus, out, "--workers", "1", RANK="2", WORLD_SIZE="3"))
    done = [counts(finish(process))[0] for process in first]
    assert sum(done) == undisturbed[1]
    assert max(done) - min(done) <= 1
    assert contents(out) == undisturbed[0]


def test_ranks_do_not_wait_for_ever(corpus, tmp_path):
    shown = finish(start(corpus, tmp_path / "out", "--wait-s", "1", RANK="1", WORLD_SIZE="2"), 1)
    assert "rank 0 has not begun this preparation for prepare.wait_s=1 s" in shown
