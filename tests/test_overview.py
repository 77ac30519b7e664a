"""All runs at once: what is remembered, what is read anew, and what is shown."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from llmops import api, backends, overview
from llmops.backends.base import Look
from llmops.errors import UserError
from llmops.job import JobView
from llmops.monitor import memory
from llmops.overview import Wanted
from llmops.runs import records
from tests.conftest import MadeRun, RunMaker
from tests.monitor.history import T0, preempted_and_crashed


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPS_CACHE_DIR", str(tmp_path / "cache"))


class Scheduler:
    """Answers for the jobs that it was given, and counts how often it was asked."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobView] = {}
        self.asked: list[list[str]] = []

    def look(self, job_ids: Any, tags: Any = ()) -> Look:
        self.asked.append(sorted(job_ids))
        gone = {job_id: JobView(job_id, "gone") for job_id in job_ids}
        return Look({**gone, **{job_id: view for job_id, view in self.jobs.items() if job_id in job_ids}}, {})


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    made = Scheduler()
    monkeypatch.setattr(backends, "load", lambda name: made)
    return made


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the runs that were read."""
    seen: list[str] = []
    load = records.load_run

    def counting(store: Any, *ahead: Any) -> Any:
        seen.append(store.url.rsplit("/", 1)[-1])
        return load(store, *ahead)

    monkeypatch.setattr(records, "load_run", counting)
    return seen


def finished(make_run: RunMaker, name: str = "done", **changes: Any) -> MadeRun:
    made = make_run(name, **changes)
    made.submission(0, f"1{make_run.count}")
    made.start(0, job_id=f"1{make_run.count}")
    made.metrics(0, range(1, 4))
    made.end(0, "finished", last_step=3)
    return made


def running(make_run: RunMaker, scheduler: Scheduler, job_id: str = "900", **changes: Any) -> MadeRun:
    made = make_run("alive", **changes)
    made.submission(0, job_id)
    made.start(0, job_id=job_id)
    scheduler.jobs[job_id] = JobView(job_id, "running")
    return made


def test_runs_that_are_over_are_read_once(make_run: RunMaker, scheduler: Scheduler, reads: list[str]) -> None:
    done = [finished(make_run).load().id for _ in range(3)]
    alive = running(make_run, scheduler).load().id
    first = overview.overview(runs_url=make_run.runs_url).rows
    reads.clear()
    again = overview.overview(runs_url=make_run.runs_url).rows
    assert [each["id"] for each in again] == [*done, alive]
    assert [each["state"] for each in again] == ["finished"] * 3 + ["running"]
    assert again[:3] == first[:3]
    assert reads == [alive]
    assert scheduler.asked == [["900"], ["900"]]


def test_one_that_is_resumed_is_read_again(make_run: RunMaker, scheduler: Scheduler) -> None:
    made = finished(make_run)
    assert overview.overview(runs_url=make_run.runs_url).rows[0]["state"] == "finished"
    record = records.SubmissionRecord(number=1, tag="again", backend="slurm", created=T0)
    assert records.write_submission(made.store, record)
    records.register_job(made.store, 1, "555", "launcher")
    scheduler.jobs["555"] = JobView("555", "pending", "Resources")
    assert overview.overview(runs_url=make_run.runs_url).rows[0]["state"] == "pending"
    made.start(1, submission=1, job_id="555")
    made.end(1, "failed")
    assert [overview.overview(runs_url=make_run.runs_url).rows[0]["state"] for _ in range(2)] == ["failed", "failed"]


def test_what_only_the_scheduler_says_is_asked_again_for_a_while(
    make_run: RunMaker, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run()
    made.submission(0, "77")
    for _ in range(2):
        (row,) = overview.overview(runs_url=make_run.runs_url).rows
        assert (row["state"], scheduler.asked.pop()) == ("failed", ["77"])
    scheduler.jobs["77"] = JobView("77", "running")  # SLURM may requeue what has failed
    assert overview.overview(runs_url=make_run.runs_url).rows[0]["state"] == "running"
    del scheduler.jobs["77"]
    overview.overview(runs_url=make_run.runs_url)
    monkeypatch.setattr(memory, "SETTLE_S", 0.0)
    overview.overview(runs_url=make_run.runs_url)
    scheduler.asked.clear()
    assert overview.overview(runs_url=make_run.runs_url).rows[0]["state"] == "failed"
    assert scheduler.asked == []


def test_a_run_that_was_removed_is_forgotten(make_run: RunMaker, scheduler: Scheduler) -> None:
    import shutil

    first, second = finished(make_run), finished(make_run)
    overview.overview(runs_url=make_run.runs_url)
    shutil.rmtree(first.store.url)
    (row,) = overview.overview(runs_url=make_run.runs_url).rows
    assert row["id"] == second.load().id


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"\x93\xa1x\xa1y\xc0"])
def test_a_damaged_memory_costs_time_alone(
    make_run: RunMaker, scheduler: Scheduler, tmp_path: Any, damage: bytes
) -> None:
    finished(make_run)
    before = overview.overview(runs_url=make_run.runs_url).rows
    (path,) = (tmp_path / "cache" / "status").iterdir()
    assert os.stat(path).st_mode & 0o077 == 0
    path.write_bytes(damage)
    assert overview.overview(runs_url=make_run.runs_url).rows == before


def test_without_a_place_to_remember(
    make_run: RunMaker, scheduler: Scheduler, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMOPS_CACHE_DIR", str(tmp_path / "file"))
    finished(make_run)
    assert len(overview.overview(runs_url=make_run.runs_url).rows) == 1


def test_filters(make_run: RunMaker, scheduler: Scheduler) -> None:
    old = finished(make_run, "old", owner="bob", created=T0 - 99999).load().id
    new = finished(make_run, "newest-of-all").load().id
    alive = running(make_run, scheduler).load().id

    def ids(wanted: Wanted, over: int | None = None) -> tuple[list[str], int]:
        found = overview.overview(runs_url=make_run.runs_url, wanted=wanted, over=over)
        return [each["id"] for each in found.rows], found.omitted

    for _ in range(2):  # read, and remembered
        assert ids(Wanted(states=frozenset({"finished"}))) == ([old, new], 0)
        assert ids(Wanted(owner="bob")) == ([old], 0)
        assert ids(Wanted(since=T0)) == ([new, alive], 0)
        assert ids(Wanted(name="new*")) == ([new], 0)
        assert ids(Wanted(name="est-of")) == ([new], 0)
        assert ids(Wanted(name="NEW*")) == ([], 0)
        assert ids(Wanted(), over=1) == ([new, alive], 1)
        assert ids(Wanted(), over=0) == ([alive], 2)


def test_damaged_and_foreign_runs_hide_nothing(make_run: RunMaker, scheduler: Scheduler) -> None:
    good = finished(make_run)
    half = make_run("half")
    half.store.put("run.json", b'{"id": "x')
    bad = finished(make_run, "bad")
    bad.store.put("attempts/0000/end.json", b"\xff\xfe")
    (make_run_root := good.store.local_path.parent / "20260131-120055-file-aaaa").write_text("not a folder")
    assert make_run_root.exists()
    rows = overview.overview(runs_url=make_run.runs_url).rows
    by_name = {each["name"]: each for each in rows}
    assert by_name["done"]["state"] == "finished"
    assert any("run.json" in problem for problem in by_name["20260131-120002-half-aaaa"]["problems"])
    assert any("end.json" in problem for problem in by_name["bad"]["problems"])


def test_a_scheduler_that_is_down_leaves_what_the_store_says(
    make_run: RunMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmops.errors import ClusterError

    class Down:
        def look(self, *_: Any) -> Look:
            raise ClusterError("connection refused")

    monkeypatch.setattr(backends, "load", lambda name: Down())
    finished(make_run)
    made = make_run("alive")
    made.submission(0, "900")
    made.start(0, job_id="900")
    first, second = overview.overview(runs_url=make_run.runs_url).rows
    assert first["state"] == "finished"
    assert (second["state"], "connection refused" in second["reason"]) == ("unknown", True)


def test_goodput_of_groups(make_run: RunMaker, scheduler: Scheduler) -> None:
    preempted_and_crashed(make_run)
    other = make_run("other", owner="bob", nodes=1, ranks_per_node=1, created=T0)
    other.submission(0, "55")
    other.start(0, job_id="55", time=T0)
    other.end(0, "failed", time=T0 + 3600)
    for _ in range(2):
        found = overview.goodput(runs_url=make_run.runs_url, by="user", price=2.0)
        assert [(row["name"], row["runs"], row["node_hours"]) for row in found["groups"]] == [
            ("ada", 1, pytest.approx(2)),
            ("bob", 1, pytest.approx(1)),
        ]
        assert found["groups"][0]["cost"] == pytest.approx(2.0 * 4 * 3200 / 3600)
        assert found["total"]["runs"] == 2
        assert sum(found["total"]["shares"].values()) == pytest.approx(1)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
    nobody = overview.goodput(runs_url=make_run.runs_url, since=T0 + 10**6)
    assert (nobody["groups"], nobody["total"]["goodput"]) == ([], None)


def test_detail_of_a_run(make_run: RunMaker, scheduler: Scheduler) -> None:
    history = preempted_and_crashed(make_run)
    made = history.made
    made.put(
        "job/0001/submission.json",
        {"number": 1, "tag": "t", "backend": "slurm", "created": T0 + 4000, "config": "job/0001/config.yaml"},
    )
    made.store.put("job/0001/config.yaml", b"train: {lr: 0.1}\nname: x\n")
    found = api.detail(made.load())
    assert found["config_changes"] == [
        {"key": "name", "old": None, "new": "x", "submission": 1},
        {"key": "train", "old": {}, "new": None, "submission": 1},
        {"key": "train.lr", "old": None, "new": 0.1, "submission": 1},
    ]
    assert found["series"]["step"] == list(range(1, 251))
    assert found["timeline"][0] == {"kind": "queue", "start": T0, "end": T0 + 100, "attempt": None}
    assert sum(found["goodput_shares"].values()) == pytest.approx(1)
    assert found["checkpoints"] == []
    made.store.put("job/0001/config.yaml", b"train: [\n")
    found = api.detail(made.load())
    assert found["config_changes"] == []
    assert any("job/0001/config.yaml cannot be read" in problem for problem in found["problems"])


def test_a_study_that_is_none(make_run: RunMaker) -> None:
    finished(make_run)
    with pytest.raises(UserError, match="there is no study"):
        overview.trials("done", make_run.runs_url)


def test_in_an_object_store(s3_url: str, scheduler: Scheduler, reads: list[str]) -> None:
    make_run = RunMaker(s3_url)
    made, other = finished(make_run), finished(make_run)
    alive = running(make_run, scheduler).load().id
    first = overview.overview(runs_url=s3_url).rows
    assert [each["state"] for each in first] == ["finished", "finished", "running"]
    reads.clear()
    assert overview.overview(runs_url=s3_url).rows[:2] == first[:2]
    assert reads == [alive]
    record = records.SubmissionRecord(number=1, tag="again", backend="slurm", created=T0)
    assert records.write_submission(made.store, record)
    reads.clear()
    overview.overview(runs_url=s3_url)
    assert sorted(reads) == sorted([made.load().id, alive])
    assert other.load().id not in reads
