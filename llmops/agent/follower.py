"""The process beside a trial that tells its study how it goes: ``python -m llmops.sweep.follow``."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from llmops.agent import ranks
from llmops.agent.log import log
from llmops.agent.rundir import RunDir
from llmops.agent.signals import be_deaf

END_S = 30.0  # for its last words, once the trial is over


def study_environment(spec: dict[str, Any]) -> dict[str, str]:
    """For processes that reach the study's storage, whose URL may be a secret."""
    return {**os.environ, **ranks.read_secrets(spec["options"].get("secrets_file"), spec["secrets"])}


class Follower:
    """Started for trials only. It stops a trial by the run's own record of intent, which supervisors look for."""

    def __init__(self, rundir: RunDir, submission: int, spec: dict[str, Any]) -> None:
        study = spec["study"]
        command = [sys.executable, "-m", "llmops.sweep.follow", "--study", study["url"], "--trial", str(study["trial"])]
        command += ["--run", rundir.path("").rstrip("/"), "--submission", str(submission)]
        self.process = subprocess.Popen(
            command,
            cwd="/",
            env=study_environment(spec),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            preexec_fn=be_deaf,
        )

    def finish(self) -> None:
        """Let it record how the trial ended. What it cannot do in time, whoever looks at the study does later."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            log(f"the study was not told within {END_S:.0f} s how this trial ended; `llmops sweep status` sees to it")
            self.abandon()
        else:
            if code:
                log(f"the study was not told how this trial ended (exit code {code}); `llmops sweep status` sees to it")

    def abandon(self) -> None:
        """The trial goes on elsewhere."""
        self.process.kill()
        self.process.wait()
