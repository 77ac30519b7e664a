"""Losses that are no numbers: the trainer skips them, or goes back and leaves their data out, and a resume knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from llm.checkpoint.lineage import newest_commit, read_manifest
from llm.checkpoint.retention import Retention
from llm.data.reading import Rows
from llm.train.checkpoint import Checkpointer
from llm.train.control import Control
from llm.train.dist import lay_out
from llm.train.exporter import Exporter
from llm.train.logging import Metrics
from llm.train.loop import Trainer
from llm.train.phases import Phases
from llm.train.sinks import Sinks
from llm.train.world import World
from llm.utils.config import TrainingConfig
from llm.utils.storage import open_storage
from tests.llm.harness import lines, tiny

BAD = 5  # the batch with this number, from 0, gives no number


def config(**train: Any) -> TrainingConfig:
    made = tiny()
    made["train"].update(max_steps=12, log_every=1, **train)
    made["eval"] = {"batches": 0}
    made["checkpoint"] = {"every_steps": 4, "asynchronous": False}
    made["model"].update(dim=16, ffn_dim=16, n_heads=2, n_kv_heads=1)
    return msgspec.convert(made, TrainingConfig)


def trainer(run: Path, settings: TrainingConfig, attempt: int = 0) -> Trainer:
    """One that meets a NaN wherever it trains on the first sequence of batch BAD."""
    storage, world = open_storage(str(run)), World(0, 1, 0, torch.device("cpu"), False)
    control, metrics = Control(0), Metrics()
    checkpointer = Checkpointer(storage, world, attempt, 0, Retention(keep_last=9), 20.0)
    made = Trainer(
        settings, lay_out(settings.dist, world), storage, control, metrics, checkpointer, Exporter(control), Sinks()
    )
    metrics.open(storage, attempt)
    first = BAD * settings.train.global_batch_size
    order = made.stream.order
    picks = order.take(order.position(first), [(first, first + 1)])
    marked = made.stream.sources["data"].train.row(int(order.indices(0, picks.ordinals)[0])).tokens
    train: Callable[..., torch.Tensor] = made.passes.train

    def poisoned(rows: Rows, positions: int, phases: Phases) -> torch.Tensor:
        sums = train(rows, positions, phases)
        return sums * math.nan if any(row == marked.tolist() for row in rows.tokens.tolist()) else sums

    made.passes.train = poisoned  # type: ignore[method-assign]
    return made


def run_to_end(run: Path, settings: TrainingConfig) -> Trainer:
    made = trainer(run, settings)
    made.start(None)
    assert made.run() == 0
    return made


def test_by_default_nothing_is_updated_and_the_run_fails(tmp_path: Path) -> None:
    made = trainer(tmp_path, config())
    made.start(None)
    with pytest.raises(FloatingPointError, match=r"step 6: loss nan.*train\.on_nonfinite=rollback"):
        made.run()
    assert made.progress.step == made.progress.updates == BAD


def test_a_skipped_step_counts_and_updates_nothing(tmp_path: Path) -> None:
    made = run_to_end(tmp_path, config(on_nonfinite="skip"))
    assert (made.progress.step, made.progress.updates, made.progress.samples) == (12, 11, 12 * 8)
    skipped = [line["step"] for line in lines(tmp_path, 0, "step") if line.get("skipped")]
    assert skipped == [BAD + 1]
    assert all(parameter.isfinite().all() for parameter in made.passes.named_parameters().values())


def test_a_rollback_leaves_the_batch_out_for_ever(tmp_path: Path) -> None:
    settings = config(on_nonfinite="rollback")
    made = run_to_end(tmp_path, settings)
    assert (made.progress.step, made.progress.updates) == (12, 12)
    assert made.progress.samples == 13 * 8  # one batch was gone past
    assert made.guard.left_out == [(BAD * 8, BAD * 8 + 8)]
    (mark,) = [line for line in lines(tmp_path, 0, "phase") if line["phase"] == "rolled_back"]
    assert (mark["step"], mark["to"]) == (BAD + 1, 4)
    storage = open_storage(str(tmp_path))
    commit = newest_commit(storage)
    assert commit is not None
    assert (commit.step, commit.generation) == (12, 1)
    assert read_manifest(storage, commit).state["guard"]["left_out"] == [[BAD * 8, BAD * 8 + 8]]


def test_an_attempt_after_a_rollback_does_not_walk_into_the_same_data(tmp_path: Path) -> None:
    settings = config(on_nonfinite="rollback")
    made = trainer(tmp_path, settings)
    made.start(None)
    data = made.data()
    while not made.guard.left_out:
        made.train_step(data)
        if made.progress.step == 4 and made.saved is None:
            made.save(wait=True)
    made.checkpointer.close()  # killed right after it went back
    again = trainer(tmp_path, settings, attempt=1)
    again.start(newest_commit(open_storage(str(tmp_path))))
    assert again.progress.step == 4
    assert again.run() == 0
    assert again.guard.total == 1
    undisturbed = trainer(tmp_path / "other", config(on_nonfinite="rollback"))
    undisturbed.guard.leave_out([(BAD * 8, BAD * 8 + 8)])
    undisturbed.start(None)
    assert undisturbed.run() == 0
    ours, theirs = again.passes.named_parameters(), undisturbed.passes.named_parameters()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_a_commit_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(
        config(on_nonfinite="rollback"), checkpoint=msgspec.structs.replace(config().checkpoint, every_steps=0)
    )
    made = trainer(tmp_path, settings)
    made.start(None)
    with pytest.raises(FloatingPointError, match="there is no commit to roll back to"):
        made.run()


def test_too_many_bad_steps_in_a_row_fail_the_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, config(on_nonfinite="skip", max_skips=2))
    train = made.passes.train
    made.passes.train = lambda *given: train(*given) * math.nan  # type: ignore[method-assign]
    made.start(None)
    with pytest.raises(FloatingPointError, match="nothing was updated, and 3 steps in a row were not good"):
        made.run()
