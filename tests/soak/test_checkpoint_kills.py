"""Checkpoints under kill -9 and a failing store, many times and for long.

``LLMOPS_KILL_ROUNDS`` says how many processes are killed on each kind of storage; ``LLMOPS_STORM_SEED`` repeats a
storm, as far as timing lets it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.conftest import all_ranks, nursery  # noqa: F401
from tests.checkpoint.proxy import Faults, Proxy, proxy
from tests.checkpoint.ranks import Nursery, until
from tests.checkpoint.test_kills import REQUESTS, TARGETS, Story, check_growth, kill_at_random, kill_in_requests
from tests.checkpoint.test_s3_faults import DATA, Training, server_pid

ROUNDS = int(os.environ.get("LLMOPS_KILL_ROUNDS", "100"))

pytestmark = pytest.mark.soak


@pytest.fixture
def rng(capsys: pytest.CaptureFixture[str]) -> random.Random:
    seed = int(os.environ.get("LLMOPS_STORM_SEED", random.SystemRandom().randrange(1_000_000)))
    with capsys.disabled():
        print(f"\nLLMOPS_STORM_SEED={seed} LLMOPS_KILL_ROUNDS={ROUNDS}")
    return random.Random(seed)


@pytest.fixture
def network(s3_server: str) -> Iterator[Proxy]:
    """A proxy in front of the S3 server."""
    with proxy(s3_server) as made:
        yield made


def targets(rng: random.Random, count: int) -> list[str]:
    """Each kind comes once before any comes twice."""
    return [target for _ in range(-(-count // len(TARGETS))) for target in rng.sample(TARGETS, len(TARGETS))][:count]


def test_kills_on_disk(nursery: Nursery, tmp_path: Path, rng: random.Random) -> None:  # noqa: F811
    kill_at_random(Story(nursery, tmp_path, str(tmp_path / "run"), 1, {}), rng, targets(rng, ROUNDS))


def test_kills_on_s3(nursery: Nursery, tmp_path: Path, s3_url: str, rng: random.Random) -> None:  # noqa: F811
    kill_at_random(Story(nursery, tmp_path, s3_url, 1, {}), rng, targets(rng, ROUNDS))


def test_kills_in_each_request_of_a_save_to_s3(
    nursery: Nursery,  # noqa: F811
    tmp_path: Path,
    s3_url: str,
    network: Proxy,
    rng: random.Random,
) -> None:
    """Everybody in every phase."""
    moments = [(request, target) for request in REQUESTS for target in TARGETS]
    rng.shuffle(moments)
    kill_in_requests(Story(nursery, tmp_path, s3_url, 0, {"AWS_ENDPOINT_URL": network.url}), network, moments)


@pytest.mark.parametrize(
    ("faults", "seconds"),
    [
        (Faults(refuse=True), 30.0),
        (Faults(match=DATA, reset_after=300_000), 30.0),
        (Faults(ignore=True), 30.0),
        (Faults(swallow=True), 30.0),
        (Faults(share=0.1, refuse=True), 20.0),
        (Faults(share=0.1, reset_after=0), 20.0),
        (Faults(share=0.3, lose_answer=True), 20.0),
        (Faults(rate=2e5), 20.0),
    ],
    ids=["503", "reset", "black-hole", "swallow", "10-percent-503", "10-percent-reset", "lost-answers", "slow"],
)
def test_a_store_that_fails_for_long(
    nursery: Nursery,  # noqa: F811
    tmp_path: Path,
    s3_url: str,
    network: Proxy,
    faults: Faults,
    seconds: float,
) -> None:
    """A save with more time than that succeeds; those with less fail, each of them."""
    training = Training(nursery, tmp_path, s3_url, network)
    outcome = training.disturbed(faults, seconds + 60, seconds)
    assert outcome["event"] == "committed", outcome
    if faults.share == 1 and not faults.rate:
        failed = [training.disturbed(faults, 5.0) for _ in range(3)]
        assert [each["event"] for each in failed] == ["failed"] * 3
        training.check([each["commit"] for each in failed])
    training.check()


def test_a_server_that_is_stopped_for_20_s(
    nursery: Nursery,  # noqa: F811
    tmp_path: Path,
    s3_url: str,
    network: Proxy,
) -> None:
    training = Training(nursery, tmp_path, s3_url, network)
    for limit_s, event in ((60.0, "committed"), (10.0, "failed")):
        server, over = server_pid(), time.monotonic() + 20
        os.kill(server, signal.SIGSTOP)
        try:
            commit = training.ranks.save(limit_s)
            until(lambda over=over: time.monotonic() > over, "the end of the pause")  # type: ignore[misc]
        finally:
            os.kill(server, signal.SIGCONT)
        assert training.ranks.outcome(commit)["event"] == event
    training.check()


def test_nothing_grows_over_many_saves_to_s3(nursery: Nursery, tmp_path: Path, s3_url: str) -> None:  # noqa: F811
    check_growth(nursery, tmp_path, s3_url)
