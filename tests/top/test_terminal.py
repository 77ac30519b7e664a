"""``llmops top`` in a real terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.launcher.harness import TINY, TREE, Launcher
from tests.top.screen import Terminal


@pytest.fixture
def launcher(tmp_path) -> Iterator[Launcher]:
    """Local runs of a store of their own; none is left behind."""
    made = Launcher(tmp_path / "runs", "local")
    yield made
    for path in made.root.glob("*/run.json"):
        made.call("cancel", path.parent.name)


def environment(launcher: Launcher, **more: str) -> dict[str, str]:
    return {"LLMOPS_RUNS_URL": launcher.url, "PYTHONPATH": str(TREE), "LANG": "C.UTF-8", **more}


def test_a_run_is_watched_and_cancelled_from_the_screen(launcher, tmp_path):
    run_id = launcher.submit(*TINY, "train.max_steps=5000", "--name", "watched")
    terminal = Terminal(tmp_path, 80, 24, environment(launcher), "--interval", "1")
    try:
        launcher.wait_step(run_id, 5)
        text = terminal.until(lambda text: re.search(r"watched +running .* [0-9]\.[0-9]", text) is not None, "its loss")
        assert "quit" in text.splitlines()[-1]
        terminal.press("l")
        terminal.until(lambda text: "[0/0] step" in text or "following" in text, "its output")
        terminal.press("Escape")
        terminal.until(lambda text: "NAME" in text, "the runs")
        terminal.press("c")
        text = terminal.until(lambda text: "Cancel this run?" in text, "the question")
        assert run_id in text
        terminal.press("Right", "Enter")
        terminal.until(lambda text: "watched: cancelled" in text, "that it is cancelled", timeout=60)
        terminal.until(lambda text: re.search(r"watched +cancelled", text) is not None, "its new state")
        terminal.press("q")
        assert terminal.wait_end() == 0
    finally:
        terminal.close()
    launcher.wait(run_id, "cancelled")
    assert launcher.attempts(run_id) == [("cancelled", "end")]


def test_a_wide_terminal_shows_all_and_a_failed_run_is_resumed(launcher, tmp_path):
    flag = tmp_path / "flag"
    script = f"test -e {flag} && echo second && exit 0; echo 'boom [/x]' >&2; exit 3"
    run_id = launcher.submit(
        "retry.max_failures=1", "retry.backoff_s=0", "--name", "again", command=("bash", "-c", script)
    )
    launcher.wait(run_id, "failed")
    terminal = Terminal(tmp_path, 200, 50, environment(launcher), "--interval", "1")
    try:
        text = terminal.until(lambda text: re.search(r"again .* failed .* rank", text) is not None, "the failure")
        assert "rank 0 on" in text
        (head,) = [line for line in text.splitlines() if "NAME" in line]
        wanted = "NAME OWNER BACKEND STATE WHY PROGRESS STEP LOSS TREND TOK/S MFU GOOD ETA COMMIT TRIES AGE▾"
        assert " ".join(head.split()) == wanted
        terminal.press("Enter")
        terminal.until(lambda text: "boom [/x]" in text and "exit code 3" in text, "the page with its error")
        flag.touch()
        terminal.press("r")
        terminal.until(lambda text: "Resume this run?" in text, "the question")
        terminal.press("Right", "Enter")
        terminal.until(lambda text: "again: resumed" in text, "that it is resumed")
        launcher.wait(run_id, "finished")
        terminal.until(lambda text: re.search(r"state +finished", text) is not None, "its new state")
        terminal.press("C-c")
        assert terminal.wait_end() == 0
    finally:
        terminal.close()


def test_a_terminal_of_sixteen_colours_and_no_utf8(launcher, tmp_path, make_run):
    run = make_run("plain")
    run.submission()
    run.start(0)
    run.end(0, "failed", error="é broken")
    few = environment(launcher, TERM="screen", COLORTERM="", LC_ALL="en_US.ISO-8859-1", PYTHONIOENCODING="ascii")
    terminal = Terminal(tmp_path, 80, 24, few)
    try:
        text = terminal.until(lambda text: "plain" in text and "failed" in text, "the run")
        assert text.isascii()
        coloured = terminal.text(colours=True)
        assert re.search(r"\x1b\[[0-9;]*3[1-7]", coloured), "colours"
        assert "38;2;" not in coloured
        assert "38;5;" not in coloured
    finally:
        terminal.close()


def test_what_is_no_terminal_is_told_so(launcher):
    done = launcher.call("top")
    assert done.returncode == 2
    assert done.stderr == "llmops: error: llmops top needs a terminal; llmops status prints the same\n"
    done = launcher.call("top", "--interval", "0.5")
    assert done.returncode == 2
    assert "--interval 0.5" in done.stderr


def test_without_textual_it_says_what_to_install(launcher):
    code = "import sys; sys.modules['textual'] = None; sys.argv = ['llmops', 'top']\n"
    code += "from llmops.cli.main import entry; entry()"
    python = [sys.executable, "-c", code]
    master, slave = pty.openpty()
    try:
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        done = subprocess.run(python, **streams, env=launcher.env, cwd=TREE, timeout=60)
        assert done.returncode == 2
        assert b"pip install 'llmops[ui]'" in os.read(master, 4096)
    finally:
        os.close(master)
        os.close(slave)


def test_help_is_fast_without_textual(launcher):
    code = "import sys; from llmops.cli.main import main; main(['top', '--help'])"
    script = f"try:\n exec({code!r})\nexcept SystemExit:\n import sys; print('textual' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=launcher.env, cwd=TREE, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
