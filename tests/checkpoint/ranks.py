"""The tests' side of ``rank_program``: start ranks, tell them what to do, harm them, and look at what they left."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llm.checkpoint.format import Commit
from tests.conftest import free_ports

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 60.0
NOTHING, SAVE, STOP, ROLLBACK, REPORT, LIMIT = range(6)  # commands
T = TypeVar("T")


def until(happened: Callable[[], T], what: str, seconds: float = DEADLINE_S) -> T:
    """Poll until ``happened`` gives something; its value."""
    deadline = time.monotonic() + seconds
    while not (value := happened()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.005)
    return value


def states(pid: int) -> set[str]:
    """What the threads of a process do, as the kernel abbreviates it: R, S, D, Z and so on."""
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.add((thread / "stat").read_text().rsplit(")", 1)[1].split()[0])
    return found


def alive(pid: int) -> bool:
    """Does a process run? One that has ended and waits to be reaped does not."""
    return bool(states(pid) - {"Z", "X"})


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def fill(path: Path, spare: int = 0) -> None:
    """Make a file of all that its disk has, but for ``spare`` bytes."""
    with path.open("wb", buffering=0) as stream:
        with contextlib.suppress(OSError):
            while stream.write(bytes(1 << 16)):
                pass
        stream.truncate(max(path.stat().st_size - spare, 0))


@dataclass
class Ranks:
    """The ranks of one attempt."""

    folder: Path
    pids: list[int]
    writers: list[int] = field(default_factory=list)
    commands: Iterator[int] = field(default_factory=itertools.count)
    strict: bool = True  # ranks are expected to live

    def events(self, rank: int = 0, kind: str = "") -> list[dict[str, Any]]:
        """What a rank has said so far."""
        try:
            lines = (self.folder / f"rank{rank}.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [event for event in map(json.loads, lines) if kind in ("", event["event"])]

    def step(self, rank: int = 0) -> int:
        """The last step that a rank began."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((self.folder / f"step{rank}").read_bytes())
        return 0

    def wait(self, happened: Callable[[], T], what: str, seconds: float = DEADLINE_S) -> T:
        """Poll as long as the ranks live."""

        def look() -> T | None:
            if value := happened():
                return value
            if self.strict:
                assert all(map(alive, self.pids)), f"{what}: a rank has ended\n{self.output()}"
            return None

        try:
            return until(look, what, seconds)  # type: ignore[return-value]
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.events()[-5:]}\n{self.events(1)[-5:]}\n{self.output()}") from None

    def output(self) -> str:
        """What the ranks have printed."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("output*")))

    def wait_ready(self) -> Ranks:
        """Return when training has begun."""
        self.wait(lambda: all(self.events(rank, "ready") for rank in range(len(self.pids))), "ranks that are ready")
        self.writers = [self.events(rank, "ready")[0]["writer"] for rank in range(len(self.pids))]
        return self

    def wait_step(self, more: int) -> None:
        """Return when ``more`` steps have been made from now on."""
        goal = self.step() + more
        self.wait(lambda: self.step() >= goal, f"step {goal}")

    def writer(self, rank: int) -> int:
        """The process id of the writer that a rank has now."""
        replaced = self.events(rank, "replaced")
        return int(replaced[-1]["writer"]) if replaced else self.writers[rank]

    def tell(self, code: int, *arguments: int) -> None:
        """Give a command, with up to three numbers; it is heard after the next step."""
        aside = self.folder / "command.tmp"
        aside.write_text(json.dumps([code, *arguments, *[0] * (3 - len(arguments))]))
        aside.rename(self.folder / f"command{next(self.commands)}.json")

    def save(self, limit_s: float | None = None) -> str:
        """Have a save begun; returns its commit."""
        count = len(self.events(0, "begun"))
        if limit_s is not None:  # for this and the following ones
            self.tell(LIMIT, int(1000 * limit_s))
        self.tell(SAVE)
        self.wait(lambda: len(self.events(0, "begun")) > count, "a save that begins")
        return str(self.events(0, "begun")[count]["commit"])

    def tell_save(self) -> None:
        """Ask for a save, and do not wait for anything."""
        self.tell(SAVE)

    def outcome(self, commit: str, seconds: float = DEADLINE_S) -> dict[str, Any]:
        """What became of a save, on rank 0."""

        def ended() -> list[dict[str, Any]]:
            return [e for e in self.events() if e["event"] in ("committed", "failed") and e["commit"] == commit]

        return self.wait(ended, f"an end of {commit}", seconds)[0]

    def committed(self) -> list[str]:
        """Commits that were reported."""
        return [event["commit"] for event in self.events(0, "committed")]

    def roll_back(self, commit: Commit) -> None:
        count = len(self.events(0, "back"))
        self.tell(ROLLBACK, commit.attempt, commit.generation, commit.step)
        self.wait(lambda: len(self.events(0, "back")) > count, "a rollback")

    def report(self) -> list[dict[str, Any]]:
        """Open files and memory of each rank and its writer."""
        count = len(self.events(0, "report"))
        self.tell(REPORT)
        self.wait(lambda: all(len(self.events(r, "report")) > count for r in range(len(self.pids))), "a report")
        return [self.events(rank, "report")[count] for rank in range(len(self.pids))]

    def stop(self) -> None:
        """Let the ranks leave by themselves."""
        self.tell(STOP)
        ranks = range(len(self.pids))
        self.strict = False
        self.wait(lambda: all(self.events(rank, "left") for rank in ranks), "ranks that leave")
        self.wait_gone()

    def wait_gone(self) -> None:
        """Return when every rank and every writer has ended by itself."""
        self.strict = False
        self.wait(lambda: not any(map(alive, self.everything())), "the end of all processes")

    def everything(self) -> list[int]:
        """Ranks and writers."""
        return [*self.pids, *(self.writer(rank) for rank in range(len(self.writers)))]

    def kill(self) -> None:
        """End all of it, at once."""
        self.strict = False
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        kill(self.everything())


class Nursery:
    """Where ranks come from."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.rank_program"],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started: list[Ranks] = []
        assert "ready" in self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], DEADLINE_S)[0], "the nursery does not answer"
        line = self.process.stdout.readline()
        assert line, "the nursery has ended"
        return dict(json.loads(line))

    def _order(self, folder: Path, **order: Any) -> list[int]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), **order}) + "\n")
        self.process.stdin.flush()
        return list(self._answer()["pids"])

    def start(
        self,
        folder: Path,
        url: str,
        ranks: int = 2,
        attempt: int = 0,
        every: int = 0,
        limit_s: float = 20.0,
        grace_s: float = 2.0,
        keep_last: int | None = None,
        megabytes: float = 0.1,
        step_s: float = 0.005,
        twice: bool = False,
        forks: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Ranks:
        """Ranks that save to ``url`` every so many steps, or when they are told; the newest commit is resumed."""
        folder.mkdir(parents=True)
        pids = self._order(
            folder,
            do="save",
            url=url,
            ranks=ranks,
            port=free_ports(1)[0],
            attempt=attempt,
            every=every,
            limit_s=limit_s,
            grace_s=grace_s,
            keep_last=keep_last,
            megabytes=megabytes,
            step_s=step_s,
            twice=twice,
            forks=forks,
            environment={**aws(), **(environment or {})},
        )
        self.started.append(Ranks(folder, pids))
        return self.started[-1]

    def train(
        self, folder: Path, arguments: list[str], patience_s: float, environment: dict[str, str] | None = None
    ) -> Ranks:
        """``python -m llm.train ARGUMENTS`` as two ranks; ``code<rank>`` in the folder has each exit code."""
        folder.mkdir(parents=True)
        order = {"arguments": arguments, "ranks": 2, "port": free_ports(1)[0], "patience_s": patience_s}
        pids = self._order(folder, do="train", environment={**aws(), **(environment or {})}, **order)
        self.started.append(Ranks(folder, pids, strict=False))
        return self.started[-1]

    def check(self, folder: Path, url: str, megabytes: float = 0.1) -> dict[str, Any]:
        """Load all that a fresh process finds at ``url``: good, refused (uncommitted) and bad checkpoints."""
        folder.mkdir(parents=True)
        pids = self._order(folder, do="check", url=url, ranks=1, megabytes=megabytes, environment=aws())
        checked = Ranks(folder, pids)
        checked.wait(lambda: (folder / "check.json").exists(), "a check of all checkpoints")
        return dict(json.loads((folder / "check.json").read_text()))

    def sweep(self) -> None:
        """Nothing that was started outlives its test."""
        for ranks in self.started:
            ranks.kill()
        self.started = []

    def close(self) -> None:
        """End it."""
        self.sweep()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def aws() -> dict[str, str]:
    """The credentials and the endpoint as they are now: the nursery may be older."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
