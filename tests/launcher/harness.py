"""Drives the installed ``llmops`` command as a user would, and reads what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmops.agent.processes import MARKER
from llmops.runs.lineage import merged_metrics
from llmops.runs.records import load_run
from llmops.runs.store import open_store

TREE = Path(__file__).parents[2]
LLMOPS = [sys.executable, "-m", "llmops"]
# Small enough to finish in seconds, long enough to be interrupted in the middle.
TINY = ("recipe=tiny", "train.max_steps=60", "checkpoint.every_steps=10", "eval.sample_prompts=[]", "eval.batches=1")


class Launcher:
    """One run store and the command line that works on it."""

    def __init__(self, root: Path | str, backend: str, **env: str) -> None:
        self.url, self.root, self.backend = str(root), Path(root), backend
        # One composition cache for all tests, apart from the user's own.
        self.env = {**os.environ, "LLMOPS_RUNS_URL": self.url, "PYTHONPATH": str(TREE), **env}

    def call(self, *arguments: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        return subprocess.run(
            [*LLMOPS, *arguments], env=self.env, text=True, capture_output=True, timeout=timeout, cwd=TREE, **options
        )

    def ok(self, *arguments: str, **options: Any) -> str:
        """Run one command that must succeed; its output."""
        done = self.call(*arguments, **options)
        assert done.returncode == 0, f"llmops {arguments} returned {done.returncode}: {done.stderr}{done.stdout}"
        return done.stdout

    def submit(self, *arguments: str, command: tuple[str, ...] = ()) -> str:
        """Submit a run and return its id."""
        tail = ["--", *command] if command else []
        out = self.ok("submit", "--backend", self.backend, "--json", *arguments, *tail)
        run_id: str = json.loads(out)["id"]
        return run_id

    def status(self, run_id: str) -> dict[str, Any]:
        """The run's status object."""
        done = self.call("status", "--json", run_id)
        assert done.returncode in (0, 1), done.stderr
        (value,) = json.loads(done.stdout)
        assert isinstance(value, dict)
        return value

    def shares(self, run_id: str) -> dict[str, float]:
        """Where the run's time went, by kind; sums to one."""
        found = json.loads(self.ok("goodput", run_id, "--json"))["total"]
        assert abs(sum(found["shares"].values()) - 1) < 1e-9, found
        shares: dict[str, float] = found["shares"]
        return shares

    def wait(self, run_id: str, *states: str, timeout: float = 240) -> dict[str, Any]:
        """Wait until the run is in one of the states; its status."""
        deadline = time.monotonic() + timeout
        while True:
            value = self.status(run_id)
            if value["state"] in states:
                return value
            over = value["state"] in ("finished", "failed", "cancelled")
            assert not over, (
                f"{run_id} is {value['state']}, not {states}: {json.dumps(value, indent=1)}\n{self.trace(run_id)}"
            )
            assert time.monotonic() < deadline, (
                f"waited {timeout} s for {run_id} to be {states}; it is {value['state']}\n{self.trace(run_id)}"
            )
            self._wait_for_news(run_id)

    def _wait_for_news(self, run_id: str) -> None:
        """Until something is written beside the run's output, or a while: a question costs a process of its own."""
        until = time.monotonic() + (1 if "://" in self.url else 2)
        before = self._news(run_id)
        while time.monotonic() < until and self._news(run_id) == before:
            time.sleep(0.1)

    def _news(self, run_id: str) -> list[tuple[str, int]]:
        found = []
        for pattern in ("attempts/*/*", "job/*/*.json"):
            for path in self.root.glob(f"{run_id}/{pattern}"):
                with contextlib.suppress(FileNotFoundError):
                    found.append((str(path), path.stat().st_mtime_ns))
        return sorted(found)

    def wait_step(self, run_id: str, step: int, timeout: float = 180) -> None:
        """Wait until the newest attempt has done ``step``."""
        self.wait_for(lambda: (self.step(run_id) or 0) >= step, timeout, f"{run_id} to reach step {step}", run_id)

    def wait_for(
        self, condition: Callable[[], Any], timeout: float, what: str | Callable[[], str], run_id: str
    ) -> None:
        """Wait for anything else about a run."""
        deadline = time.monotonic() + timeout
        while not condition():
            told = what if isinstance(what, str) else what()
            assert time.monotonic() < deadline, f"waited {timeout} s for {told}\n{self.trace(run_id)}"
            time.sleep(0.05)

    def step(self, run_id: str) -> int | None:
        """Last step in the newest attempt's metrics, or in an object store: of its rank 0's heartbeat."""
        if "://" in self.url:
            return self._heartbeat(run_id)
        parts = sorted(self.root.glob(f"{run_id}/metrics/*/*.jsonl"))
        steps = []
        for line in parts[-1].read_text().splitlines() if parts else []:
            value = json.loads(line) if line.endswith("}") else {}
            if value.get("kind") == "step":
                steps.append(value["step"])
        return max(steps, default=None)

    def _heartbeat(self, run_id: str) -> int | None:
        for _, env in _processes():
            if env.get("LLMOPS_RUN_ID") == run_id and env.get("RANK") == "0":
                path = Path(env["LLMOPS_CONTROL_DIR"], "heartbeat.0")
                try:
                    step = json.loads(path.read_text())["step"]
                except FileNotFoundError:
                    continue
                return None if step is None else int(step)
        return None

    def losses(self, run_id: str) -> dict[int, float]:
        """Loss of every step of the merged trajectory; each step must be there once."""
        steps = list(merged_metrics(load_run(open_store(self.url).sub(run_id))))
        numbers = [step["step"] for step in steps]
        assert numbers == sorted(set(numbers)), f"steps twice or out of order: {numbers}"
        return {step["step"]: step["loss"] for step in steps}

    def attempts(self, run_id: str) -> list[tuple[str, str]]:
        """(reason, next) of every attempt that has ended."""
        found = []
        for path in sorted(self.root.glob(f"{run_id}/attempts/*/end.json")):
            end = json.loads(path.read_text())
            found.append((end["reason"], end["next"]))
        return found

    def ranks(self, run_id: str) -> dict[int, int]:
        """Pids of the live ranks of a run, by rank: processes that the supervisor started itself."""
        return {
            int(env["RANK"]): pid
            for pid, env in _processes()
            if env.get("LLMOPS_RUN_ID") == run_id and MARKER in env and "RANK" in env and not _is_child_of_marked(pid)
        }

    def agents(self, run_id: str) -> list[int]:
        """Pids of the run's node agents: the parents of its ranks."""
        return sorted({_stat(pid)[1] for pid in self.ranks(run_id).values()})

    def alive(self, run_id: str) -> list[str]:
        """Command lines of all processes that have to do with the run: supervisors, agents, ranks, their children."""
        found = []
        for pid, env in _processes():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except FileNotFoundError:  # it has just gone
                continue
            supervisor = any(sign in command for sign in ("agent/", "/proc/self/fd/", "llmops.runs.remote"))
            if env.get("LLMOPS_RUN_ID") == run_id or (run_id in command and supervisor):
                found.append(f"{pid} {command}")
        return found

    def trace(self, run_id: str) -> str:
        """Everything that helps to understand a failed test."""
        texts = []
        if "://" in self.url:
            store = open_store(self.url).sub(run_id)
            ends = [f"attempts/{name}/end.json" for name in store.list("attempts")]
            texts = [f"--- {end}\n{store.get(end).decode()}" for end in ends if store.exists(end)]
            texts.append(self.call("logs", run_id, "--tail", "50").stdout)
            own = [*Path(self.env.get("XDG_STATE_HOME", "/nowhere")).rglob(f"{run_id}.*")]
            texts.extend(f"--- {path}\n{path.read_text()[-3000:]}" for path in own)
            return "\n".join(texts)
        for pattern in ("job/*/supervisor.log", "job/*/slurm-*.out", "attempts/*/end.json", "logs/*/*/*.log"):
            texts.extend(
                f"--- {path.relative_to(self.root)}\n{path.read_text(errors='replace')[-3000:]}"
                for path in sorted(self.root.glob(f"{run_id}/{pattern}"))
            )
        return "\n".join(texts)


def _processes() -> list[tuple[int, dict[str, str]]]:
    found = []
    for path in Path("/proc").iterdir():
        if not path.name.isdigit() or int(path.name) == os.getpid():
            continue
        try:
            text = (path / "environ").read_bytes().decode(errors="replace")
            if _stat(int(path.name))[0] == "Z":
                continue
        except OSError:
            continue
        found.append((int(path.name), dict(item.split("=", 1) for item in text.split("\0") if "=" in item)))
    return found


def _stat(pid: int) -> tuple[str, int]:
    """State and parent of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    return fields[0], int(fields[1])


def _is_child_of_marked(pid: int) -> bool:
    try:
        parent = _stat(pid)[1]
        return MARKER.encode() in Path(f"/proc/{parent}/environ").read_bytes()
    except OSError:
        return True
