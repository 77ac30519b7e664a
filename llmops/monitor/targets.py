"""Where the jobs of runs serve their metrics: ``attempts/NNNN/endpoints/NNNN.json``, one object for each node.

Each node's exporter writes its own; discovery reads those of attempts that run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from llmops.runs.records import path_of, read_many
from llmops.runs.store import Store

MAX_NODES = 4096  # of one run, whose targets are told


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """``host:port`` of a node's exporter, and of its rank 0 once that serves metrics, too."""

    node: str
    address: str
    train: str | None = None
    time: float


@dataclass(frozen=True)
class Target:
    """One address to scrape, and the labels that all of its series get."""

    address: str
    labels: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As Prometheus' HTTP service discovery wants it."""
        return {"targets": [self.address], "labels": dict(self.labels)}


def write_endpoints(run: Store, attempt: int, number: int, endpoints: Endpoints) -> None:
    """``number``: which node of the job it is; names may repeat where several are on one machine."""
    run.put(f"{_folder(attempt)}/{number:04d}.json", msgspec.json.encode(endpoints))


def live_targets(runs: Store, described: Iterable[Mapping[str, Any]]) -> list[Target]:
    """Of the attempts that run now. ``described``: objects of ``llmops status --json``, of runs below ``runs``."""
    found = []
    for each in described:
        attempts: Sequence[Mapping[str, Any]] = each["attempts"]
        if each["state"] == "running" and attempts and attempts[-1]["state"] == "running":
            found += _of_attempt(runs, each, attempts[-1]["number"])
    return found


def _of_attempt(runs: Store, described: Mapping[str, Any], attempt: int) -> list[Target]:
    folder = f"{path_of(described['id'])}/{_folder(attempt)}"
    names = [name for name in runs.list(folder) if name.endswith(".json")][:MAX_NODES]
    targets = []
    for data in read_many(runs, [f"{folder}/{name}" for name in names]):
        try:
            endpoints = msgspec.json.decode(data or b"", type=Endpoints)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue  # not a target; whoever wrote it writes it anew
        labels = {"run": described["name"], "run_id": described["id"], "node": endpoints.node, "attempt": str(attempt)}
        targets.append(Target(endpoints.address, {**labels, "job_kind": "node"}))
        if endpoints.train is not None:
            targets.append(Target(endpoints.train, {**labels, "job_kind": "train"}))
    return targets


def _folder(attempt: int) -> str:
    return f"attempts/{attempt:04d}/endpoints"
