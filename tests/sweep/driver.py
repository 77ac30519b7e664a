"""Drives ``llmops sweep`` as a user would."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from llmops.agent.output import unstamped
from tests.launcher.harness import Launcher

PROGRAM = Path(__file__).with_name("program.py")
OBJECTIVE = r"sweep.objective='log:step=(?P<step>\d+) loss=(?P<value>\S+)'"
# The curve of tests/sweep/program.py: cheap, and the same whatever happens to it.
CURVE = (OBJECTIVE, "code.enabled=false", "retry.backoff_s=0.2", "retry.max_no_progress=50", "retry.max_failures=200")
OVER = {"complete", "pruned", "nan", "timeout", "failed", "cancelled"}


class Sweeper(Launcher):
    """One run store and the command line that works on its studies."""

    def sweep(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        """Submit a study of the curve; its id."""
        fixed = [f"env.{name}={value}" for name, value in (env or {}).items()]
        tail = ["--", sys.executable, str(PROGRAM)]
        out = self.ok("sweep", "--backend", self.backend, "--json", *CURVE, *fixed, *arguments, *tail)
        study: str = json.loads(out)["id"]
        return study

    def study(self, study: str) -> dict[str, Any]:
        """``sweep status --json``."""
        value = json.loads(self.ok("sweep", "status", "--json", study))
        assert isinstance(value, dict)
        return value

    def until_over(self, study: str, timeout: float = 120) -> list[dict[str, Any]]:
        """Wait until no trial is left to run; the trials."""
        deadline = time.monotonic() + timeout
        while True:
            trials: list[dict[str, Any]] = self.study(study)["trials"]
            if all(trial["state"] in OVER for trial in trials):
                return trials
            shown = [
                (trial["trial"], trial["state"], trial["reason"]) for trial in trials if trial["state"] not in OVER
            ]
            assert time.monotonic() < deadline, f"waited {timeout} s for trials: {shown}\n{self.logs_of(study)}"
            time.sleep(0.5)

    def run_folder(self, study: str, trial: int) -> Path:
        """The run directory of a trial."""
        return self.root / study / "trials" / f"{study}.{trial:04d}"

    def values(self, study: str, trial: int) -> dict[int, str]:
        """What each step of a trial printed, as text; a step that ran twice must have printed the same."""
        found: dict[int, str] = {}
        for path in sorted(self.run_folder(study, trial).glob("logs/*/*/rank0.*.log")):
            for line in (unstamped(each).decode() for each in path.read_bytes().splitlines()):
                if line.startswith("step=") and " loss=" in line:
                    step, value = line.removeprefix("step=").split(" loss=")
                    assert found.setdefault(int(step), value) == value, f"step {step} of trial {trial} differs"
        return found

    def attempts_of(self, study: str, trial: int) -> list[dict[str, Any]]:
        """How each attempt of a trial ended."""
        found = sorted(self.run_folder(study, trial).glob("attempts/*/end.json"))
        return [json.loads(path.read_text()) for path in found]

    def logs_of(self, study: str) -> str:
        """Everything that helps to understand a failed test."""
        texts = []
        for pattern in ("job/*/*.log", "job/*/*.out", "trials/*/attempts/*/end.json", "trials/*/job/*/*.log"):
            texts += [
                f"--- {path.relative_to(self.root)}\n{path.read_text(errors='replace')[-1500:]}"
                for path in sorted(self.root.glob(f"{study}/{pattern}"))
            ]
        return "\n".join(texts)[-20000:]
