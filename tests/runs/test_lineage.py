"""Each step once, from the attempt that counts."""

from __future__ import annotations

from typing import Any

import pytest

from llmops.runs import streams
from llmops.runs.lineage import attempt_steps, merged_metrics, newest_step, recent_metrics, segments
from llmops.runs.store import PosixStore, open_store


def commit(step: int, attempt: int, generation: int = 0) -> str:
    return f"checkpoints/step_{step:08d}/{attempt:04d}-{generation:04d}"


CHAINS = [
    ([], []),
    ([None], [(0, 1, None)]),
    # the usual: each resumes from the one before
    ([None, commit(10, 0), commit(30, 1)], [(0, 1, 10), (1, 11, 30), (2, 31, None)]),
    # attempt 1 committed nothing: it does not count
    ([None, commit(10, 0), commit(10, 0)], [(0, 1, 10), (2, 11, None)]),
    # attempt 1 was a zombie that went on and committed after attempt 2 had forked off
    ([None, commit(10, 0), commit(10, 0), commit(20, 2)], [(0, 1, 10), (2, 11, 20), (3, 21, None)]),
    # nothing was committed before attempt 1 started
    ([None, None], [(1, 1, None)]),
    # after a rollback: the generation does not matter for whose steps count
    ([None, commit(10, 0, 3)], [(0, 1, 10), (1, 11, None)]),
    # damaged: a commit of a later attempt, or nonsense
    ([None, commit(10, 5)], [(1, 11, None)]),
    ([None, "checkpoints/x"], [(1, 1, None)]),
]


@pytest.mark.parametrize(("resumes", "expected"), CHAINS)
def test_segments(make_run: Any, resumes: list[str | None], expected: list[tuple[int, int, int | None]]) -> None:
    made = make_run()
    for number, resume in enumerate(resumes):
        if resume == "checkpoints/x":
            made.start(number, resume_from=resume, resume_step=10)
        else:
            made.start(number, resume)
    assert segments(made.load()) == expected


def test_an_older_attempt_without_a_record_begins_at_one(make_run: Any) -> None:
    made = make_run()
    made.start(2, commit(10, 1))
    assert segments(made.load()) == [(1, 1, 10), (2, 11, None)]


def steps(run: Any) -> list[int]:
    return [record["step"] for record in merged_metrics(run)]


def test_each_step_once_from_the_attempt_that_counts(make_run: Any) -> None:
    made = make_run()
    made.start(0)
    made.metrics(0, range(1, 15))
    made.start(1, commit(10, 0))
    made.metrics(1, range(11, 40))
    made.start(2, commit(10, 0))
    made.metrics(2, range(11, 16), part=0)
    made.metrics(2, range(16, 20), part=1)
    run = made.load()
    records = list(merged_metrics(run))
    assert [record["step"] for record in records] == list(range(1, 20))
    whose = [round(record["loss"] - 10 / record["step"]) for record in records]
    assert whose == [0] * 10 + [2] * 9
    assert newest_step(run) == records[-1]
    assert recent_metrics(run, 12) == records[-12:]
    assert recent_metrics(run, 100) == records


def test_a_rolled_back_step_is_replaced(make_run: Any) -> None:
    made = make_run()
    made.start(0)
    made.metrics(0, [*range(1, 16), *range(11, 14)], part=0)
    made.metrics(0, [12, 13, 14], part=1)
    assert steps(made.load()) == list(range(1, 15))


def test_an_attempt_that_only_started_shows_what_it_resumed_from(make_run: Any) -> None:
    made = make_run()
    made.start(0)
    made.metrics(0, range(1, 15))
    made.start(1, commit(10, 0))
    newest = newest_step(made.load())
    assert newest is not None
    assert newest["step"] == 10


def test_unfinished_damaged_and_other_lines_are_skipped(make_run: Any) -> None:
    made = make_run()
    made.start(0)
    text = (
        '{"step": 1, "loss": 3.0}\n\xff garbage\n\n[1]\n'
        '{"kind": "eval", "step": 1, "loss": 2.5}\n{"step": true, "loss": 1}\n'
        '{"step": 2, "loss": NaN}\n{"step": 3, "loss": 2.0'
    )
    made.store.put("metrics/0000/000000.jsonl", text.encode("latin1"))
    made.store.put("metrics/0000/notes.txt", b"x")
    assert steps(made.load()) == [1, 2]
    made.store.put("metrics/0000/000000.jsonl", (text + "}").encode("latin1"))
    assert steps(made.load()) == [1, 2, 3]


def test_no_metrics_is_no_steps(make_run: Any) -> None:
    made = make_run()
    assert newest_step(made.load()) is None
    made.start(0)
    assert newest_step(made.load()) is None
    assert steps(made.load()) == []


def test_the_newest_step_costs_one_block(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run()
    made.start(0)
    made.metrics(0, range(1, 20_000))
    read: list[int] = []
    original = PosixStore.read

    def counting(self: PosixStore, path: str, start: int, end: int | None = None) -> bytes:
        data = original(self, path, start, end)
        read.append(len(data))
        return data

    monkeypatch.setattr(PosixStore, "read", counting)
    assert (newest_step(made.load()) or {})["step"] == 19_999
    assert sum(read) == streams.BLOCK
    assert steps(made.load()) == list(range(1, 20_000))


def test_attempt_steps(make_run: Any) -> None:
    made = make_run()
    made.start(0)
    made.metrics(0, range(1, 15))
    made.end(0, "preempted", first_step=1, last_step=16)
    made.start(1, commit(10, 0))
    made.metrics(1, range(11, 13))
    made.start(2, commit(12, 1))
    run = made.load()
    assert [attempt_steps(run, number) for number in range(4)] == [(1, 16), (11, 12), (None, None), (None, None)]


@pytest.mark.parametrize("text", [b"", b"\n", b"a", b"a\n", b"a\nb", b"\n\na\n\n", b"x" * 50 + b"\ny\n"])
@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_lines_backwards(text: bytes, block: int, memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK", block)
    store = open_store(memory_url)
    store.put("x", text)
    assert list(streams.lines_backwards(store, "x")) == text.split(b"\n")[::-1]


def test_parts_are_in_numerical_order(memory_url: str) -> None:
    store = open_store(memory_url)
    for name in ("rank0.1000000.log", "rank0.000002.log", "rank0.000010.log", "rank00.000000.log", "rank0.1.log"):
        store.put(f"logs/{name}", b"")
    expected = ["logs/rank0.000002.log", "logs/rank0.000010.log", "logs/rank0.1000000.log"]
    assert streams.parts(store, "logs", "rank0.", ".log") == expected
