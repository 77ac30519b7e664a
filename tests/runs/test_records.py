"""Run directories: written by several programs, some of which died half way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llmops.errors import UserError
from llmops.runs.records import (
    RunRecord,
    SubmissionRecord,
    create_run,
    find_run,
    list_runs,
    load_run,
    new_run_id,
    next_submission,
    register_job,
    write_failed,
    write_intent,
    write_submission,
)
from llmops.runs.store import PosixStore, open_store


def test_run_ids_sort_by_time_and_are_safe_names() -> None:
    first, second = new_run_id("My Run/№1!", 0), new_run_id("a", 1)
    assert re.fullmatch(r"19700101-000000-my-run-1-[a-z2-7]{4}", first)
    assert first < second
    assert re.fullmatch(r"19700101-000000-run-[a-z2-7]{4}", new_run_id("…", 0))
    assert len(new_run_id("x" * 500, 0)) < 64


def test_a_whole_run_is_read_back(make_run: Any) -> None:
    made = make_run("tiny", max_steps=None)
    made.submission(0, "100")
    made.submission(1, None, backend="local")
    assert write_failed(made.store, 1, "sbatch: invalid partition")
    assert not write_failed(made.store, 1, "again")
    assert write_intent(made.store, 0, graceful=True, by="ada")
    assert not write_intent(made.store, 0, graceful=False, by="eve")
    made.start(0)
    made.end(0, "preempted", "requeue", last_step=12, stop={"cause": "SIGTERM", "requested": 1.0, "deadline": 2.0})
    made.start(1, resume="checkpoints/step_00000010/0000-0000")
    run = made.load()
    assert run.problems == []
    assert run.record is not None
    assert (run.id, run.name, run.backend, run.record.max_steps) == (
        made.store.url.split("/")[-1],
        "tiny",
        "local",
        None,
    )
    first, second = run.submissions
    assert (first.job_id, first.tag, first.failed) == ("100", "tag-0", None)
    assert first.intent is not None
    assert (first.intent.graceful, first.intent.by) == (True, "ada")
    assert second.failed is not None
    assert (second.job_id, second.failed.error) == (None, "sbatch: invalid partition")
    assert run.job_ids == ["100"]
    assert run.job_id is None
    assert [attempt.number for attempt in run.attempts] == [0, 1]
    assert run.attempts[0].end is not None
    assert run.attempts[0].end.stop is not None
    assert run.attempts[0].end.stop.cause == "SIGTERM"
    assert run.newest is not None
    assert (run.newest.start.resume_step, run.newest.end) == (10, None)
    assert next_submission(made.store) == 2


def test_only_one_job_may_run_a_submission(make_run: Any) -> None:
    store = make_run().store
    assert register_job(store, 0, "100", "job")
    assert register_job(store, 0, "100", "launcher")
    assert not register_job(store, 0, "101", "job")
    store.put("job/0001/job.json", b"not json")
    with pytest.raises(UserError, match=r"job/0001/job.json is damaged"):
        register_job(store, 1, "100", "job")


def test_a_number_is_claimed_once(make_run: Any) -> None:
    store = make_run().store
    record = SubmissionRecord(number=0, tag="t", backend="slurm", created=1.0)
    assert write_submission(store, record)
    assert not write_submission(store, record)


def test_runs_are_never_overwritten(make_run: Any) -> None:
    record = make_run().load().record
    with pytest.raises(UserError, match="exists already"):
        create_run(make_run.runs_url, record, b"")


def test_a_half_created_run_is_reported(tmp_path: Path) -> None:
    store = open_store(tmp_path / "20260131-120000-half-aaaa")
    store.put("config.yaml", b"")
    run = load_run(store)
    assert run.record is None
    assert (run.name, run.backend, run.attempts) == ("20260131-120000-half-aaaa", "", [])
    assert "run.json is missing" in run.problems[0]
    assert [each.id for each in list_runs(str(tmp_path))] == ["20260131-120000-half-aaaa"]


def test_what_is_damaged_is_reported_and_the_rest_is_read(make_run: Any) -> None:
    made = make_run()
    made.submission(0)
    made.submission(3)
    made.start(0)
    made.start(1)
    made.store.put("attempts/0001/end.json", b'{"time": 1, "rea')
    made.store.put("attempts/0002/end.json", b"{}")
    made.start(7)
    made.store.put("attempts/0004/start.json", made.store.get("attempts/0007/start.json"))
    made.store.put("attempts/notes.txt", b"hello")
    made.store.put("attempts/backup/start.json", b"hello")
    made.store.put("job/0000/job.json", b"\xff\xfe")
    made.store.put("job/0001/spec.json", b"{}")
    made.put("job/0003/submission.json", {"number": 3, "tag": 5, "backend": "slurm", "created": 1})
    (Path(made.store.url) / "job" / "0009").mkdir()
    run = made.load()
    assert [attempt.number for attempt in run.attempts] == [0, 1, 7]
    assert [submission.number for submission in run.submissions] == [0]
    where = [problem.split(" ")[0].rstrip(":") for problem in run.problems]
    assert where == [
        "job/0000/job.json",
        "job/0001/submission.json",
        "job/0003/submission.json",
        "attempts/0001/end.json",
        "attempts/0002/start.json",
        "attempts/0004/start.json",
    ]


@pytest.mark.parametrize(("content", "problem"), [(b"[]", "run.json: "), (b"{", "run.json: "), (b"{}", "run.json: ")])
def test_a_damaged_run_json_is_a_problem(make_run: Any, content: bytes, problem: str) -> None:
    made = make_run()
    made.store.put("run.json", content)
    run = made.load()
    assert run.record is None
    assert run.problems[0].startswith(problem)


def test_newer_formats_and_copies_are_named(make_run: Any) -> None:
    made = make_run(format=2)
    assert "format 2 is newer" in made.load().problems[0]
    other = make_run("other")
    other.store.put("run.json", made.store.get("run.json").replace(b'"format": 2', b'"format": 1, "more": []'))
    assert other.load().problems == [
        f"run.json says that this is run {made.load().id}; the directory was renamed or copied"
    ]


def test_reading_a_run_opens_each_file_once(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run()
    made.submission(0)
    for number in range(3):
        made.start(number)
        made.end(number, "preempted")
    opened: list[str] = []
    get = PosixStore.get
    monkeypatch.setattr(PosixStore, "get", lambda self, path: opened.append(path) or get(self, path))
    list_runs(make_run.runs_url)
    assert len(opened) == len(set(opened)) == 3 + 6


def test_runs_in_an_object_store(memory_url: str, make_run: Any) -> None:
    make_run.runs_url = memory_url
    for _ in range(3):
        make_run().submission()
    assert [run.job_id for run in list_runs(memory_url)] == ["100"] * 3
    assert [run.id for run in list_runs(memory_url)] == sorted(run.id for run in list_runs(memory_url))


# Finding one


@pytest.fixture
def runs(make_run: Any) -> str:
    for name in ("baseline", "baseline", "wide-lr3", "wide-lr4", "deep"):
        make_run(name)
    return str(make_run.runs_url)


@pytest.mark.parametrize(
    ("ref", "found"),
    [
        ("20260131-120003-wide-lr3-aaaa", "wide-lr3"),
        ("deep", "deep"),
        ("wide-lr3", "wide-lr3"),
        ("de", "deep"),
        ("20260131-120005", "deep"),
    ],
)
def test_a_run_is_found(runs: str, ref: str, found: str) -> None:
    assert find_run(runs, ref).name == found


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("baseline", "'baseline' means 2 runs in .*: 20260131-120001-baseline-aaaa, 20260131-120002-baseline-aaaa"),
        ("wide", "'wide' means 2 runs"),
        ("2026", "means 5 runs"),
        ("wide-lr5", "did you mean wide-lr[34]"),
        ("zzzzzzz", "`llmops status` lists them"),
        ("", "there is no run ''"),
        ("../x", "there is no run"),
    ],
)
def test_a_run_is_not_found(runs: str, ref: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_run(runs, ref)


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        find_run(str(tmp_path), "x")


def test_names_do_not_collide_with_foreign_directories(runs: str) -> None:
    (Path(runs) / "code").mkdir()
    (Path(runs) / "notes.txt").write_text("x")
    assert len(list_runs(runs)) == 5


def test_records_keep_their_defaults() -> None:
    record = RunRecord(
        id="i",
        name="n",
        owner="o",
        host="h",
        created=1.0,
        backend="local",
        kind="llm",
        command=[],
        nodes=1,
        ranks_per_node=1,
    )
    assert (record.format, record.parent, record.code) == (1, None, None)
