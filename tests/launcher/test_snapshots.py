"""Snapshots in memory: when ranks die, their writers commit the last one, and no step is repeated for long."""

from __future__ import annotations

import os
import signal

import pytest

from tests.launcher.harness import TINY

# Nothing is committed in the regular way before the end.
SNAPSHOTS = (*TINY, "checkpoint.every_steps=0", "checkpoint.snapshot_steps=1")


@pytest.mark.parametrize(
    "victims", [pytest.param([1], id="rank 1", marks=pytest.mark.long), pytest.param([0, 1], id="both ranks")]
)
def test_the_last_snapshot_of_ranks_that_die_is_committed(local, undisturbed, victims):
    run_id = local.submit(*SNAPSHOTS)
    local.wait_step(run_id, 20)
    ranks = local.ranks(run_id)
    for rank in victims:
        os.kill(ranks[rank], signal.SIGKILL)
    value = local.wait(run_id, "finished")
    first, second = value["attempts"]
    assert first["reason"] == "failed"
    # Ranks are a step apart at most, and the newest snapshot that both have is at most one older.
    assert first["last_step"] - 2 <= second["first_step"] - 1 <= first["last_step"] + 1
    assert local.losses(run_id) == undisturbed
    local.wait_for(lambda: local.alive(run_id) == [], 20, "its processes to be gone", run_id)
    local.ok("ckpt", "verify", run_id, "--all")


def test_a_hung_rank_loses_no_more(local, undisturbed):
    run_id = local.submit(*SNAPSHOTS, "stop.hang_s=25")
    local.wait_step(run_id, 20)
    os.kill(local.ranks(run_id)[1], signal.SIGSTOP)
    value = local.wait(run_id, "finished")
    assert value["attempts"][0]["reason"] == "hung"
    assert value["attempts"][1]["first_step"] >= 19
    assert local.losses(run_id) == undisturbed


def test_a_cancelled_run_commits_no_snapshot(local):
    run_id = local.submit(*SNAPSHOTS, "train.max_steps=100000")
    local.wait_step(run_id, 10)
    local.ok("cancel", run_id)
    assert local.alive(run_id) == []
    assert "no checkpoints" in local.ok("ckpt", "ls", run_id)
