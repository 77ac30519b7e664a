"""Studies for the tests of what samples, prunes and follows."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmops.config.schema import PrunerConfig, SweepConfig
from llmops.sweep import records
from llmops.sweep.model import Axis, Result, StudyRecord

PLANE = (
    Axis(key="train.x", kind="interval", low=-5.0, high=5.0),
    Axis(key="train.y", kind="interval", low=-5.0, high=5.0),
)


def make_study(
    url: str,
    name: str = "20260131-120000-study-aaaa",
    axes: Sequence[Axis] = PLANE,
    max_steps: int | None = 100,
    pruner: Mapping[str, Any] | None = None,
    **sweep: Any,
) -> records.Study:
    """A study directory, as the launcher makes it."""
    record = StudyRecord(
        id=name,
        name="study",
        owner="ada",
        host="login1",
        created=1_770_000_000.0,
        backend="local",
        kind="llm",
        command=[],
        axes=list(axes),
        sweep=SweepConfig(pruner=PrunerConfig(**(pruner or {})), **sweep),
        trials=sweep.get("trials", 20),
        base_digest="0",
        nodes=1,
        ranks_per_node=1,
        max_steps=max_steps,
    )
    return records.load_study(records.create_study(url, record, b"{}\n", b"{}\n"))


def result(trial: int, outcome: str = "complete", value: float | None = None, **more: Any) -> Result:
    return Result(trial=trial, outcome=outcome, time=1.0, value=value, **more)  # type: ignore[arg-type]


def in_processes(*calls: Callable[[], object]) -> list[int | None]:
    """Run each call in a process of its own, all at once; their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]
