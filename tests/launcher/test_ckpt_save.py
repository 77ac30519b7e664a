"""``llmops ckpt save``: a run that is training commits when it is asked to."""

from __future__ import annotations

from tests.launcher.harness import TINY


def test_a_checkpoint_on_demand(local):
    run_id = local.submit(*TINY, "train.max_steps=100000", "checkpoint.every_steps=0")
    local.wait_step(run_id, 3)
    assert "no checkpoints" in local.ok("ckpt", "ls", run_id)
    said = local.ok("ckpt", "save", run_id)
    assert "is committed" in said
    assert said.split()[1] in local.ok("ckpt", "ls", run_id)
    local.ok("ckpt", "verify", run_id)
    local.ok("cancel", run_id)
    refused = local.call("ckpt", "save", run_id)
    assert refused.returncode == 2
    assert "is not training at the moment" in refused.stderr


def test_a_program_that_is_not_ours_cannot_be_asked(local):
    run_id = local.submit(command=("sleep", "600"))
    refused = local.call("ckpt", "save", run_id)
    assert refused.returncode == 2
    assert "runs a program of its own" in refused.stderr
    local.ok("cancel", run_id)
