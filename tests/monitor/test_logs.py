"""Output of ranks: its end, all of it, and as it grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmops.monitor import log_positions
from llmops.monitor.log_streams import Limits, LogLine, Selection
from llmops.monitor.logs import Style, follow, prefixed, printable, tail
from llmops.runs.store import PosixStore


def texts(lines: Any) -> list[str]:
    return [f"{line.attempt}/{line.source} {line.text}" for line in lines]


@pytest.fixture
def made(make_run: Any) -> Any:
    made = make_run()
    made.log(0, 0, "a\nb\n")
    made.log(0, 10, "x\n", node="n2")
    made.log(0, 2, "y\nz")
    made.log(1, 0, "c\n", part=0)
    made.log(1, 0, "d\ne\n", part=1)
    made.store.put("logs/0001/n1/supervisor.000000.log", b"preflight\n")
    made.store.put("logs/0001/n1/notes.txt", b"hello\n")
    made.store.put("logs/readme/x", b"hello\n")
    return made


def test_everything_by_attempt_and_rank(made: Any) -> None:
    everything = ["0/0 a", "0/0 b", "0/2 y", "0/2 z", "0/10 x", "1/0 c", "1/0 d", "1/0 e"]
    assert texts(tail(made.load())) == everything
    assert texts(tail(made.load(), n=1000)) == everything
    assert texts(tail(made.load(), rank=0)) == ["0/0 a", "0/0 b", "1/0 c", "1/0 d", "1/0 e"]
    assert texts(tail(made.load(), attempt=0, rank=2)) == ["0/2 y", "0/2 z"]
    assert texts(tail(made.load(), attempt=7)) == []
    assert texts(tail(made.load(), supervisor=True)) == ["1/supervisor@n1 preflight"]


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, []),
        (1, ["0/2 z", "0/10 x", "1/0 e"]),
        (2, ["0/2 y", "0/2 z", "0/10 x", "1/0 d", "1/0 e"]),
        (4, ["0/0 b", "0/2 y", "0/2 z", "0/10 x", "1/0 c", "1/0 d", "1/0 e"]),
    ],
)
def test_the_last_lines_of_each_rank(made: Any, n: int, expected: list[str]) -> None:
    assert texts(tail(made.load(), n=n)) == expected


def small_blocks(monkeypatch: pytest.MonkeyPatch, block: int, held: int = 1 << 20) -> None:
    monkeypatch.setattr(Limits, "of", lambda streams, remote: Limits(block, held))


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("text", ["", "\n", "a", "a\n", "a\n\n\n", "one\ntwo\nthree\n", "one\ntwo\nthree", "\n\nx"])
def test_the_tail_is_the_end_of_all(make_run: Any, monkeypatch: pytest.MonkeyPatch, text: str, block: int) -> None:
    monkeypatch.setattr(log_positions, "BLOCK", block)
    small_blocks(monkeypatch, block)
    made = make_run()
    made.log(0, 0, text)
    lines = text.removesuffix("\n").split("\n") if text else []
    for n in range(5):
        assert [line.text for line in tail(made.load(), n=n)] == lines[max(len(lines) - n, 0) :]
    assert [line.text for line in tail(made.load())] == lines


def test_only_the_end_of_a_huge_file_is_read(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run()
    made.log(0, 0, "".join(f"line {number}\n" for number in range(300_000)))
    read = 0
    original = PosixStore.read

    def counting(self: PosixStore, path: str, start: int, end: int | None = None) -> bytes:
        nonlocal read
        data = original(self, path, start, end)
        read += len(data)
        return data

    monkeypatch.setattr(PosixStore, "read", counting)
    assert [line.text for line in tail(made.load(), n=2)] == ["line 299998", "line 299999"]
    assert read < 3 * log_positions.BLOCK


def test_lines_without_an_end_are_bounded(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_positions, "BLOCK", 16)
    monkeypatch.setattr(log_positions, "MAX_TAIL", 128)
    small_blocks(monkeypatch, 16, 64)
    made = make_run()
    made.log(0, 0, "x" * 500)
    lines = [line.text for line in tail(made.load())]
    assert "".join(lines) == "x" * 500
    assert max(map(len, lines)) <= 80
    assert sum(len(line.text) for line in tail(made.load(), n=3)) <= 128
    made.log(0, 0, "".join(f"\r{percent}%" for percent in range(101)) + "\ndone\n")
    assert [line.text for line in tail(made.load())] == ["100%", "done"]


def test_text_that_is_not_utf8(make_run: Any) -> None:
    made = make_run()
    made.store.put("logs/0000/n1/rank0.000000.log", b"\xff\xfe\nok\r\n")
    assert [line.text for line in tail(made.load())] == ["��", "ok"]


# Following


class Script:
    """Stands for time: each wait runs the next action; after the last one the run is done."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self.actions = list(actions)

    def wait(self, seconds: float) -> None:
        self.actions.pop(0)()

    def done(self) -> bool:
        return not self.actions


def followed(made: Any, *actions: Callable[[], object], **options: Any) -> list[str]:
    script = Script(*actions)
    return texts(follow(made.load(), script.done, wait=script.wait, **options))


def append(made: Any, path: str, data: str) -> Callable[[], object]:
    def write() -> None:
        file = made.store.local_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", newline="") as stream:
            stream.write(data)

    return write


def test_lines_come_when_they_are_complete(make_run: Any) -> None:
    made = make_run()
    made.log(0, 0, "1\n2\n3\n4")
    path = "logs/0000/n1/rank0.000000.log"
    lines = followed(made, append(made, path, "4\n5"), append(made, path, "\n6\n"), append(made, path, "end"), n=2)
    assert lines == ["0/0 3", "0/0 44", "0/0 5", "0/0 6", "0/0 end"]


def test_new_parts_ranks_and_attempts_are_picked_up(make_run: Any) -> None:
    made = make_run()
    lines = followed(
        made,
        append(made, "logs/0000/n1/rank0.000000.log", "a\nb"),
        lambda: (
            append(made, "logs/0000/n1/rank0.000000.log", "b\n")(),
            append(made, "logs/0000/n1/rank0.000001.log", "c\n")(),
            append(made, "logs/0000/n2/rank1.000000.log", "x\n")(),
        ),
        append(made, "logs/0001/n1/rank0.000000.log", "d\n"),
        append(made, "logs/0000/n1/rank0.000001.log", "late\n"),
        append(made, "logs/0002/n1/rank0.000000.log", "e\n"),
    )
    assert lines == ["0/0 a", "0/0 bb", "0/0 c", "0/1 x", "1/0 d", "0/0 late", "2/0 e"]


def test_following_one_rank_of_one_attempt(made: Any) -> None:
    more = [
        append(made, "logs/0001/n1/rank1.000000.log", "no\n"),
        append(made, "logs/0001/n1/rank0.000001.log", "yes\n"),
        append(made, "logs/0002/n1/rank0.000000.log", "no\n"),
    ]
    assert followed(made, *more, rank=0, attempt=1, n=1) == ["1/0 e", "1/0 yes"]


def test_what_is_written_before_the_end_is_shown(made: Any) -> None:
    asked = 0

    def done() -> bool:
        nonlocal asked
        asked += 1
        append(made, "logs/0001/n1/rank0.000001.log", "last words\n")()
        return True

    lines = texts(follow(made.load(), done, n=0, wait=lambda seconds: pytest.fail("no need to wait")))
    assert lines == ["1/0 last words"]
    assert asked == 1


def test_a_progress_bar_is_shown_now_and_then(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    made = make_run()
    path = "logs/0000/n1/rank0.000000.log"
    made.log(0, 0, "\r1%")

    def tick(text: str) -> Callable[[], object]:
        def act() -> None:
            nonlocal now
            now += 6
            append(made, path, text)()

        return act

    lines = followed(made, tick("\r2%\r3%"), tick("\r4%\r5%"), tick("\r6%"), tick("\r7%\n"))
    assert lines == ["0/0 4%", "0/0 7%"]


def test_an_object_store(make_run: Any, memory_url: str) -> None:
    make_run.runs_url = memory_url
    made = make_run()
    made.log(0, 0, "a\n")
    parts = [lambda number=number: made.log(0, 0, f"{number}\n", part=number) for number in (1, 2)]
    assert followed(made, *parts, poll_s=0.0) == ["0/0 a", "0/0 1", "0/0 2"]


# Printing


def test_prefixes_where_there_can_be_several_streams(made: Any, make_run: Any) -> None:
    run = made.load()
    assert prefixed(run, Selection())
    assert prefixed(run, Selection(0))
    assert prefixed(run, Selection(attempt=0))
    assert not prefixed(run, Selection(0, 0))
    assert not prefixed(run, Selection(range(1), 0))
    assert prefixed(run, Selection(range(2), 0))
    single = make_run("single", nodes=1, ranks_per_node=1)
    single.log(0, 0, "x")
    assert not prefixed(single.load(), Selection())
    assert prefixed(single.load(), Selection(), following=True)
    assert not prefixed(single.load(), Selection(attempt=0), following=True)


def test_terminals_get_colours_only() -> None:
    line = LogLine(1, "3", "\x1b[31mred\x1b[2J[bold]", "2026-11-23T03:27:00.123Z", "n2")
    assert printable(line, Style(prefix=True, terminal=True)) == "[1/3] red[bold]"
    assert printable(line, Style(terminal=True, colour=True)) == "\x1b[31mred[bold]\x1b[0m"
    assert printable(line, Style()) == line.text
    coloured = [printable(line._replace(source=rank), Style(True, colour=True)) for rank in ("3", "4", "13")]
    assert len({text.partition("[1/")[0] for text in coloured}) == 2, "neighbours differ, and 3 and 13 are the same"
    assert printable(line._replace(node="\x1b[2Jn2\n"), Style(True, node=True)).startswith("[1/3 n2] ")
