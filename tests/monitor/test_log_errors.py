"""Which rank failed first, and why: tracebacks as real programs leave them, among a thousand ranks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from llmops.agent.output import stamp
from llmops.cli.main import main
from llmops.monitor import log_errors
from llmops.monitor.log_streams import Selection
from llmops.monitor.tracebacks import Line, find, text_of

T0 = 1_770_000_000.0
NCCL = "torch.distributed.DistBackendError: NCCL error in: /x/ProcessGroupNCCL.cpp:12{0}, remote process exited"


def python(code: str) -> str:
    """What the interpreter itself writes when ``code`` fails."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode != 0
    return done.stderr


def lines_of(text: str) -> list[Line]:
    return [Line(line, T0) for line in text.splitlines()]


def shown(text: str) -> list[str]:
    failure = find(lines_of(text))
    assert failure is not None
    return text_of(failure, lines_of(text))


CHAINED = """
def inner():
    raise KeyError("missing")
try:
    inner()
except KeyError as error:
    raise ValueError("two\\nlines") from error
"""
DURING = """
try:
    1 / 0
except ZeroDivisionError:
    raise RuntimeError("while cleaning up")
"""
GROUP = """
raise ExceptionGroup("several", [ValueError("one"), TypeError("two")])
"""
DEEP = """
def down(): down()
down()
"""
SYNTAX = "def f(:\n"
OWN = """
class Gone(Exception): pass
raise Gone
"""
NOTES = """
error = ValueError("x")
error.add_note("a note that tells more")
raise error
"""


@pytest.mark.parametrize(
    ("code", "title"),
    [
        (CHAINED, "ValueError: two"),
        (DURING, "RuntimeError: while cleaning up"),
        (GROUP, "ExceptionGroup: several (2 sub-exceptions)"),
        (DEEP, "RecursionError: maximum recursion depth exceeded"),
        (OWN, "Gone"),
        (NOTES, "ValueError: x"),
        ("import sys; sys.path.insert(0, ''); raise SystemError", "SystemError"),
        ("import json; json.loads('{')", "json.decoder.JSONDecodeError: Expecting property name enclosed"),
    ],
)
def test_what_python_writes_is_found_whole(code: str, title: str) -> None:
    text = python(code)
    failure = find(lines_of(f"step 1 loss 2\n{text}"))
    assert failure is not None
    assert (failure.kind, failure.secondary) == ("traceback", False)
    assert failure.title.startswith(title)
    assert [line for line in shown(f"step 1 loss 2\n{text}") if line] == [line for line in text.splitlines() if line]


def test_lines_of_others_in_between_are_left_out() -> None:
    text = python(CHAINED).splitlines()
    mixed = []
    for number, line in enumerate(text):
        mixed += [line, f"step {number} loss=2.5", "Epoch: 3"] if line.strip() else [line]
    found = shown("\n".join(["before", *mixed]))
    wanted = [line for line in text if line.strip() and line != "lines"]
    assert [line for line in found if line in text and line != "lines"] == wanted
    assert "before" not in found
    failure = find(lines_of("\n".join(mixed)))
    assert failure is not None
    assert failure.title == "ValueError: two"


def test_pytorch_puts_the_rank_before_each_line() -> None:
    text = "".join(f"[rank3]: {line}\n" for line in python(DURING).splitlines())
    failure = find(lines_of(f"start\n{text}[rank3]:[W123] warning of another kind\n"))
    assert failure is not None
    assert failure.title == "RuntimeError: while cleaning up"
    assert failure.kind == "traceback"
    assert shown(text)[0] == "[rank3]: Traceback (most recent call last):"
    assert "[rank3]: ZeroDivisionError: division by zero" in shown(text)


WORKER = """Traceback (most recent call last):
  File "train.py", line 10, in <module>
    for batch in loader:
ValueError: Caught ValueError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 308, in _worker_loop
    data = fetcher.fetch(index)
ValueError: bad sample 17

"""


def test_a_worker_of_a_data_loader_tells_the_original() -> None:
    assert shown(f"x\n{WORKER}") == WORKER.rstrip("\n").split("\n")
    failure = find(lines_of(WORKER))
    assert failure is not None
    assert failure.title == "ValueError: bad sample 17"


def own(title: str = "ValueError: bad sample 17") -> str:
    return f'Traceback (most recent call last):\n  File "train.py", line 7, in <module>\n    step()\n{title}\n'


def test_the_death_of_others_after_one_of_its_own_is_not_the_cause() -> None:
    for second in (own(NCCL), f"Exception ignored in: <function f>\n{own('OSError: gone')}"):
        failure = find(lines_of(own() + second))
        assert failure is not None
        assert (failure.title, failure.secondary) == ("ValueError: bad sample 17", False)
    failure = find(lines_of(own(NCCL)))
    assert failure is not None
    assert failure.secondary


def test_what_was_survived_is_no_failure() -> None:
    early = [Line(line, T0) for line in own().splitlines()]
    late = [Line(f"step {number}", T0 + 100 + number) for number in range(50)]
    failure = find([*early, *late])
    assert failure is not None
    assert (failure.kind, failure.title) == ("end", "step 49")
    # A rank that said nothing more until the others gave up waiting for it has not survived.
    stuck = find([*early, Line("watchdog", T0 + 600)])
    assert stuck is not None
    assert stuck.title == "ValueError: bad sample 17"


@pytest.mark.parametrize(
    ("text", "kind", "title"),
    [
        ("", None, ""),
        ("\n\n", None, ""),
        ("all\nis well\n", "end", "is well"),
        ("x\nterminate called after throwing an instance of 'E'\n  what(): boom\nbye\n", "message", "terminate called"),
        ("step\nSegmentation fault (core dumped)\n", "message", "Segmentation fault"),
        ("thread 'main' panicked at src/main.rs:4:5:\nindex out of bounds\nnote: x\n", "message", "thread 'main'"),
        ("RuntimeError: CUDA error: an illegal memory access\nx\n", "message", "RuntimeError: CUDA"),
        ("Traceback (most recent call last):\n", "traceback", ""),
        ('Traceback (most recent call last):\n  File "a", line 1\n    x', "traceback", ""),
    ],
)
def test_other_ends(text: str, kind: str | None, title: str) -> None:
    failure = find(lines_of(text))
    assert (failure and failure.kind) == kind
    assert failure is None or failure.title.startswith(title)


# Among ranks


def log(made: Any, rank: int, seconds: float, text: str, node: str = "n1", attempt: int = 0) -> None:
    begin = stamp(T0 + seconds).decode()
    made.log(attempt, rank, "".join(f"{begin}{line}\n" for line in text.splitlines()), node=node)


def failed(make_run: Any, codes: dict[int, int], rank: int | None = None, **end: Any) -> Any:
    made = make_run(nodes=1, ranks_per_node=max(codes, default=0) + 1)
    made.submission()
    made.start(0)
    told = {str(key): code for key, code in codes.items()}
    made.end(0, "failed", "end", **{"exit_codes": told, "failed_rank": rank, "failed_host": "n1", **end})
    return made


def call(made: Any, capsys: Any, *arguments: str) -> tuple[int, str]:
    path = made.store.local_path
    capsys.readouterr()
    code = main(["logs", "--runs-url", str(path.parent), path.name, "--errors", *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def test_the_first_rank_with_an_error_of_its_own(make_run: Any, capsys: Any) -> None:
    made = failed(make_run, dict.fromkeys(range(8), 1) | {7: -9}, rank=2)
    for rank in range(6):
        log(made, rank, 5 + rank / 100, f"training\n{own(NCCL.format(rank))}")
    log(made, 5, 9.0, f"training\n{own('ValueError: later')}")
    log(made, 6, 8.0, f"training\n{own()}", node="n9")
    log(made, 7, 1.0, "training\nlast words")
    code, out = call(made, capsys)
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith("attempt 0, rank 6 on n9, 2026-02-02 ")
    assert lines[0].endswith(", exit code 1")
    assert lines[1:5] == ["  " + line for line in own().splitlines()]
    assert lines[5] == ""
    assert lines[6].startswith("5 ranks: torch.distributed.DistBackendError: NCCL error")
    assert lines[6].endswith("(ranks 0-4)")
    assert lines[7:] == [
        "1 rank: ValueError: later (rank 5)",
        "1 rank: killed, without an error of its own (rank 7)",
    ]
    code, out = call(made, capsys, "--rank", "0-5")
    assert out.startswith("attempt 0, rank 5 on n1")


def test_a_rank_that_died_without_a_word_is_the_cause_of_what_others_say(make_run: Any, capsys: Any) -> None:
    made = failed(make_run, {0: 1, 1: -11, 2: 1}, rank=1)
    for rank in (0, 2):
        log(made, rank, 5, own(NCCL))
    log(made, 1, 4, "step 1\nstep 2")
    _, out = call(made, capsys)
    assert out.startswith("attempt 0, rank 1 on n1, ")
    assert ", signal 11\n  step 1\n  step 2\n" in out
    assert "2 ranks: torch.distributed.DistBackendError" in out


def test_a_program_in_another_language(make_run: Any, capsys: Any) -> None:
    made = failed(make_run, {0: 134, 1: -15}, rank=0)
    log(made, 0, 4, "working\nterminate called after throwing an instance of 'std::runtime_error'\nAborted")
    log(made, 1, 4, "working")
    _, out = call(made, capsys)
    assert ", exit code 134\n  working\n  terminate called" in out


def test_only_deaths_of_others_are_told_as_such(make_run: Any, capsys: Any) -> None:
    made = failed(make_run, {0: 1, 1: 1}, rank=0)
    for rank in (0, 1):
        log(made, rank, 5 - rank, own(NCCL))
    _, out = call(made, capsys)
    assert out.startswith("attempt 0, rank 1 on n1")
    assert "no rank has an error of its own; what was recorded: failed: rank 0 on n1, exit code 1" in out


def test_what_did_not_fail_is_said(make_run: Any, capsys: Any) -> None:
    made = failed(make_run, {0: 1}, rank=0)
    log(made, 0, 1, own())
    made.start(1)
    made.end(1, "finished")
    log(made, 0, 1, own(), attempt=1)
    said = f"attempt 1 of {made.load().id} finished: no rank of it failed\n"
    assert call(made, capsys, "--attempt", "-1") == (0, said)
    assert call(made, capsys)[1].startswith("attempt 0, rank 0"), "the newest that failed"
    fine = make_run("fine")
    fine.submission()
    assert call(fine, capsys) == (0, f"no attempt of {fine.load().id} has failed\n")


def test_no_output_at_all(make_run: Any, capsys: Any) -> None:
    made = failed(make_run, {0: 1}, error="the code\ncannot be unpacked \x1b[2J")
    code, out = call(made, capsys)
    assert (code, out.splitlines()[1:]) == (1, ["  the code", "  cannot be unpacked"])
    assert "no rank has output" in out
    made.log(0, 0, "")
    assert "it wrote nothing" in call(made, capsys)[1]


def test_an_attempt_that_nobody_recorded(make_run: Any, capsys: Any) -> None:
    made = make_run()
    made.submission()
    made.start(0)
    made.start(1)
    log(made, 0, 4, own())
    _, out = call(made, capsys)
    assert out.startswith("attempt 0, rank 0 on n1")
    assert "nobody recorded the end" in out


def test_only_the_ends_are_read_and_parts_belong_together(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = failed(make_run, {0: 1}, rank=0)
    text = own()
    made.log(0, 0, "x" * 1_000_000 + "\n" + text[:40])
    made.log(0, 0, text[40:], part=1)
    told = log_errors.errors(made.load(), 0, Selection())
    assert told.cause is not None
    assert told.cause.text == text.splitlines()
    (made.store.local_path / "logs/0000/n1/rank1.000000.log").mkdir()
    assert log_errors.errors(made.load(), 0, Selection()).cause == told.cause


def test_spans() -> None:
    assert log_errors.spans([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"
    assert log_errors.spans(list(range(0, 40, 2))) == "0, 2, 4, 6, 8, 10, 12, 14, …"
