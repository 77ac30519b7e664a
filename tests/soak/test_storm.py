"""Interruptions of all kinds at random moments, many of them: the run that comes out is the run that was left alone.

``LLMOPS_STORM_ROUNDS`` says how many; ``LLMOPS_STORM_SEED`` repeats a storm, as far as timing lets it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.launcher.harness import TINY, Launcher
from tests.slurm import cluster

ROUNDS = int(os.environ.get("LLMOPS_STORM_ROUNDS", "10"))
STEPS = 100 + 50 * ROUNDS
# What is counted here is that nothing is lost, not that failures are given up.
RUN = (
    *(f"train.max_steps={STEPS}" if item.startswith("train.max_steps") else item for item in TINY),
    *("retry.max_no_progress=1000", "retry.max_failures=1000", "retry.backoff_s=0.1"),
)
OVER = ("finished", "failed", "cancelled")

pytestmark = pytest.mark.soak


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Losses of the same run when nobody disturbs it."""
    launcher = Launcher(tmp_path_factory.mktemp("undisturbed"), "local")
    run_id = launcher.submit(*RUN)
    launcher.wait(run_id, "finished", timeout=60 + STEPS)
    return launcher.losses(run_id)


@pytest.fixture
def rng(capsys):
    seed = int(os.environ.get("LLMOPS_STORM_SEED", random.SystemRandom().randrange(1_000_000)))
    with capsys.disabled():
        print(f"\nLLMOPS_STORM_SEED={seed} LLMOPS_STORM_ROUNDS={ROUNDS}")
    return random.Random(seed)


class Storm:
    """Disturbs one run until it has had enough, or is over."""

    def __init__(self, launcher: Launcher, run_id: str, rng: random.Random) -> None:
        self.launcher, self.run_id, self.rng = launcher, run_id, rng
        self.done: list[str] = []

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_a_rank(self) -> None:
        pids = list(self.launcher.ranks(self.run_id).values())
        self.kill(self.rng.sample(pids, min(len(pids), self.rng.randint(1, 2))))

    def kill_an_agent(self) -> None:
        with contextlib.suppress(OSError):  # its ranks end just now
            # A parent that has just ended leaves its ranks to the system's first process.
            self.kill([pid for pid in self.launcher.agents(self.run_id)[-1:] if pid > 1])

    def job_id(self) -> str:
        job_id: str = self.launcher.status(self.run_id)["job_ids"][-1]
        return job_id

    def wait(self) -> bool:
        """Until a moment that nobody chose: some steps on, or some seconds. False when the run is over."""
        target = (self.launcher.step(self.run_id) or 0) + self.rng.randint(1, 25)
        by_steps, delay = self.rng.random() < 0.6, self.rng.uniform(0, 5)
        deadline = time.monotonic() + (120 if by_steps else delay)
        while time.monotonic() < deadline and not (by_steps and (self.launcher.step(self.run_id) or 0) >= target):
            if ("finished", "end") in self.launcher.attempts(self.run_id):
                return False
            time.sleep(0.05)
        return bool(self.launcher.status(self.run_id)["state"] not in OVER)

    def rage(self, kinds: list[Callable[[], None]]) -> None:
        """Each kind comes once before any comes twice."""
        queue: list[Callable[[], None]] = []
        while len(self.done) < ROUNDS and self.wait():
            queue = queue or self.rng.sample(kinds, len(kinds))
            kind = queue.pop()
            kind()
            self.done.append(f"{kind.__name__} at step {self.launcher.step(self.run_id)}")

    def check(self, undisturbed: dict[int, float]) -> str:
        """It finished, every step is there once, and each is bit by bit what it would have been."""
        value = self.launcher.wait(self.run_id, "finished", timeout=300 + STEPS)
        reasons = [attempt["reason"] or "lost" for attempt in value["attempts"]]
        story = f"{self.done}\n{reasons}"
        losses = self.launcher.losses(self.run_id)
        wrong = [step for step in undisturbed if losses.get(step) != undisturbed[step]]
        assert list(losses) == list(undisturbed), story
        assert not wrong, f"steps {wrong[:5]} of {len(wrong)} differ\n{story}"
        assert len(self.done) >= min(ROUNDS, 3), f"the run was over too soon: {story}"
        self.launcher.wait_for(
            lambda: not self.launcher.alive(self.run_id), 30, "all processes to be gone", self.run_id
        )
        return story


def test_a_storm_on_this_machine(tmp_path, rng, undisturbed, capsys):
    launcher = Launcher(tmp_path / "runs", "local")
    storm = Storm(launcher, launcher.submit(*RUN), rng)

    def supervisor() -> int:
        return int(storm.job_id().split(":")[1])

    def terminate() -> None:
        for number in rng.choices((signal.SIGTERM, signal.SIGUSR1), k=rng.randint(1, 4)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(supervisor(), number)
            time.sleep(rng.uniform(0, 0.3))

    def kill_the_supervisor() -> None:
        storm.kill([supervisor()])
        launcher.wait_for(lambda: not launcher.alive(storm.run_id), 30, "its processes to be gone", storm.run_id)
        if launcher.status(storm.run_id)["state"] != "finished":
            launcher.ok("resume", storm.run_id)

    storm.rage([terminate, terminate, storm.kill_a_rank, storm.kill_an_agent, kill_the_supervisor])
    with capsys.disabled():
        print(storm.check(undisturbed))


def test_a_storm_on_slurm(undisturbed, slurm, tmp_path, rng, capsys):
    launcher = Launcher(tmp_path / "runs", "slurm")
    storm = Storm(launcher, launcher.submit(*RUN), rng)

    def requeue() -> None:
        cluster.run(["scontrol", "requeue", storm.job_id()], check=False)  # refused while it waits

    def preempt() -> None:
        cluster.preempt(seconds=rng.uniform(1, 4))

    def signals() -> None:
        job_id = storm.job_id()
        for _ in range(rng.randint(2, 5)):
            where = rng.choice([[], ["--full"], ["--batch"]])
            name = rng.choice(["TERM", "USR1", "CONT"])
            cluster.run(["scancel", *where, f"--signal={name}", job_id], check=False)
            time.sleep(rng.uniform(0, 0.5))

    try:
        storm.rage([requeue, preempt, signals, storm.kill_a_rank, storm.kill_an_agent])
        with capsys.disabled():
            print(storm.check(undisturbed))
    finally:
        cluster.cancel_all()
