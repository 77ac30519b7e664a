"""Lines with their times: merged, and chosen by time, node, rank and pattern, whatever clocks and files are like."""

from __future__ import annotations

import os
import random
import re
from datetime import UTC, datetime
from typing import Any

import pytest

from llmops.agent.output import stamp
from llmops.cli import log_options
from llmops.cli.main import main
from llmops.errors import UserError
from llmops.monitor import log_positions
from llmops.monitor.log_merge import merge
from llmops.monitor.log_streams import Limits, LogLine, Selection
from llmops.monitor.logs import Style, clock, follow, printable, tail
from llmops.runs.store import PosixStore

T0 = 1_770_000_000.0  # when attempt 0 of the fixture begins; attempt 1 does 1000 s later


def at(seconds: float, text: str) -> str:
    return f"{stamp(T0 + seconds).decode()}{text}\n"


def texts(lines: Any) -> list[str]:
    return [f"{line.attempt}/{line.source} {line.text}" for line in lines]


@pytest.fixture
def made(make_run: Any) -> Any:
    made = make_run()
    made.submission()
    made.start(0)
    made.end(0, "preempted", "requeue")
    made.start(1)
    made.log(0, 0, at(1, "a") + at(4, "d") + at(5, "e"))
    made.log(0, 1, at(2, "b") + at(3, "c") + at(5, "f"), node="n2")
    # The clock of the next attempt's node is far behind.
    made.log(1, 0, at(-500, "first") + at(-499, "second"))
    return made


def test_lines_are_merged_by_time_and_attempts_never(made: Any) -> None:
    everything = ["0/0 a", "0/1 b", "0/1 c", "0/0 d", "0/0 e", "0/1 f", "1/0 first", "1/0 second"]
    assert texts(tail(made.load())) == everything
    assert texts(tail(made.load(), n=2)) == ["0/1 c", "0/1 f", "1/0 first", "1/0 second"]
    assert texts(tail(made.load(), n=1, rank=1)) == ["0/1 f"]
    assert [line.time for line in tail(made.load(), attempt=0)] == [T0 + s for s in (1, 2, 3, 4, 5, 5)]


def test_a_clock_that_is_set_back_reorders_no_stream(make_run: Any) -> None:
    made = make_run()
    made.log(0, 0, at(10, "x1") + at(2, "x2") + at(3, "x3") + at(11, "x4"))
    made.log(0, 1, at(9, "y1") + at(10.5, "y2"))
    assert texts(tail(made.load())) == ["0/1 y1", "0/0 x1", "0/0 x2", "0/0 x3", "0/1 y2", "0/0 x4"]


def test_lines_without_a_time_have_that_of_the_line_before(made: Any) -> None:
    made.log(0, 2, "foreign\n" + at(2.5, "stamped") + "went on\n" + "  indented\n" + at(9, "last"))
    lines = texts(tail(made.load(), attempt=0))
    assert lines[0] == "0/2 foreign", "the attempt's start"
    assert lines[3:6] == ["0/2 stamped", "0/2 went on", "0/2   indented"]
    assert lines[-1] == "0/2 last"
    last = texts(tail(made.load(), attempt=0, n=3))
    assert last[2:4] == ["0/2 went on", "0/2   indented"], "from the middle of a file"


@pytest.mark.parametrize("block", [1, 30, 100, 1 << 16])
def test_any_streams_in_blocks_of_any_size(make_run: Any, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(Limits, "of", lambda streams, remote: Limits(block))
    made = make_run()
    made.start(0)
    chance = random.Random(block)
    expected = []
    for rank in range(6):
        now, lines = 0.0, []
        for number in range(chance.choice([0, 1, 40, 90])):
            now += chance.choice([0.0, 0.0, 0.001, 1.0])
            lines.append(at(now, f"{number}") if rank != 3 else f"{number}\n")
            expected.append((at(now if rank != 3 else 0.0, ""), rank, number))
        made.log(0, rank, "".join(lines), node=f"n{rank % 2}")
    found = [(line.source, line.text) for line in tail(made.load())]
    assert found == [(str(rank), str(number)) for _, rank, number in sorted(expected)]


def test_the_merge_holds_two_blocks_of_each_stream_and_begins_after_one() -> None:
    taken = [0] * 5

    def blocks(stream: int) -> Any:
        for number in range(50):
            taken[stream] += 1
            yield [LogLine(0, str(stream), "", f"{number:03d}.{line}") for line in range(10)]

    lines = merge([blocks(stream) for stream in range(5)])
    next(lines)
    assert taken == [1] * 5
    for count, line in enumerate(lines):
        assert max(taken) <= int(line.stamp[:3]) + 3, f"after {count} lines"
    assert count == 5 * 500 - 2


def test_since_a_time(made: Any) -> None:
    assert texts(tail(made.load(), wanted=Selection(attempt=0, since=T0 + 4))) == ["0/0 d", "0/0 e", "0/1 f"]
    assert texts(tail(made.load(), wanted=Selection(attempt=0, since=T0 + 5.001))) == []
    assert texts(tail(made.load(), n=1, wanted=Selection(attempt=0, since=T0 + 5))) == ["0/0 e", "0/1 f"]
    # An attempt that ended before, by more than clocks may differ, is not looked at.
    assert texts(tail(made.load(), wanted=Selection(since=T0 - 3100))) == texts(tail(made.load()))


def counting_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read: list[int] = []
    original = PosixStore.read

    def counting(self: PosixStore, path: str, start: int, end: int | None = None) -> bytes:
        data = original(self, path, start, end)
        read.append(len(data))
        return data

    monkeypatch.setattr(PosixStore, "read", counting)
    return read


@pytest.mark.parametrize("parts", [1, 40])
def test_since_reads_little_of_a_huge_file(make_run: Any, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    made = make_run()
    lines = [at(second, f"line {second}") for second in range(400_000)]
    size = len(lines) // parts
    for part in range(parts):
        made.log(0, 0, "".join(lines[part * size : (part + 1) * size]), part=part)
    read = counting_reads(monkeypatch)
    found = [line.text for line in tail(made.load(), wanted=Selection(since=T0 + 399_990))]
    assert found == [f"line {second}" for second in range(399_990, 400_000)]
    assert sum(read) < 6 * log_positions.BLOCK
    middle = next(iter(tail(made.load(), wanted=Selection(since=T0 + 123_456))))
    assert middle.text == "line 123456"


@pytest.mark.parametrize("second", [0, 1, 57, 499, 500])
def test_since_finds_the_same_as_reading_all(make_run: Any, monkeypatch: pytest.MonkeyPatch, second: int) -> None:
    monkeypatch.setattr(log_positions, "BLOCK", 64)
    monkeypatch.setattr(log_positions, "PEEK", 32)
    made = make_run()
    for part in range(3):
        numbers = range(part * 200, part * 200 + 200)
        made.log(0, 0, "".join(at(n / 1.2, f"{n}") + "x" * (n % 90) + "\n" * (n % 3) for n in numbers), part=part)
    everything = list(tail(made.load()))
    found = list(tail(made.load(), wanted=Selection(since=T0 + second)))
    assert found == [line for line in everything if line.time is None or line.time >= T0 + second]


def test_nodes_ranks_and_patterns(made: Any) -> None:
    def chosen(n: int | None = None, **what: Any) -> list[str]:
        return texts(tail(made.load(), n=n, wanted=Selection(**what)))

    assert chosen(nodes=log_options.Nodes(("n2",))) == ["0/1 b", "0/1 c", "0/1 f"]
    assert chosen(nodes=log_options.Nodes(("x", "n?"))) == chosen()
    assert chosen(ranks=log_options.ranks("1-5,9")) == ["0/1 b", "0/1 c", "0/1 f"]
    assert chosen(pattern=re.compile("^[bd]|sec")) == ["0/1 b", "0/0 d", "1/0 second"]
    assert chosen(pattern=re.compile("2026|Z ")) == [], "the time is no part of the text"
    assert chosen(n=1, pattern=re.compile("[a-d]$")) == ["0/1 c", "1/0 second"]
    assert chosen(n=2, pattern=re.compile("[a-d]$")) == ["0/1 b", "0/1 c", "0/0 d", "1/0 second"]


def test_the_last_matching_lines_are_looked_for_from_the_end(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run()
    made.log(0, 0, "".join(at(number, f"{'loss' if number % 10 else 'eval'} {number}") for number in range(200_000)))
    read = counting_reads(monkeypatch)
    found = [line.text for line in tail(made.load(), n=2, wanted=Selection(pattern=re.compile("^eval")))]
    assert found == ["eval 199980", "eval 199990"]
    assert sum(read) < 4 * log_positions.BLOCK


def test_follow_merges_what_has_arrived_and_filters(make_run: Any) -> None:
    made = make_run()
    made.start(0)
    made.log(0, 0, at(1, "a") + at(3, "c"))
    made.log(0, 1, at(2, "b"), node="n2")

    def more() -> None:
        made.log(0, 1, at(2, "b") + at(5, "e") + at(7, "skip"), node="n2")
        made.log(0, 0, at(1, "a") + at(3, "c") + at(4, "d") + at(6, "f"))

    script = [more]
    lines = follow(
        made.load(),
        lambda: not script,
        n=None,
        wait=lambda seconds: script.pop(0)(),
        wanted=Selection(pattern=re.compile("^.$"), since=T0 + 2),
    )
    assert texts(lines) == ["0/1 b", "0/0 c", "0/0 d", "0/1 e", "0/0 f"]


# Files that are not what they should be


def test_damaged_and_foreign_files_are_shown_for_what_they_are(made: Any) -> None:
    folder = made.store.local_path / "logs/0000/n1"
    (folder / "rank7.000000.log").mkdir()
    (folder / "rank8.000000.log").symlink_to("nowhere")
    (folder / "rank9.000000.log").write_bytes(b"\0" * 5000 + at(2.2, "after zeros").encode() + b"\xff\xfe cut sho")
    (folder / "rank10.000000.log").write_bytes(b"2026-13-99T99:99:99.999Z no such day\n2026-11-23T03:2")
    (folder / "core.1234").write_bytes(b"\x7fELF")
    (made.store.local_path / "logs/0000/stray").write_text("no folder")
    for n in (None, 5):
        lines = texts(tail(made.load(), attempt=0, n=n))
        assert "0/7 [llmops: logs/0000/n1/rank7.000000.log is no file that can be read]" in lines
        assert "0/8 [llmops: logs/0000/n1/rank8.000000.log is no file that can be read]" in lines
        assert lines.index("0/9 after zeros") == lines.index("0/1 b") + 1
        assert "0/9 �� cut sho" in lines
        assert "0/10 no such day" in lines
        assert "0/10 2026-11-23T03:2" in lines
    for line in tail(made.load(), attempt=0, rank=10):
        assert printable(line, Style(time=True)) == f"--:--:--.--- {line.text}"


def test_a_progress_bar_keeps_its_time(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "of", lambda streams, remote: Limits(64, 256))
    made = make_run()
    made.log(0, 0, at(1, "".join(f"\r{percent}%" for percent in range(1000))) + at(2, "done"))
    made.log(0, 1, at(1.5, "between"))
    assert texts(tail(made.load())) == ["0/0 999%", "0/1 between", "0/0 done"]


def test_the_memory_for_many_streams_is_shared() -> None:
    for remote in (False, True):
        for streams in (1, 10, 1000, 10_000):
            limits = Limits.of(streams, remote)
            assert limits.block >= 4096
            assert streams * limits.block <= 41 << 20
            assert limits.held >= 1 << 16


# Options


def test_spans_and_times() -> None:
    now = datetime(2026, 11, 23, 12, 0, tzinfo=UTC).timestamp()
    assert log_options.since("10m", now) == now - 600
    assert log_options.since("1.5h", now) == now - 5400
    assert log_options.since("2d", now) == now - 172800
    assert log_options.since("2026-11-23T11:00Z", now) == now - 3600
    assert log_options.since("2026-11-23T12:00+02:00", now) == now - 7200
    local = datetime.fromtimestamp(now).replace(hour=9, minute=5, second=0)
    assert log_options.since("9:05", now) == log_options.since("09:05:00", now) == local.timestamp()
    assert log_options.since(local.isoformat(), now) == local.timestamp()
    for wrong in ("", "m", "10", "10 m", "-5m", "yesterday", "2026-13-01", "24:61", "9999999999999d"):
        with pytest.raises(UserError, match="--since"):
            log_options.since(wrong, now)


def test_ranks() -> None:
    assert log_options.ranks("all") is None
    assert log_options.ranks("3") == 3
    chosen = log_options.ranks("0,3, 8-15,20-999999999")
    assert isinstance(chosen, log_options.Ranks)
    assert [rank for rank in range(22) if rank in chosen] == [0, 3, *range(8, 16), 20, 21]
    for wrong in ("", "1,", "3-1", "-1", "a", "1-2-3", "²", "1;2", "1" * 30 + ",2"):
        with pytest.raises(UserError, match="give a rank's number, or all"):
            log_options.ranks(wrong)


def test_the_clock_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    assert clock("2026-11-23T03:27:00.123Z") == "08:57:00.123"
    monkeypatch.delenv("TZ")
    time.tzset()


def call(made: Any, capsys: Any, *arguments: str) -> tuple[int, list[str], str]:
    url = str(made.store.local_path.parent)
    capsys.readouterr()
    code = main(["logs", "--runs-url", url, made.store.local_path.name, *arguments])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_the_command_line(made: Any, capsys: Any) -> None:
    assert call(made, capsys, "--node", "n2", "--tail", "1") == (0, ["[0/1 n2] f"], "")
    code, out, err = call(made, capsys, "--time", "--rank", "1", "--attempt", "0")
    assert (code, err) == (0, "")
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} [bcf]", line) for line in out)
    assert len(out) == 3
    code, out, _ = call(made, capsys, "--color", "always", "--attempt", "-2", "--rank", "0,1")
    assert out[1] == "\x1b[32m[0/1]\x1b[0m b"
    code, out, err = call(made, capsys, "--grep", "nowhere", "--attempt", "0")
    assert (code, out) == (0, [])
    assert err == "no line of attempts 0 to 0, ranks 0 to 1, nodes n1 n2 is what was asked for\n"
    code, out, err = call(made, capsys, "--node", "n3")
    assert (code, out) == (2, [])
    assert "--node n3" in err
    assert "nodes n1 n2" in err
    code, out, err = call(made, capsys, "--node", "n2", "--rank", "0")
    assert (code, out) == (2, [])
    assert "--rank 0: not on n2" in err


def test_colours_are_for_terminals_and_not_with_no_color(made: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert call(made, capsys, "--tail", "1")[1][0].startswith("\x1b[")
    assert call(made, capsys, "--tail", "1", "--color", "never")[1][0] == "[0/1] f"
    monkeypatch.setitem(os.environ, "NO_COLOR", "1")
    assert call(made, capsys, "--tail", "1")[1][0] == "[0/1] f"
