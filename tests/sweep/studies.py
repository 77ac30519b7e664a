"""Studies as the report gets them."""

from __future__ import annotations

import math
import random
from typing import Any

from llmops.config.schema import SweepConfig
from llmops.sweep.model import Axis, StudyRecord, TrialRow

AXES = [
    Axis(key="train.lr", kind="interval", low=1e-5, high=1e-1, log=True),
    Axis(key="train.warmup_steps", kind="range", low=10, high=200, integer=True),
    Axis(key="model", kind="choice", group=True, values=["tiny", "1b"]),
    Axis(key="train.dtype", kind="choice", values=["float32", "bfloat16"]),
]


def study(axes: list[Axis] | None = None, name: str = "lr search", **sweep: Any) -> StudyRecord:
    """A study of four parameters."""
    return StudyRecord(
        id="20261123-0100-lr-ab12",
        name=name,
        owner="ada",
        host="login1",
        created=1_770_000_000.0,
        backend="local",
        kind="llm",
        command=[],
        axes=AXES if axes is None else axes,
        sweep=SweepConfig(**sweep),
        trials=8,
        base_digest="",
        nodes=1,
        ranks_per_node=1,
    )


def row(trial: int, value: float | None = None, state: str = "complete", **changes: Any) -> TrialRow:
    """A trial; its parameters follow from its number."""
    draw = random.Random(trial)
    params = {
        "train.lr": 10 ** draw.uniform(-5, -1),
        "train.warmup_steps": draw.randrange(10, 200, 10),
        "model": draw.choice(["tiny", "1b"]),
        "train.dtype": draw.choice(["float32", "bfloat16"]),
    }
    fields = {"params": params, "step": 200, "seconds": 60.0 * trial, **changes}
    return TrialRow(trial=trial, id=f"s.{trial:04d}", state=state, value=value, **fields)


def rows(count: int) -> list[TrialRow]:
    """Trials whose value is a parabola over the logarithm of train.lr; the fifth of each seven was pruned."""
    found = []
    for trial in range(count):
        made = row(trial)
        value = 2 + (math.log10(made.params["train.lr"]) + 3) ** 2
        points = [(step, value + 4 * math.exp(-step / 40)) for step in range(0, 201, 20)]
        found.append(row(trial, value, "pruned" if trial % 7 == 4 else "complete", points=points))
    return found
