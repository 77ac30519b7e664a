"""Nothing that a program or a user wrote may steer the terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmops.monitor.text import clean, clean_lines, duration, last_state, moment, number, terminal_line


@pytest.mark.parametrize(
    ("text", "cleaned", "for_terminal"),
    [
        ("plain é", "plain é", "plain é"),
        ("a\x1b[31mred\x1b[0m", "ared", "a\x1b[31mred\x1b[0m\x1b[0m"),
        ("\x1b[38;5;1mx", "x", "\x1b[38;5;1mx\x1b[0m"),
        ("\x9b31mx", "x", "\x1b[31mx\x1b[0m"),
        ("\x1b[2J\x1b[1;1Hx", "x", "x"),
        ("\x1b[?25l\x1b[>4;1mx", "x", "x"),
        ("\x1b]0;title\x07x", "x", "x"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link", "link"),
        ("\x1b]52;c;aGk=", "", ""),
        ("\x1bPq#0\x1b\\x", "x", "x"),
        ("\x1b(0x\x1bc", "x", "x"),
        ("x\x1b", "x", "x"),
        ("a\u202eb\u2066\u200b", "a b", "ab"),
        ("a\x00\x08b\x7f", "a  b", "ab"),
        ("\ud800x", "x", "x"),
        ("a\u2028b", "a b", "ab"),
        ("[red]x[/red]", "[red]x[/red]", "[red]x[/red]"),
    ],
)
def test_text_of_others(text: str, cleaned: str, for_terminal: str) -> None:
    assert clean(text) == cleaned
    assert terminal_line(text) == for_terminal


@given(st.text(alphabet=st.sampled_from("ab[]0;?mHJP\\x\x07\x1b\x9b\x9c\x90\x9d\r\n\t ")))
def test_no_escape_gets_through(text: str) -> None:
    assert clean(text).isprintable()
    assert all(line.isprintable() for line in clean_lines(text))
    rest = terminal_line(text)
    while (start := rest.find("\x1b")) >= 0:
        end = rest.index("m", start)
        assert set(rest[start + 2 : end]) <= set("0123456789;:")
        rest = rest[end:]
    assert "\x9b" not in rest


def test_an_unfinished_sequence_hides_no_other_line() -> None:
    assert clean_lines("\x1b]0;x\nRuntimeError: y") == ["", "RuntimeError: y"]
    assert clean_lines("  indented\r\n10%\r20%\r") == ["  indented", "20%"]


def test_progress_bars() -> None:
    assert last_state("10%\r20%\r") == "20%"
    assert last_state("\r10%\r20%") == "20%"
    assert last_state("plain\r") == "plain"


def test_numbers_for_people() -> None:
    spans = [(-5, "0s"), (42.9, "42s"), (60, "1m"), (3599, "59m"), (19_200, "5h 20m"), (187_200, "2d 4h")]
    assert [duration(seconds) for seconds, _ in spans] == [text for _, text in spans]
    assert (number(None), number(2.34567), number(12345.6)) == ("-", "2.346", "1.235e+04")
    assert moment(None) == "-"
    assert len(moment(1.0)) == 19


def test_large_numbers_and_shares() -> None:
    from llmops.monitor.text import count, percent

    numbers = [None, 0, 5, 980, 999.9, 12_345, 999_600, 1.2e6, 3e9, 5e13]
    assert [count(each) for each in numbers] == ["-", "0", "5", "980", "1k", "12.3k", "1M", "1.2M", "3G", "50T"]
    shares = [None, 0, 0.0004, 0.004, 0.05, 0.5, 1]
    assert [percent(each) for each in shares] == ["-", "0%", "<0.1%", "0.4%", "5.0%", "50%", "100%"]
