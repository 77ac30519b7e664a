"""A real S3 server behind a network that fails: saves succeed or fail cleanly in time, and training goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import s3fs

from llm.utils.object_storage import ObjectStorage
from tests.checkpoint.proxy import Faults, Proxy, proxy
from tests.checkpoint.ranks import DEADLINE_S, Nursery, Ranks, until
from tests.conftest import BUCKET

MEGABYTES = 1.5
DATA = r"PUT .*\.safetensors"


@pytest.fixture(scope="module")
def network(s3_server: str) -> Iterator[Proxy]:
    """A proxy in front of the S3 server."""
    with proxy(s3_server) as made:
        yield made


@pytest.fixture
def faulty(network: Proxy) -> Iterator[Proxy]:
    """The same, harmless again after the test."""
    yield network
    network.faults = Faults()


@pytest.fixture
def through(faulty: Proxy, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
    """A storage of this very process, behind the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
    s3fs.S3FileSystem.clear_instance_cache()
    yield ObjectStorage(s3_url)
    s3fs.S3FileSystem.clear_instance_cache()


class Training:
    """Two ranks that train and save through the proxy."""

    def __init__(self, nursery: Nursery, folder: Path, url: str, network: Proxy) -> None:
        self.nursery, self.folder, self.url, self.network = nursery, folder, url, network
        self.ranks: Ranks = nursery.start(
            folder / "ranks",
            url,
            keep_last=3,
            megabytes=MEGABYTES,
            environment={"AWS_ENDPOINT_URL": network.url},
        ).wait_ready()
        self.commit()

    def commit(self) -> str:
        """A save that nothing disturbs."""
        commit = self.ranks.save(limit_s=DEADLINE_S)
        outcome = self.ranks.outcome(commit)
        assert outcome["event"] == "committed", outcome
        return commit

    def disturbed(self, faults: Faults, limit_s: float, seconds: float | None = None) -> dict[str, Any]:
        """What becomes of a save while there are ``faults``, for some seconds or until the save has ended."""
        hits = self.network.hits
        self.network.faults = faults
        commit = self.ranks.save(limit_s)
        self.ranks.wait_step(20)  # training goes on
        if seconds is not None:
            over = time.monotonic() + seconds
            until(lambda: time.monotonic() > over, "the end of the faults")
            self.network.faults = Faults()
        outcome = self.ranks.outcome(commit)
        self.network.faults = Faults()
        assert self.network.hits > hits, f"{faults} met nothing"
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
        assert self.ranks.events(0, "replaced") == [], "writers give up by themselves, in time"
        assert uploads() == []


def uploads() -> list[Any]:
    """Multipart uploads that somebody has begun and not ended."""
    found = s3fs.S3FileSystem().call_s3("list_multipart_uploads", Bucket=BUCKET)
    return list(found.get("Uploads", []))


@pytest.fixture(scope="module")
def module_training(
    all_ranks: Nursery, tmp_path_factory: pytest.TempPathFactory, s3_server: str, network: Proxy
) -> Iterator[Training]:
    folder = tmp_path_factory.mktemp("s3-faults")
    made = Training(all_ranks, folder, f"s3://{BUCKET}/{folder.name}", network)
    yield made
    made.ranks.kill()


@pytest.fixture
def training(module_training: Training, faulty: Proxy) -> Training:
    """Ranks that go on from test to test."""
    return module_training


def server_pid() -> int:
    """The process of the S3 server, a child of this one."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(FileNotFoundError):
                if b"weed" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
    raise AssertionError("no S3 server runs")


# --- saves -----------------------------------------------------------------------------------------------------------


PASSING = (  # faults, for how many seconds, within what time the save ends
    (Faults(refuse=True), 1.5, 10.0),  # 503 for everything
    (Faults(match=DATA, reset_after=100_000), 1.0, 10.0),  # in mid-upload
    (Faults(share=0.1, refuse=True), None, 10.0),
    (Faults(share=0.1, reset_after=0), None, 10.0),
    (Faults(match="GET|HEAD", share=0.2, cut_answer=10), None, 10.0),
    (Faults(match="PUT", share=0.5, lose_answer=True), None, 10.0),
    (Faults(match=DATA, first=1, ignore=True), None, 5.0),  # a black hole that there is a way around
    (Faults(rate=1e6), None, 10.0),
)
LASTING = (
    Faults(refuse=True),
    Faults(match=DATA, reset_after=100_000),
    Faults(ignore=True),
    Faults(match=DATA, swallow=True),
    Faults(match=r"GET .*list-type=2", ignore=True),
    Faults(match=r"PUT .*/metrics/", refuse=True),  # no commit without what was measured up to there
)


def test_what_passes_in_time_costs_nothing_else(training: Training) -> None:
    for faults, seconds, limit_s in PASSING:
        outcome = training.disturbed(faults, limit_s, seconds)
        assert outcome["event"] == "committed", (faults, outcome)
    training.check()


def test_what_lasts_fails_the_save_and_nothing_else(training: Training) -> None:
    failed = []
    for faults in LASTING:
        outcome = training.disturbed(faults, 1.5)
        assert outcome["event"] == "failed", (faults, outcome)
        failed.append(outcome["commit"])
    training.check(failed)


def test_a_server_that_is_stopped_for_a_while(training: Training) -> None:
    server = server_pid()
    os.kill(server, signal.SIGSTOP)
    try:
        commit = training.ranks.save(limit_s=DEADLINE_S)
        training.ranks.wait_step(50)
    finally:
        os.kill(server, signal.SIGCONT)
    assert training.ranks.outcome(commit)["event"] == "committed"
    training.check()


def test_requests_that_arrive_after_their_save_has_failed(training: Training) -> None:
    """They can complete what they belong to, and change nothing else."""
    before = training.commit()
    for what in (r"PUT .*rank00000-000\.safetensors", r"PUT .*/parts/00001\.", r"PUT .*manifest\.json"):
        training.network.faults = Faults(match=what, late=True)
        commit = training.ranks.save(limit_s=1.5)
        assert training.ranks.outcome(commit)["event"] == "failed"
        assert training.network.taken
        training.network.faults = Faults(match="only so that they differ")
        training.commit()
        until(lambda: set(training.network.taken) == set(training.network.delivered), "requests that arrive late")
    training.check()
    assert before


def test_a_save_that_begins_while_another_drains(nursery: Nursery, tmp_path: Path, s3_url: str, faulty: Proxy) -> None:
    """The second has other values, and waits for the buffer."""
    ranks = nursery.start(
        tmp_path / "ranks", s3_url, megabytes=1, twice=True, environment={"AWS_ENDPOINT_URL": faulty.url}
    ).wait_ready()
    faulty.faults = Faults(match=DATA, hold=True)
    ranks.tell_save()
    ranks.wait(lambda: faulty.hits, "an upload that is held up")
    faulty.faults = Faults(rate=1e6)
    ranks.wait(lambda: len(ranks.committed()) == 2, "two commits")
    check = nursery.check(tmp_path / "check", s3_url, megabytes=1)
    assert check["bad"] == []
    assert check["good"] == ranks.committed()


# --- requests --------------------------------------------------------------------------------------------------------


def test_time_limits_do_not_mix(through: ObjectStorage, faulty: Proxy) -> None:
    through.replace("x", b"value")
    faulty.faults = Faults(match="GET", ignore=True)
    with ThreadPoolExecutor(2) as pool:
        patient = pool.submit(through.within(DEADLINE_S).read, "x")
        short = pool.submit(through.within(0.3).read, "x")
        with pytest.raises(OSError, match=r"get s3://.*/x failed for 0 s, . tries; the last: "):
            short.result(DEADLINE_S)
        assert not patient.done()
        faulty.faults = Faults()
        assert patient.result(DEADLINE_S) == b"value"
    with pytest.raises(OSError, match="there is no time left for it"):
        through.within(0).read("x")
    assert through.read("x") == b"value"


def test_a_lost_answer_is_no_conflict(through: ObjectStorage, faulty: Proxy) -> None:
    faulty.faults = Faults(match="PUT", first=1, lose_answer=True)
    through.create("x", b"mine")
    assert faulty.count("PUT .*/x") > 1
    with pytest.raises(FileExistsError):
        through.create("x", b"of another")
    assert through.read("x") == b"mine"


def test_uploads_start_over_and_downloads_are_whole(through: ObjectStorage, faulty: Proxy) -> None:
    data = os.urandom(3_000_000)
    faulty.faults = Faults(match="PUT", first=2, reset_after=1_000_000)
    through.write("x", memoryview(data))
    faulty.faults = Faults(match="GET", first=2, cut_answer=1_000_000)
    assert through.read("x") == data
    faulty.faults = Faults(match="GET", first=1, cut_answer=1_000_000)
    buffer = bytearray(2_000_000)
    assert through.read_into("x", 500_000, [memoryview(buffer)]) == len(buffer)
    assert buffer == data[500_000:2_500_000]
    faulty.faults = Faults()
    assert through.read_into("x", 2_999_990, [memoryview(bytearray(100))]) == 10
    assert through.read("x", 3_000_000) == b""
    assert through.read("x", 10, 20) == data[10:20]


def test_a_slow_line_is_not_a_dead_one(through: ObjectStorage, faulty: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte counts as progress, those that the kernel has taken too; no try has to be the whole."""
    monkeypatch.setattr("llm.utils.object_storage.STALL_S", 0.5)
    data = os.urandom(3_000_000)
    faulty.faults = Faults(rate=1.5e6)
    before = len(faulty.seen)
    through.write("x", memoryview(data))
    assert through.read("x") == data
    assert [each.split()[0] for each in faulty.seen[before:]] == ["PUT", "GET"]
