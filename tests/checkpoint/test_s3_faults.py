"""A real S3 server behind a network that fails: saves succeed or fail cleanly in time, and training goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from llm.utils.object_storage import ObjectStorage
from tests.checkpoint.proxy import Faults, Proxy, proxy
from tests.checkpoint.ranks import Nursery, Ranks, until
from tests.conftest import BUCKET

LIMIT_S = 6.0
MEGABYTES = 3.0
DATA = r"PUT .*\.safetensors"


@pytest.fixture
def faulty(s3_server: str) -> Iterator[Proxy]:
    """A proxy in front of the S3 server; what it has seen is still there after the test."""
    with proxy(s3_server) as made:
        yield made


@pytest.fixture
def through(faulty: Proxy, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
    """A storage of this very process, behind the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
    s3fs.S3FileSystem.clear_instance_cache()
    yield ObjectStorage(s3_url)
    s3fs.S3FileSystem.clear_instance_cache()


class Training:
    """Two ranks that train and save through the proxy."""

    def __init__(self, nursery: Nursery, folder: Path, url: str, network: Proxy, limit_s: float) -> None:
        self.nursery, self.folder, self.url, self.network = nursery, folder, url, network
        self.ranks: Ranks = nursery.start(
            folder / "ranks",
            url,
            limit_s=limit_s,
            keep_last=3,
            megabytes=MEGABYTES,
            environment={"AWS_ENDPOINT_URL": network.url},
        ).wait_ready()
        self.commit()

    def commit(self) -> str:
        """A save that nothing disturbs."""
        commit = self.ranks.save()
        outcome = self.ranks.outcome(commit)
        assert outcome["event"] == "committed", outcome
        return commit

    def disturbed(self, faults: Faults, seconds: float | None = None) -> dict[str, Any]:
        """What becomes of a save while there are ``faults``, for some seconds or until the save has ended."""
        self.network.faults = faults
        commit = self.ranks.save()
        self.ranks.wait_step(20)  # training goes on
        if seconds is not None:
            over = time.monotonic() + seconds
            until(lambda: time.monotonic() > over, "the end of the faults")
            self.network.faults = Faults()
        outcome = self.ranks.outcome(commit)
        self.network.faults = Faults()
        return outcome

    def check(self, failed: list[str] | None = None) -> None:
        """The next save works, everything that counts is what was saved, and nothing is left behind."""
        last = self.commit()
        check = self.nursery.check(self.folder / f"check{self.ranks.step()}", self.url, MEGABYTES)
        assert check["bad"] == []
        assert check["newest"] == last
        assert last in check["good"]
        for path in failed or []:
            assert path not in check["good"]
        step = int(last.split("/")[1].removeprefix("step_"))
        assert set(check["lines"]["0000"]) >= set(range(1, step + 1)), "metrics of committed steps are lost"
        assert uploads() == []


def uploads() -> list[Any]:
    """Multipart uploads that somebody has begun and not ended."""
    found = s3fs.S3FileSystem().call_s3("list_multipart_uploads", Bucket=BUCKET)
    return list(found.get("Uploads", []))


@pytest.fixture
def training(nursery: Nursery, tmp_path: Path, s3_url: str, faulty: Proxy) -> Training:
    return Training(nursery, tmp_path, s3_url, faulty, LIMIT_S)


def server_pid() -> int:
    """The process of the S3 server, a child of this one."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(FileNotFoundError):
                if b"weed" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
    raise AssertionError("no S3 server runs")


def test_what_passes_before_the_deadline_costs_nothing_but_time(training: Training) -> None:
    for faults, seconds in (
        (Faults(refuse=True), 2.0),  # 503 for everything
        (Faults(match=DATA, reset_after=100_000), 1.5),  # in mid-upload
        (Faults(share=0.1, refuse=True), None),
        (Faults(share=0.1, reset_after=0), None),
        (Faults(match="GET|HEAD", share=0.2, cut_answer=10), None),
        (Faults(match="PUT", share=0.5, lose_answer=True), None),
        (Faults(rate=1e6), None),
    ):
        outcome = training.disturbed(faults, seconds)
        assert outcome["event"] == "committed", (faults, outcome)
    training.check()


def test_what_lasts_fails_the_save_and_nothing_else(training: Training) -> None:
    failed = []
    for faults in (
        Faults(refuse=True),
        Faults(match=DATA, reset_after=100_000),
        Faults(ignore=True),
        Faults(match=DATA, swallow=True),
    ):
        outcome = training.disturbed(faults)
        assert outcome["event"] == "failed", (faults, outcome)
        failed.append(outcome["commit"])
        assert training.ranks.events(0, "replaced") == [], "the writer itself gives up in time"
    training.check(failed)


def test_a_server_that_is_stopped_for_a_while(training: Training) -> None:
    server = server_pid()
    os.kill(server, signal.SIGSTOP)
    try:
        commit = training.ranks.save()
        training.ranks.wait_step(20)
        outcome = training.ranks.outcome(commit)
        assert outcome["event"] == "failed"
        commit = training.ranks.save()
        training.ranks.wait_step(100)
    finally:
        os.kill(server, signal.SIGCONT)
    assert training.ranks.outcome(commit)["event"] == "committed"
    training.check()
