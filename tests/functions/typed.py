"""A user's program as type checkers see it. It is checked with the tree, by ``mypy``, and never run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, assert_type

import llmops
from llmops import Executor, Run, Status


def area(width: int, height: float = 1.0) -> float:
    return width * height


assert_type(llmops.submit(["recipe=tiny"], backend="slurm"), Run[None])
assert_type(llmops.submit(command=["true"]), Run[None])
run = llmops.submit(area, 1, height=2.0)
assert_type(run, Run[float])
assert_type(run.result(timeout=5), float)
assert_type(run.status(), Status)
assert_type(run.status().state, str)
assert_type(run.logs(), Iterator[str])
assert_type(run.metrics(), list[dict[str, Any]])
assert_type(run.resume(), Run[float])
assert_type(llmops.map(area, [1, 2]), list[Run[float]])
assert_type(Executor(["cluster.time=5"], backend="slurm").submit(area, 3), Run[float])
Executor().submit(area, "wide")  # type: ignore[arg-type]
llmops.submit(area, depth=1)  # type: ignore[call-overload]
