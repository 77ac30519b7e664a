"""A run that moves from layout to layout: every hand-over continues the same batches, and nearly the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm.checkpoint.lineage import newest_commit, read_manifest
from llm.utils.storage import open_storage
from tests.llm.harness import Attempt, start, tiny, trajectory

STEPS = 18
# Each goes on for a few steps from where the one before stopped: ranks, and what is set of ``dist``.
JOURNEY: list[tuple[int, dict[str, Any]]] = [
    (2, {"dp_replicate": 2}),
    (4, {"tp": 2}),
    (2, {"pp": 2}),
    (2, {"cp": 2}),
    (4, {"tp": 2, "pp": 2}),
]


def config(**dist: Any) -> dict[str, Any]:
    made = tiny(train__max_steps=STEPS, train__micro_batch_size=1)
    made["model"].update(vocab_size=264, n_layers=4)
    made["eval"].update(every_steps=0, batches=1, sample_prompts=[])
    made["checkpoint"]["every_steps"] = 0
    made["dist"].update(dist)
    return made


def go_on(run: Path, ranks: int, attempt: int, dist: dict[str, Any]) -> Attempt:
    return start(run, config(**dist), ranks=ranks, attempt=attempt)


def test_a_run_goes_through_every_layout(tmp_path: Path) -> None:
    assert go_on(tmp_path / "alone", 1, 0, {}).finish() == [0]
    expected = trajectory(tmp_path / "alone")
    run = tmp_path / "run"
    for number, (ranks, dist) in enumerate(JOURNEY):
        attempt = go_on(run, ranks, number, dist)
        if number + 1 == len(JOURNEY):
            assert attempt.finish() == [0] * ranks
            break
        attempt.wait_for_step(2 * number + 2)
        attempt.stop()
        assert attempt.finish() == [75] * ranks
        storage = open_storage(str(run))
        commit = newest_commit(storage)
        assert commit is not None
        assert commit.step < STEPS
        assert read_manifest(storage, commit).mesh["ranks"] == ranks
    found = trajectory(run)
    assert list(found) == list(expected)
    for step, (loss, rate, norm, tokens) in found.items():
        assert (rate, tokens) == (expected[step][1], expected[step][3])
        assert loss == pytest.approx(expected[step][0], rel=2e-4), step
        assert norm == pytest.approx(expected[step][2], rel=2e-2), step
