"""Functions in jobs on this machine: what comes back, what is refused, and what goes on after an interruption."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmops
from llmops import api, executor, studies
from llmops.functions.call import RemoteTraceback
from tests.functions import work
from tests.functions.conftest import FAST


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def runs(here: llmops.Executor) -> dict[str, llmops.Run[Any]]:
    """One run of each kind, all at the same time."""
    two = llmops.Executor([*FAST, "cluster.ranks_per_node=2"])
    base = 10

    def local(x: int) -> int:
        """Of no module: it is pickled by value, with what it closes over."""
        return base + x

    return {
        "add": here.submit(work.add, 1, b=2),
        "local": here.submit(local, 5),
        "lambda": here.submit(lambda: base),
        "raises": here.submit(work.inverse, 0),
        "odd": here.submit(work.odd),
        "lock": here.submit(work.lock),
        "leaves": here.submit(work.leave),
        "ranks": two.submit(work.rank),
    }


def test_a_result_comes_back(runs: dict[str, llmops.Run[Any]]) -> None:
    assert runs["add"].result(120) == 3
    assert runs["local"].result(120) == 15
    assert (runs["lambda"].name, runs["lambda"].result(120)) == ("lambda", 10)
    assert runs["add"].status().state == "finished"
    assert runs["add"].name == "add"
    assert "adding on rank 0" in list(runs["add"].logs())
    assert runs["add"].exception() is None


def test_a_handle_may_be_made_again(runs: dict[str, llmops.Run[Any]]) -> None:
    again = pickle.loads(pickle.dumps(runs["add"]))
    assert again == runs["add"]
    assert again.result(120) == 3
    assert llmops.find(runs["add"].id).result(120) == 3


def test_an_exception_is_raised_again_with_its_traceback(runs: dict[str, llmops.Run[Any]]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        runs["raises"].result(120)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    text = str(caught.value.__cause__)
    assert "return 1 / x" in text
    assert "llmops/functions" not in text, "only the function's own frames are of interest"
    status = runs["raises"].status()
    assert status.state == "failed"
    assert len(status.run.attempts) == 1, "an exception is told at once"
    assert isinstance(runs["raises"].exception(), ZeroDivisionError)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("odd", "Odd: odd 3"),
        ("lock", "what lock returned cannot be pickled"),
        ("leaves", r"leave left by SystemExit\(3\)"),
    ],
)
def test_what_cannot_come_back_is_told(runs: dict[str, llmops.Run[Any]], name: str, told: str) -> None:
    with pytest.raises(llmops.RunFailed, match=told):
        runs[name].result(120)
    assert runs[name].status().state == "failed"


def test_every_rank_makes_the_call_and_knows_its_place(runs: dict[str, llmops.Run[Any]]) -> None:
    assert [runs["ranks"].result(120, rank=number) for number in (0, 1)] == [(0, 2, 0), (1, 2, 1)]
    with pytest.raises(llmops.RunFailed, match="rank 2 returned nothing"):
        runs["ranks"].result(rank=2)


def test_an_interrupted_call_goes_on_from_its_checkpoint(here: llmops.Executor, tmp_path: Path) -> None:
    run = here.submit(work.Counter(), 40, str(tmp_path))
    with pytest.raises(TimeoutError, match="goes on"):
        run.result(0.1)
    wait_for((tmp_path / "count").exists, "the count to begin")
    with pytest.raises(llmops.UserError, match="is running"):
        run.resume()
    os.kill(int(str(run.job_id).split(":")[1]), signal.SIGTERM)
    count, began = run.result(120)
    assert count == 40
    assert began[0] == 0
    assert 0 < began[1] < 40, "the second attempt had what the first one saved"
    first, second = (attempt.end for attempt in run.status().run.attempts)
    assert first is not None
    assert second is not None
    assert (first.reason, first.saved, first.exit_codes, second.reason) == ("preempted", True, {"0": 75}, "finished")


def test_cancelled_and_resumed(here: llmops.Executor, tmp_path: Path) -> None:
    wanted = tmp_path / "wanted"
    run = here.submit(work.sleep_until, str(wanted))
    wait_for(lambda: run.status().run.attempts, "its first attempt")
    assert run.cancel().state == "cancelled"
    with pytest.raises(llmops.RunFailed, match="cancelled"):
        run.result(60)
    wanted.write_text("here")
    assert run.resume().result(120) == "here"


def test_many_calls_in_order_with_an_exception_of_one(here: llmops.Executor) -> None:
    runs = here.map(work.inverse, [1, 0, 4])
    assert [type(run.exception(180)) for run in runs] == [type(None), ZeroDivisionError, type(None)]
    assert [run.result() for run in runs[::2]] == [1.0, 0.25]
    assert {run.id.rpartition(".")[0] for run in runs} == {runs[0].id.rpartition(".")[0]}, "they are one study"
    assert llmops.find(f"{runs[0].id.rpartition('.')[0]}/2") == runs[2]
    assert here.map(work.inverse, []) == []


def test_one_of_many_is_cancelled_before_it_begins(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = studies.trials
    one_at_a_time = llmops.Executor([*FAST, "sweep.max_parallel=1"])
    wanted = tmp_path / "wanted"
    runs = one_at_a_time.map(work.sleep_until, [str(wanted)] * 2)
    assert [run.status().state for run in runs] == ["pending", "pending"]
    asked = []
    monkeypatch.setattr(studies, "trials", lambda study: asked.append(study) or rows(study))
    for _ in range(20):
        assert runs[1].status().state == "pending"
    assert len(asked) < 10, "one look serves all elements, and the next second"
    assert runs[1].cancel().state == "cancelled"
    wanted.write_text("here")
    assert runs[0].result(120) == "here"
    with pytest.raises(llmops.RunFailed, match="cancelled"):
        runs[1].result(60)


def test_in_an_object_store_under_a_running_event_loop(home: Path, s3_url: str) -> None:
    """As in a notebook, whose cells run inside a loop; blocking calls and threads both work there."""

    async def cell() -> tuple[int, int]:
        run = llmops.Executor(FAST, runs_url=s3_url).submit(work.add, 40, 2)
        return run.result(120), await asyncio.to_thread(run.result, 120)

    assert asyncio.run(cell()) == (42, 42)


def stored(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "runs").glob("*") if path.is_dir())


def test_what_cannot_be_submitted_leaves_nothing_behind(here: llmops.Executor, home: Path) -> None:
    before = stored(home)
    with pytest.raises(llmops.UserError, match=r"inverse cannot be submitted.*cannot be pickled.*inside the function"):
        here.submit(work.inverse, work.lock())
    with pytest.raises(llmops.UserError, match="cannot be pickled"):
        here.map(work.inverse, [1, work.lock()])
    with pytest.raises(llmops.UserError, match=r"--backend nowhere"):
        llmops.Executor(backend="nowhere").submit(work.inverse, 1)
    with pytest.raises(llmops.UserError, match=r"no key cluster\.gpu"):
        llmops.Executor(["cluster.gpu=1"]).submit(work.inverse, 1)
    with pytest.raises(llmops.UserError, match="2 calls would be 4 runs"):
        llmops.Executor([*FAST, "env.A=1,2"]).map(work.inverse, [1, 2])
    with pytest.raises(llmops.UserError, match="give a list"):
        llmops.Executor("recipe=tiny")
    with pytest.raises(llmops.UserError, match="give a list"):
        llmops.submit("recipe=tiny")
    pods = llmops.Executor(["cluster.image=x", "runs_url=s3://bucket/runs", "code.enabled=false"], backend="k8s")
    with pytest.raises(llmops.UserError, match="functions do not run on k8s"):
        pods.submit(work.inverse, 1)
    far = dataclasses.replace(api.prepare(FAST, command=["true"]), login="login.example.org")
    with pytest.raises(llmops.UserError, match=r"submit on login\.example\.org itself"):
        executor._python(far)
    assert stored(home) == before
