"""TorchX's own command line, as its users type it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.launcher.harness import TREE

# Counts steps into a file for each rank, stops when the supervisor says so, and goes on from the file: a program that
# takes part in a few lines. Its number is its node's: torchrun gives ranks of its own, in another order each time.
COUNTER = """
import json, os, sys, time
from pathlib import Path

node, steps = os.environ["NODE_RANK"], int(sys.argv[2])
state = Path(sys.argv[1], node)
control = Path(os.environ["LLMOPS_CONTROL_DIR"])
step = first = int(state.read_text()) if state.exists() else 0
print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} starts at {step} in {os.environ['WHERE']}", flush=True)
while step < steps:
    time.sleep(0.1)
    step += 1
    beat = {"step": step, "first_step": first + 1, "phase": "train", "time": time.time()}
    (control / f"heartbeat.{node}").write_text(json.dumps(beat))
    if (control / "stop").exists():
        state.write_text(str(step))
        (control / f"stopped.{node}").write_text(json.dumps({"step": step}))
        sys.exit(75)
print(f"rank {os.environ['RANK']} done at {step}", flush=True)
"""


class Torchx:
    """``torchx`` with a run store, in a folder that holds the user's script."""

    def __init__(self, runs: Path, folder: Path) -> None:
        path = f"{TREE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
        self.folder = folder
        self.env = {**os.environ, "LLMOPS_RUNS_URL": str(runs), "PYTHONPATH": path, "LOGLEVEL": "WARNING"}
        # As in an activated environment: dist.ddp calls torchrun by its name.
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        command = [sys.executable, "-m", "torchx.cli.main", *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.env, text=True, capture_output=True, timeout=300)

    def ok(self, *arguments: str) -> str:
        """Run one command that must succeed; its output."""
        done = self.call(*arguments)
        assert done.returncode == 0, f"torchx {arguments} returned {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, handle: str) -> str:
        """As ``torchx status`` has it."""
        lines = [line.split() for line in self.ok("status", handle).splitlines()]
        return next(words[1] for words in lines if words[:1] == ["State:"])
