"""What status says: the JSON objects, the table, the page, and the live view."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from llmops.errors import ClusterError
from llmops.job import JobView
from llmops.monitor.describe import EMPTY, ERROR_LINES, describe
from llmops.monitor.detail import detail, series
from llmops.monitor.status import render, render_run, watch
from llmops.runs.records import list_runs, write_failed

NOW = 1_770_010_000.0


@pytest.fixture
def run(make_run: Any) -> Any:
    """Three attempts: preempted, failed, running."""
    made = make_run("baseline", max_steps=100)
    made.submission(0, "100")
    made.start(0)
    made.metrics(0, range(1, 31))
    made.end(0, "preempted", "requeue", first_step=1, last_step=30, detail="preempted (JobState=RUNNING)")
    made.start(1, "checkpoints/step_00000025/0000-0000")
    made.metrics(1, range(26, 51))
    lines = "\n".join(f"line {number}" for number in range(30))
    failed = {"failed_rank": 3, "failed_host": "n2", "exit_codes": {"3": 1}}
    made.end(1, "failed", "retry", first_step=26, last_step=50, error=lines + "\n\x1b[2J[red]boom[/red]\n", **failed)
    made.start(2, "checkpoints/step_00000050/0001-0000")
    made.metrics(2, range(51, 61))
    return made


RUNNING = {"100": JobView("100", "running", "RUNNING")}


def test_the_json_object(run: Any) -> None:
    (described,) = describe([run.load()], RUNNING)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    error, recent = described.pop("error"), described.pop("recent_losses")
    assert error.splitlines()[-1] == "\x1b[2J[red]boom[/red]"
    assert len(error.splitlines()) == ERROR_LINES
    assert len(recent) == 60
    attempts = described.pop("attempts")
    assert described == {
        "id": "20260131-120001-baseline-aaaa",
        "name": "baseline",
        "owner": "ada",
        "backend": "slurm",
        "job_ids": ["100"],
        "state": "running",
        "reason": "",
        "step": 60,
        "max_steps": 100,
        "loss": 10 / 60 + 2,
        "nodes": 2,
        "ranks_per_node": 2,
        "created": 1_770_000_001.0,
        "url": run.store.url,
        "problems": [],
        "kind": "llm",
        "parent": None,
        "cloned_from": None,
        "phase": "training",
        "tokens_per_s": None,
        "mfu": None,
        "goodput": 0.0,
        "eta_s": None,
        "stalled_s": None,
        "last_commit": {"step": 50, "time": None},
        "restarts": {"preempted": 1, "failed": 1},
        "ended": None,
    }
    assert [(a["number"], a["state"], a["reason"], a["first_step"], a["last_step"]) for a in attempts] == [
        (0, "preempted", "preempted", 1, 30),
        (1, "failed", "failed", 26, 50),
        (2, "running", "", 51, 60),
    ]
    assert attempts[1]["why"] == "failed: rank 3 on n2, exit code 1"
    assert attempts[0]["hosts"] == ["n1", "n2"]
    assert (attempts[0]["started"], attempts[0]["ended"]) == (1_770_000_000.0, 1_770_000_500.0)
    assert (attempts[2]["ended"], attempts[2]["resume_step"]) == (None, 50)


@pytest.mark.parametrize(
    ("job", "state", "attempt"),
    [
        (JobView("100", "running"), "running", "running"),
        (JobView("100", "unreachable"), "unknown", "running"),
        (None, "unknown", "running"),
        (JobView("100", "pending"), "preempted", "lost"),
        (JobView("100", "failed", "NODE_FAIL"), "failed", "lost"),
        (JobView("100", "cancelled"), "cancelled", "cancelled"),
    ],
)
def test_an_attempt_without_an_end(run: Any, job: JobView | None, state: str, attempt: str) -> None:
    (described,) = describe([run.load()], {"100": job} if job else {})
    assert (described["state"], described["attempts"][-1]["state"]) == (state, attempt)


def test_an_older_attempt_without_an_end_is_lost(make_run: Any) -> None:
    made = make_run()
    made.submission()
    made.start(0)
    made.start(1)
    (described,) = describe([made.load()], RUNNING)
    assert [attempt["state"] for attempt in described["attempts"]] == ["lost", "running"]


def test_a_loss_that_is_not_a_number_is_null(make_run: Any) -> None:
    made = make_run()
    made.submission()
    made.start(0)
    made.store.put("metrics/0000/000000.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    run = made.load()
    (described,) = describe([run], RUNNING)
    assert (described["step"], described["loss"], described["recent_losses"]) == (2, None, [2.0, None])
    assert series(run)["loss"] == [2.0, None]


def test_the_step_when_metrics_lag(make_run: Any) -> None:
    made = make_run()
    made.submission()
    made.start(0)
    made.metrics(0, [10, 20])
    made.end(0, "finished", first_step=1, last_step=25)
    assert describe([made.load()], {})[0]["step"] == 25
    made.start(1, "checkpoints/step_00000024/0000-0000")
    assert describe([made.load()], RUNNING)[0]["step"] == 24


def test_a_refusal_is_the_error(make_run: Any) -> None:
    made = make_run()
    made.submission(0, None)
    write_failed(made.store, 0, "sbatch: error: invalid partition")
    assert describe([made.load()], {})[0]["error"] == "sbatch: error: invalid partition"


# Printing


@pytest.fixture
def described(run: Any, make_run: Any) -> list[dict[str, Any]]:
    make_run("evil[bold]\x1b[2Jname", id="20260131-120009-evil-aaaa").submission(0, "200\x1b]0;pwn\x07")
    make_run("x" * 90, id="20260131-120010-long-aaaa", max_steps=None)
    return describe(list_runs(make_run.runs_url), RUNNING)


def printed(show: Any, width: int | None, **options: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=width is not None, color_system="truecolor", **options)
    show(console)
    return file.getvalue()


def without_colours(text: str) -> str:
    from llmops.monitor.text import _ESCAPE

    return _ESCAPE.sub("", text)


@pytest.mark.parametrize("width", [60, 80, 159, 160, 200, 300])
def test_the_table_fits_the_terminal(described: list[dict[str, Any]], width: int) -> None:
    text = printed(lambda console: render(described, console, NOW), width)
    assert "\x1b[2J" not in text
    assert "\x1b]0" not in text
    lines = without_colours(text).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 1 + (7 if width < 160 else 3)  # the running one has a reason and its health
    assert "baseline" in lines[1]
    assert "running" in lines[1]
    assert "60/100" in lines[1]
    assert "2.167" in lines[1]
    assert "2h 46m" in lines[2 if width < 160 else 1]


def test_the_table_says_what_matters(described: list[dict[str, Any]]) -> None:
    narrow = without_colours(printed(lambda console: render(described, console, NOW), 80))
    assert "slurm 100" in narrow
    assert "━━━━━━━━──────" in narrow
    assert "last: failed: rank 3" in narrow
    assert "x3" in narrow
    wide = without_colours(printed(lambda console: render(described, console, NOW), 200))
    assert "3 (last: failed: rank 3" in wide
    assert "evil[bold]name" in wide


def test_a_pipe_gets_one_plain_uncut_line_a_run(described: list[dict[str, Any]]) -> None:
    text = printed(lambda console: render(described, console, NOW), None)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert len(lines) == 4
    assert "x" * 90 in lines[3]
    assert "3 (last: failed: rank 3 on n2, exit code 1)" in lines[1]
    assert all(line == line.rstrip() for line in lines)


def test_no_runs() -> None:
    assert printed(lambda console: render([], console, NOW), 80) == "no runs\n"


@pytest.mark.parametrize("width", [80, 200, None])
def test_the_page(run: Any, width: int | None) -> None:
    loaded = run.load()
    one = detail(loaded, RUNNING["100"], NOW)
    text = printed(lambda console: render_run(one, console, NOW), width)
    assert "\x1b[2J" not in text
    plain = without_colours(text)
    if width:
        assert max(map(len, plain.splitlines())) <= width
    else:
        assert text == plain
    for part in (
        "state     running",
        "step 60 of 100 (60%), loss 2.167",
        "slurm, 2 x 2 ranks; jobs: 100",
        "by ada, 2h 46m ago",
        "preempted (JobState=RUNNING)",
        "failed: rank 3 on n2",
        "26-50",
        "n1, n2",
        "loss by step",
        "  line 29",
        "  [red]boom[/red]",
    ):
        assert part in plain, part


def test_the_page_of_something_that_is_no_run(make_run: Any) -> None:
    made = make_run()
    (made.store.local_path / "run.json").unlink()
    one = detail(made.load(), None, NOW)
    text = printed(lambda console: render_run(one, console, NOW), None)
    assert "problem   run.json is missing" in text


def test_hosts_are_shortened() -> None:
    from llmops.monitor.page import _hosts

    many = [f"gpu-{number:03d}" for number in range(16)]
    assert [_hosts(many, width) for width in (200, 32, 12)] == [", ".join(many), "gpu-000 .. gpu-015 (16)", "16 hosts"]
    assert (_hosts([], 12), _hosts(["a" * 20], 12)) == ("", "a" * 12)


# Live


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def states(*given: Any) -> Any:
    """A fetch that tells one state after the other, or raises; then the last one again and again."""
    remaining = list(given)

    def fetch() -> list[dict[str, Any]]:
        state = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        if state == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
            state = "running"
        if isinstance(state, Exception):
            raise state
        base = {"id": "1", "name": "a", "backend": "slurm", "reason": "why", "step": 3, "max_steps": 9, "created": 1.0}
        return [{**EMPTY, **base, "state": state}]

    return fetch


def test_watching_ends_when_all_is_done() -> None:
    fetch = states("pending", "running", ClusterError("slurm did not answer"), "running", "finished")
    text = without_colours(printed(lambda console: watch(fetch, 0.01, console), 80, height=20))
    assert "not up to date: slurm did not answer" in text
    assert "finished" in text.splitlines()[-2]


@pytest.mark.usefixtures("no_wait")
def test_a_watching_pipe_gets_a_line_a_change() -> None:
    fetch = states("pending", "running", ClusterError("x"), ClusterError("x"), "running", "finished")
    text = printed(lambda console: watch(fetch, 1, console), None)
    first, second, trouble, last = text.splitlines()
    assert [first, second, last] == [f"1 {state} step 3 loss - why" for state in ("pending", "running", "finished")]
    assert trouble == "not up to date: x"


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("no_wait", "ctrl_c")
@pytest.mark.parametrize("width", [80, None])
def test_ctrl_c_ends_the_view(width: int | None) -> None:
    printed(lambda console: watch(states("running", "running", "ctrl-c"), 0.01, console), width)


def test_what_is_alive_is_shown_first_where_there_is_no_room() -> None:
    from llmops.monitor.table import _that_fit

    runs = [
        {"id": i, "state": s, "created": float(i)} for i, s in enumerate(["running", "failed", "failed", "finished"])
    ]
    assert [each["id"] for each in _that_fit(runs, 2)] == [0, 3]
    assert [each["id"] for each in _that_fit(runs, 9)] == [0, 1, 2, 3]


def test_metrics_that_cannot_be_read_hide_nothing_else(make_run):
    run = make_run("r")
    run.submission(0, job_id="1")
    run.start(0)
    run.store.put("metrics/0000/000000.jsonl/x", b"")  # a folder where a file should be
    (described,) = describe([run.load()], {"1": JobView("1", "running")})
    assert described["state"] == "running"
    assert described["loss"] is None
    assert len(described["attempts"]) == 1
    assert described["problems"]
