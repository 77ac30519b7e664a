"""kill -9 and SIGSTOP of ranks and writers in mid-save: what counts is what was saved, and nobody is left over."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llm.checkpoint.format import CheckpointError, Commit
from llm.checkpoint.lineage import newest_commit
from llm.checkpoint.retention import Retention
from llm.train.checkpoint import Checkpointer
from llm.train.world import World
from llm.utils.storage import open_storage
from tests.checkpoint.proxy import Faults, Proxy, proxy
from tests.checkpoint.ranks import DEADLINE_S, Nursery, Ranks, alive, kill, until

LIMIT_S = 5.0
TARGETS = ("writer 0", "writer 1", "rank 0", "rank 1", "rank 0 and its writer", "rank 1 and its writer", "everything")
REQUESTS = {  # of a save to S3
    "data of rank 0": r"PUT .*rank00000.*\.safetensors",
    "data of rank 1": r"PUT .*rank00001.*\.safetensors",
    "part of rank 0": r"PUT .*/parts/00000\.",
    "part of rank 1": r"PUT .*/parts/00001\.",
    "the commit": r"PUT .*manifest\.json",
    "retention": r"(DELETE|POST) .*",
}


@pytest.fixture(scope="module")
def network(s3_server: str) -> Iterator[Proxy]:
    """A proxy in front of the S3 server."""
    with proxy(s3_server) as made:
        yield made


@dataclass
class Story:
    """Attempt after attempt of one run, each of them harmed."""

    nursery: Nursery
    folder: Path
    url: str
    every: int  # steps between saves; 0: when they are asked for
    environment: dict[str, str]
    attempt: int = -1
    checks: int = 0
    reported: str = ""  # the last commit that anybody was told of
    ranks: Ranks | None = None

    def going(self) -> Ranks:
        """The present attempt, or the next one if it has ended: that resumes what is there."""
        if self.ranks is None:
            self.attempt += 1
            self.ranks = self.nursery.start(
                self.folder / f"attempt{self.attempt}",
                self.url,
                attempt=self.attempt,
                every=self.every,
                limit_s=LIMIT_S,
                keep_last=2,
                environment=self.environment,
            ).wait_ready()
            resumed = self.ranks.events(0, "ready")[0]["resumed"]
            if self.reported:
                assert Commit.parse(resumed) >= Commit.parse(self.reported), "a commit was lost"
        return self.ranks

    def strike(self, target: str) -> None:
        """Kill."""
        ranks, which = self.going(), [0, 1] if target == "everything" else [int(target.split()[1])]
        self.writers = [ranks.writer(rank) for rank in (0, 1)]
        ranks.strict = target.startswith("writer")
        pids = [] if ranks.strict else [ranks.pids[rank] for rank in which]
        if "writer" in target or target == "everything":
            pids += [self.writers[rank] for rank in which]
        kill(pids)

    def outlive(self, target: str) -> None:
        """See that the rest goes on, or ends and leaves what can be trusted."""
        ranks = self.going()
        if not ranks.strict:
            self.check(ranks)
            self.ranks = None
            return
        rank = int(target.split()[1])
        if not self.every:
            # The first one may still meet the writer that is gone before its end is known.
            outcomes = [ranks.outcome(ranks.save())]
            if outcomes[0]["event"] != "committed":
                outcomes.append(ranks.outcome(ranks.save()))
            assert outcomes[-1]["event"] == "committed", outcomes
        ranks.wait(lambda: ranks.writer(rank) != self.writers[rank], "another writer")
        count = len(ranks.committed())
        if self.every:
            ranks.wait(lambda: len(ranks.committed()) > count, "a commit")

    def check(self, ranks: Ranks) -> None:
        """All processes end, and what is there is what was saved."""
        ranks.wait_gone()
        if committed := ranks.committed():
            self.reported = committed[-1]
        self.checks += 1
        check = self.nursery.check(self.folder / f"check{self.checks}", self.url)
        assert check["bad"] == [], ranks.output()
        if self.reported:
            assert check["newest"] in check["good"]
            assert Commit.parse(check["newest"]) >= Commit.parse(self.reported), "a commit was lost"
        for commit in map(Commit.parse, check["good"]):  # and so are the metrics up to there
            attempts = [steps for attempt, steps in check["lines"].items() if int(attempt) <= commit.attempt]
            assert {step for steps in attempts for step in steps} >= set(range(1, commit.step + 1))


def kill_at_random(story: Story, rng: random.Random, targets: list[str]) -> None:
    """At moments that nobody chose: saves follow each other without a pause."""
    for target in targets:
        story.going().wait_step(rng.randint(2, 20))
        time.sleep(rng.uniform(0, 0.03))
        story.strike(target)
        story.outlive(target)


def kill_in_requests(story: Story, network: Proxy, moments: list[tuple[str, str]]) -> None:
    """While a certain request of a save is under way."""
    for request, target in moments:
        ranks = story.going()
        for _ in range(2 - len(ranks.committed())):  # so that retention has something to do
            assert ranks.outcome(ranks.save())["event"] == "committed"
        hits, network.faults = network.hits, Faults(match=REQUESTS[request], hold=True)
        try:
            ranks.tell_save()
            ranks.wait(lambda hits=hits: network.hits > hits, request)  # type: ignore[misc]
            story.strike(target)
        finally:
            network.faults = Faults()
        story.outlive(target)


def test_killed_at_random_moments_on_disk(nursery: Nursery, tmp_path: Path) -> None:
    rng = random.Random(20)
    targets = ["writer 0", "writer 1", "rank 0", "rank 1 and its writer", "rank 0 and its writer", "everything"]
    kill_at_random(Story(nursery, tmp_path, str(tmp_path / "run"), 1, {}), rng, targets)


def test_killed_in_each_phase_on_s3(nursery: Nursery, tmp_path: Path, s3_url: str, network: Proxy) -> None:
    story = Story(nursery, tmp_path, s3_url, 0, {"AWS_ENDPOINT_URL": network.url})
    moments = [
        ("data of rank 0", "writer 0"),
        ("part of rank 1", "writer 1"),
        ("the commit", "rank 0 and its writer"),
        ("retention", "everything"),
    ]
    kill_in_requests(story, network, moments)


# --- processes that stop for a while ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_a_paused_attempt_that_wakes_too_late_changes_nothing(
    nursery: Nursery, tmp_path: Path, s3_url: str, network: Proxy, kind: str
) -> None:
    url = s3_url if kind == "s3" else str(tmp_path / "run")
    paused = nursery.start(
        tmp_path / "paused", url, every=1, keep_last=1, limit_s=60, environment={"AWS_ENDPOINT_URL": network.url}
    ).wait_ready()
    paused.wait(lambda: len(paused.committed()) > 2, "commits")
    if kind == "s3":
        hits, network.faults = network.hits, Faults(match=REQUESTS["the commit"], hold=True)
        paused.wait(lambda: network.hits > hits, "a commit that is under way")
    kill(paused.everything(), signal.SIGSTOP)
    storage = open_storage(url)
    storage.create("attempts/0001/start.json", b"{}")  # as its supervisor would
    successor = nursery.start(tmp_path / "successor", url, attempt=1, every=1).wait_ready()
    resumed = successor.events(0, "ready")[0]["resumed"]
    assert Commit.parse(resumed) >= Commit.parse(paused.committed()[-1])
    successor.wait(lambda: len(successor.committed()) > 2, "commits of the successor")
    network.faults = Faults()
    count = len(paused.committed())
    kill(paused.everything(), signal.SIGCONT)
    paused.wait(lambda: len(paused.committed()) > count + 2, "commits of the one that was paused")
    newest = newest_commit(storage)
    assert newest is not None
    assert newest.attempt == 1
    paused.stop()
    successor.stop()
    check = nursery.check(tmp_path / "check", url)
    assert check["bad"] == []
    assert resumed in check["good"]
    assert set(successor.committed()) <= set(check["good"])
    assert check["newest"] == successor.committed()[-1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stuck_writer_is_given_up_and_replaced(nursery: Nursery, tmp_path: Path, rank: int) -> None:
    ranks = nursery.start(tmp_path / "ranks", str(tmp_path / "run"), limit_s=1.0, grace_s=0.5).wait_ready()
    stuck = ranks.writers[rank]
    os.kill(stuck, signal.SIGSTOP)
    commit = ranks.save()
    ranks.wait_step(20)  # training goes on
    ranks.wait(lambda: ranks.events(rank, "failed"), "a save that is given up")
    assert "did not end within 1 s and was killed" in ranks.events(rank, "failed")[0]["reason"]
    assert ranks.outcome(commit)["event"] == "failed"
    until(lambda: not alive(stuck), "the end of the stuck writer")
    assert ranks.outcome(ranks.save(limit_s=DEADLINE_S))["event"] == "committed"
    assert ranks.writer(rank) != stuck
    check = nursery.check(tmp_path / "check", str(tmp_path / "run"))
    assert check["bad"] == []
    assert check["good"] == ranks.committed()


def test_a_stuck_writer_does_not_hold_up_a_big_message(tmp_path: Path) -> None:
    """A pipe takes so much and no more: whoever writes on waits for the other end."""
    checkpointer = single(tmp_path)
    try:
        checkpointer.limit_s = 0.5
        os.kill(checkpointer.saver.writer_pid or 0, signal.SIGSTOP)
        much, files = {"much": "x" * 2_000_000}, {"f": b"x" * 500_000}
        saving = threading.Thread(target=checkpointer.save, args=(1, much, files))
        saving.start()
        saving.join(DEADLINE_S)
        assert not saving.is_alive()
        events = checkpointer.poll()
        while not events:
            events = checkpointer.poll()
        assert "was killed" in (events[0].reason or "")
        checkpointer.limit_s = DEADLINE_S
        checkpointer.save(2, much, files)
        assert [event.committed for event in checkpointer.wait()] == [True]
    finally:
        checkpointer.close()


def test_after_a_rollback_the_same_steps_commit_again(nursery: Nursery, tmp_path: Path) -> None:
    ranks = nursery.start(tmp_path / "ranks", str(tmp_path / "run"), every=10, keep_last=None).wait_ready()
    ranks.wait(lambda: len(ranks.committed()) >= 3, "three commits")
    first = Commit.parse(ranks.committed()[0])
    ranks.roll_back(first)
    count = len(ranks.committed())
    ranks.wait(lambda: len(ranks.committed()) >= count + 2, "commits after it")
    ranks.stop()
    commits = [Commit.parse(path) for path in ranks.committed()]
    again = [commit for commit in commits if commit.generation == 1]
    assert [commit.step for commit in again][:2] == [20, 30]
    assert {20, 30} <= {commit.step for commit in commits if commit.generation == 0}
    check = nursery.check(tmp_path / "check", str(tmp_path / "run"))
    assert check["bad"] == []
    assert set(check["good"]) == set(ranks.committed())
    assert check["newest"] == again[-1].path


# --- nobody and nothing is left over ---------------------------------------------------------------------------------


def test_writers_end_with_their_ranks_whatever_the_ranks_have_forked(nursery: Nursery, tmp_path: Path) -> None:
    for end in ("killed", "closed"):
        ranks = nursery.start(tmp_path / end, str(tmp_path / "run"), forks=True).wait_ready()
        forked = [ranks.events(rank, "forked")[0]["pid"] for rank in (0, 1)]
        try:
            assert ranks.outcome(ranks.save())["event"] in ("committed", "failed")
            if end == "killed":
                ranks.strict = False
                kill(ranks.pids)
            else:
                ranks.stop()
                assert [ranks.events(rank, "left")[0]["code"] for rank in (0, 1)] == [0, 0], "they had to be killed"
            ranks.wait_gone()
            assert all(map(alive, forked))
        finally:
            kill(forked)


def test_a_request_that_was_cut_short_ends_the_writer(tmp_path: Path) -> None:
    """The rank was killed while it wrote to the pipe."""
    memory = os.memfd_create("staging")
    command = [sys.executable, "-m", "llm.checkpoint.writer", str(tmp_path), "0", str(memory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[memory]) as writer:
        os.close(memory)
        said, _ = writer.communicate(b'{"type":"save","commit":{"att', timeout=DEADLINE_S)
    assert (writer.returncode, said) == (0, b"")


def test_nothing_grows_over_many_saves(nursery: Nursery, tmp_path: Path) -> None:
    check_growth(nursery, tmp_path, str(tmp_path / "run"))


def check_growth(nursery: Nursery, tmp_path: Path, url: str) -> None:
    """Saves of 1 MB leave memory and open files as they are. Allocators may settle once: a leak goes on."""
    ranks = nursery.start(tmp_path / "ranks", url, every=1, keep_last=2, megabytes=1, step_s=0).wait_ready()
    reports = []
    for saves in (20, 60, 100, 140, 180):  # a leak shows in each of the intervals
        ranks.wait(lambda saves=saves: len(ranks.committed()) >= saves, f"{saves} saves")
        reports.append(ranks.report())
    for rank in (0, 1):
        for process in ("rank", "writer"):
            seen = [report[rank][process] for report in reports]
            for what, least in (("files", 2), ("kilobytes", 2000)):  # 2000: 5 % of what was saved in between
                growth = [after[what] - before[what] for before, after in itertools.pairwise(seen)]
                assert min(growth) <= least, (process, seen)
    writers = [ranks.writer(rank) for rank in (0, 1)]
    ranks.stop()
    assert not any(map(alive, writers))


def single(folder: Path) -> Checkpointer:
    """A run of one rank, in this process."""
    world = World(0, 1, 0, torch.device("cpu"), grouped=False)
    made = Checkpointer(open_storage(str(folder)), world, 0, 0, Retention(), limit_s=DEADLINE_S)
    made.attach({"w": torch.arange(1000.0)})
    return made


def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save fails for want of a writer; training goes on, and so does saving later."""
    checkpointer = single(tmp_path)
    try:
        kill([checkpointer.saver.writer_pid or 0])
        until(lambda: not alive(checkpointer.saver.writer_pid or 0), "the end of the writer")
        with monkeypatch.context() as patch:
            patch.setattr("sys.executable", str(tmp_path / "gone"))
            checkpointer.save(1, {})
            with pytest.raises(CheckpointError, match="gone"):
                checkpointer.wait()
        checkpointer.save(2, {})
        assert [event.committed for event in checkpointer.wait()] == [True]
    finally:
        checkpointer.close()
