"""The screens over a real run store, driven by keys."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import pytest

from llmops.errors import ClusterError
from llmops.overview import Overview
from llmops.top.source import Source
from llmops.top.widgets import Confirm
from tests.top.screen import drive, until

HOSTILE = "[bold red]x[/] \x1b[31mred\x1b[0m [@click=app.quit]y"


@pytest.fixture
def store(make_run):
    """Three runs that are over: finished, failed and one with a name that tries to be markup."""
    first = make_run("steady", owner="ada")
    first.submission()
    first.start(0)
    first.metrics(0, range(1, 101), time=1_770_000_400.0, tokens_per_s=12345.0)
    first.log(0, 0, "hello of steady\n\x1b[32mgreen\x1b[0m [b]no markup[/b] [/x]\n")
    first.end(0, "finished", last_step=100)
    second = make_run("broken", owner="bob")
    second.submission()
    second.start(0)
    second.log(0, 3, "Traceback (most recent call last):\nValueError: bad [/token]\n", node="n2")
    second.end(0, "failed", failed_rank=3, failed_host="n2", exit_codes={"3": 1}, error="ValueError: bad [/token]")
    third = make_run("hostile", owner=HOSTILE)
    third.submission()
    third.start(0)
    third.end(0, "cancelled", detail=HOSTILE)
    return make_run


def source(store) -> Source:
    return Source(store.runs_url)


def test_runs_are_shown_newest_first_and_the_cursor_tells_of_one(store):
    async def steps(app, pilot):
        text = await until(app, pilot, lambda text: "steady" in text and "every 1 s" in text, "the runs")
        assert text.index("hostile") < text.index("broken") < text.index("steady")
        for word in ("3 runs", "1 finished", "1 failed", "1 cancelled", "100%", "12.3k"):
            assert word in text, word
        await pilot.press("j")
        await until(app, pilot, lambda text: "rank 3 on n2" in text.splitlines()[-3], "the failed run's reason")

    drive(source(store), steps)


def test_what_others_wrote_is_text(store):
    async def steps(app, pilot):
        text = await until(app, pilot, lambda text: "hostile" in text, "the runs")
        assert "[bold" in text
        await pilot.press("enter")
        text = await until(app, pilot, lambda text: "ATTEMPT" in text, "the page")
        assert "[bold red]x[/] red [@click=app.quit]y" in text

    drive(source(store), steps, size=(200, 50))


def test_columns_fit_the_width(store):
    async def narrow(app, pilot):
        text = await until(app, pilot, lambda text: "steady" in text, "the runs")
        (head,) = [line for line in text.splitlines() if "NAME" in line]
        assert head.split() == ["NAME", "STATE", "PROGRESS", "LOSS", "TREND", "ETA", "COMMIT"]
        assert "quit" in text

    async def wide(app, pilot):
        text = await until(app, pilot, lambda text: "steady" in text, "the runs")
        (head,) = [line for line in text.splitlines() if "NAME" in line]
        for word in ("OWNER", "BACKEND", "WHY", "STEP", "TOK/S", "MFU", "GOOD", "TRIES", "AGE"):
            assert word in head

    drive(source(store), narrow, size=(80, 24))
    drive(source(store), wide, size=(200, 50))


def test_a_filter_works_as_it_is_typed(store):
    async def steps(app, pilot):
        await until(app, pilot, lambda text: "steady" in text, "the runs")
        await pilot.press("slash", *"bob fai")
        await until(app, pilot, lambda text: "broken" in text and "steady" not in text, "the one that matches")
        await pilot.press(*"x")
        await until(app, pilot, lambda text: "no run matches" in text, "that nothing matches")
        await pilot.press("backspace", "enter", "j")
        text = await until(app, pilot, lambda text: "broken" in text, "the one that matches")
        assert "bob fai" in text, "a filter in force stays to be seen"
        await pilot.press("escape")
        await until(app, pilot, lambda text: "steady" in text and "hostile" in text, "all runs")

    drive(source(store), steps)


def test_order_and_live_only(store):
    async def steps(app, pilot):
        await until(app, pilot, lambda text: "steady" in text, "the runs")
        await pilot.press("s")
        text = await until(app, pilot, lambda text: "by name" in text, "the next order")
        assert text.index("broken ") < text.index("hostile ") < text.index("steady ")
        await pilot.press("a")
        await until(app, pilot, lambda text: "live only" in text and "steady" not in text, "live runs alone")
        await pilot.press("a")
        await until(app, pilot, lambda text: "steady" in text, "all runs")

    drive(source(store), steps)


def test_the_cursor_stays_on_its_run(store):
    async def steps(app, pilot):
        await until(app, pilot, lambda text: "steady" in text, "the runs")
        await pilot.press("j")
        before = app.screen.selected["id"]
        new = store("newcomer")
        new.submission()
        new.start(0)
        new.end(0, "finished")
        await until(app, pilot, lambda text: "newcomer" in text, "a new run")
        assert app.screen.selected["id"] == before
        assert "-broken-" in before

    drive(source(store), steps)


def test_the_page_of_a_run(store):
    async def steps(app, pilot):
        await until(app, pilot, lambda text: "steady" in text, "the runs")
        await pilot.press("G", "enter")
        text = await until(app, pilot, lambda text: "loss by step" in text, "the page")
        for word in ("step 100 of 100", "ATTEMPT", "n1, n2", "finished", "goodput"):
            assert word in text, word
        assert any("⠀" <= character <= "⣿" for character in text), "a curve of dots"
        await pilot.press("escape")
        await until(app, pilot, lambda text: "broken" in text, "the runs again")

    drive(source(store), steps, size=(100, 50))


def test_output_and_its_filter(store):
    async def steps(app, pilot):
        await until(app, pilot, lambda text: "steady" in text, "the runs")
        await pilot.press("G", "l")
        text = await until(app, pilot, lambda text: "hello of steady" in text, "the output")
        assert "[0/0] green [b]no markup[/b] [/x]" in text
        await until(app, pilot, lambda text: "the run is over" in text, "the end of it")
        await pilot.press("slash", *"HELLO")
        await until(app, pilot, lambda text: "hello of steady" in text and "green" not in text, "what matches")
        await pilot.press("escape")
        await until(app, pilot, lambda text: "green" in text, "all lines")
        await pilot.press("escape")
        await until(app, pilot, lambda text: "broken" in text, "the runs again")

    drive(source(store), steps)


def test_errors_of_a_run(store):
    async def steps(app, pilot):
        await until(app, pilot, lambda text: "steady" in text, "the runs")
        await pilot.press("j", "e")
        text = await until(app, pilot, lambda text: "attempt 0, rank 3 on n2" in text, "the errors")
        assert "Traceback (most recent call last)" in text
        assert "ValueError: bad [/token]" in text

    drive(source(store), steps)


class Asked(Source):
    """Writes down what it is asked to do, and refuses it."""

    asked: ClassVar[list[tuple[str, ...]]] = []

    def cancel(self, ref: str, graceful: bool) -> str:
        self.asked.append(("cancel", ref, str(graceful)))
        raise ClusterError("slurm did [not] answer")

    def resume(self, ref: str) -> str:
        self.asked.append(("resume", ref))
        return super().resume(ref)


def test_nothing_is_done_without_a_confirmation(store):
    waiting = store("waiting")
    waiting.submission(job_id=None)
    asking = Asked(store.runs_url)
    asking.asked.clear()

    async def steps(app, pilot):
        await until(app, pilot, lambda text: "waiting" in text, "the runs")
        for keys in (("c", "enter"), ("c", "escape"), ("c", "n"), ("r", "enter")):
            await pilot.press(*keys)
            await pilot.pause()
            assert not isinstance(app.screen, Confirm)
        assert asking.asked == []
        await pilot.press("c")
        text = await until(app, pilot, lambda text: "Cancel this run?" in text, "the question")
        assert "-waiting-" in text
        await pilot.press("right", "right", "enter")
        await until(app, pilot, lambda text: "slurm did [not] answer" in text, "what became of it")
        assert asking.asked == [("cancel", app.screen.selected["id"], "False")]
        await pilot.press("c", "right", "enter")
        await pilot.pause()
        assert asking.asked[-1][-1] == "True", "it saves first"

    drive(asking, steps)


def test_a_run_that_is_over_is_not_cancelled_and_its_resume_that_cannot_work_is_one_line(store):
    async def steps(app, pilot):
        await until(app, pilot, lambda text: "steady" in text, "the runs")
        await pilot.press("c")
        await until(app, pilot, lambda text: "is over already" in text, "that it is over")
        await pilot.press("r", "right", "enter")
        await until(app, pilot, lambda text: "hostile: " in text, "why it cannot be resumed")

    drive(source(store), steps)


class Hanging(Source):
    """A store that does not answer, until it is let go."""

    go = threading.Event()

    def overview(self) -> Overview:
        self.go.wait(60)
        return super().overview()


def test_a_store_that_hangs_blocks_no_key(store):
    async def steps(app, pilot):
        await until(app, pilot, lambda text: "reading" in text, "that it is read")
        began = time.monotonic()
        await pilot.press("question_mark")
        await until(app, pilot, lambda text: "page down" in text, "the keys")
        await pilot.press("escape", "s")
        await until(app, pilot, lambda text: "by name" in text, "the next order")
        assert time.monotonic() - began < 5

    began = time.monotonic()
    drive(Hanging(store.runs_url), steps)
    assert time.monotonic() - began < 15, "nor does it hold up the end"
    Hanging.go.set()


class Failing(Source):
    """Answers once."""

    looks = 0

    def overview(self) -> Overview:
        Failing.looks += 1
        if Failing.looks > 1:
            raise ClusterError("the store [s3] is not there")
        return super().overview()


def test_trouble_is_told_and_what_was_known_stays(store):
    async def steps(app, pilot):
        text = await until(app, pilot, lambda text: "not up to date" in text, "the trouble")
        assert "the store [s3] is not there" in text
        assert "steady" in text

    drive(Failing(store.runs_url), steps)


def test_ascii_alone_where_the_terminal_has_no_more(store):
    async def steps(app, pilot):
        text = await until(app, pilot, lambda text: "steady" in text, "the runs")
        assert text.isascii(), text
        await pilot.press("c")
        await pilot.press("G", "enter")
        text = await until(app, pilot, lambda text: "loss by step" in text, "the page")
        assert text.isascii(), text

    drive(source(store), steps, ascii_only=True, colours=16)


def test_many_runs_are_drawn_quickly(make_run):
    for number in range(120):
        run = make_run(f"run{number:03d}", id=f"20260131-{number:06d}-run-aaaa")
        run.submission()
        run.start(0)
        run.metrics(0, range(1, 11))
        run.end(0, "finished", last_step=10)

    async def steps(app, pilot):
        await until(app, pilot, lambda text: "120 runs" in text, "all runs")
        began = time.monotonic()
        for _ in range(20):
            app.screen._draw()
        assert (time.monotonic() - began) / 20 < 0.2
        await pilot.press("slash", *"run077")
        await until(app, pilot, lambda text: "run077" in text and "run076" not in text, "the one that matches")

    drive(Source(make_run.runs_url), steps, size=(200, 50))
