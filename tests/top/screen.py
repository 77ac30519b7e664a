"""What a screen shows as text, and waiting for it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from llmops.top.app import TopApp
from llmops.top.source import Source
from tests.launcher.harness import LLMOPS, TREE

WAIT_S = 20.0


def shown(app: TopApp) -> str:
    """Every character that is on the screen."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips)


async def until(app: TopApp, pilot: Any, condition: Callable[[str], bool], what: str) -> str:
    """Wait until the screen shows something."""
    deadline = time.monotonic() + WAIT_S
    while not condition(text := shown(app)):
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}; there is:\n{text}"
        await pilot.pause(0.05)
    return text


def drive(
    source: Source,
    steps: Callable[[TopApp, Any], Awaitable[None]],
    size: tuple[int, int] = (120, 40),
    ascii_only: bool = False,
    colours: int = 1 << 24,
) -> None:
    """Run the program without a terminal, and press its keys."""

    async def run() -> None:
        app = TopApp(source, 1.0, ascii_only, colours)
        async with app.run_test(size=size, notifications=True) as pilot:
            await steps(app, pilot)

    asyncio.run(run())


def tmux_binary() -> str:
    """tmux, installed first where it is missing. Fails where it cannot be."""
    command = ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", "tmux"]
    if shutil.which("tmux") is None and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "--quiet"], check=False, capture_output=True, timeout=300)
        subprocess.run(command, check=False, capture_output=True, timeout=300)
    found = shutil.which("tmux")
    if found is None:
        pytest.fail(f"no terminal for the tests: {' '.join(command)}", pytrace=False)
    return found


class Terminal:
    """``llmops top`` in a terminal of tmux, with a server of its own."""

    def __init__(self, folder: Path, width: int, height: int, env: dict[str, str], *arguments: str) -> None:
        self._tmux = [tmux_binary(), "-S", str(folder / "tmux"), "-f", "/dev/null"]
        words = [f"{key}={value}" for key, value in env.items()]
        # tmux does not always show how a program ended, nor its last words.
        self._code = folder / "exit_code"
        shell = ["sh", "-c", '"$@"; echo $? > "$0.new"; mv "$0.new" "$0"', str(self._code)]
        command = [*shell, "env", "-u", "COLUMNS", "-u", "LINES", *words, *LLMOPS, "top", *arguments]
        size = ["-x", str(width), "-y", str(height)]
        self._call("new-session", "-d", *size, "-c", str(TREE), "--", *command, ";", "set", "remain-on-exit", "on")

    def _call(self, *arguments: str) -> str:
        done = subprocess.run([*self._tmux, *arguments], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def press(self, *keys: str) -> None:
        """Keys by tmux's names."""
        self._call("send-keys", *keys)

    def text(self, colours: bool = False) -> str:
        """What is on the terminal; with its escape sequences of colours."""
        return self._call("capture-pane", "-p", *(["-e"] if colours else []))

    def until(self, condition: Callable[[str], bool], what: str, timeout: float = WAIT_S) -> str:
        """Wait until the terminal shows something."""
        deadline = time.monotonic() + timeout
        while not condition(text := self.text()):
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}; there is:\n{text}"
            time.sleep(0.1)
        return text

    def wait_end(self) -> int:
        """Wait until the program has ended; its exit code."""
        self.until(lambda _: self._code.exists(), "the end of the program")
        return int(self._code.read_text())

    def close(self) -> None:
        """End whatever runs in it."""
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, timeout=30, check=False)
