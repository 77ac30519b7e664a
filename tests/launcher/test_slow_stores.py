"""A store that hangs: whoever waits is told, and can leave."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.conftest import RunMaker
from tests.launcher.harness import LLMOPS, Launcher


@pytest.mark.parametrize("verb", ["status", "goodput"])
def test_a_file_system_that_hangs_is_told_of(make_run: RunMaker, verb: str) -> None:
    made = make_run()
    made.submission()
    path = made.store.local_path / "run.json"
    path.unlink()
    os.mkfifo(path)  # opened, it waits for a writer for ever, as a file on a server that is gone does
    launcher = Launcher(make_run.runs_url, "slurm")
    process = subprocess.Popen(
        [*LLMOPS, verb],
        env=launcher.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # What a shell starts in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    told, deadline = b"", time.monotonic() + 30
    while b"\n" not in told:
        assert time.monotonic() < deadline, "waited 30 s for a word"
        assert process.poll() is None
        told += process.stderr.read() or b""
        time.sleep(0.05)
    assert told.decode().startswith(f"llmops: no answer from {make_run.runs_url} for 5 s")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
