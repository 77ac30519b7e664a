"""What an earlier run tells of the saves and interruptions of the next one."""

from __future__ import annotations

import statistics

from llm.estimate.saving import Measured
from llmops.runs.model import Run
from llmops.runs.streams import decode_line, lines_backwards, parts

SAVES = 20  # of the newest: the median of so many is settled


def measured(run: Run) -> Measured:
    """From its attempts' records and the ends of its metrics."""
    stalls: list[float] = []
    saves: list[tuple[float, float]] = []  # seconds, bytes
    node_s, interruptions, nodes = 0.0, 0, 1
    for attempt in reversed(run.attempts):
        if attempt.end is not None:
            node_s += max(attempt.end.time - attempt.start.time, 0.0) * len(attempt.start.hosts)
            # One that ended with its state saved has lost nothing.
            interruptions += attempt.end.reason != "finished" and not attempt.end.saved
        if len(saves) < SAVES:
            nodes = len(attempt.start.hosts)
            _read(run, attempt.number, stalls, saves)
    known = bool(stalls and saves)
    return Measured(
        run=run.name,
        stall_s=statistics.median(stalls) if known else None,
        save_s=statistics.median(seconds for seconds, _ in saves) if known else None,
        bytes=statistics.median(size for _, size in saves) if known else 0.0,
        nodes=nodes,
        interruptions=interruptions,
        node_s=node_s,
    )


def _read(run: Run, attempt: int, stalls: list[float], saves: list[tuple[float, float]]) -> None:
    for path in reversed(parts(run.store, f"metrics/{attempt:04d}", "", ".jsonl")):
        for line in lines_backwards(run.store, path):
            record = decode_line(line) if b'"phase"' in line else None
            if record is None or type(record.get("seconds")) not in (int, float):
                continue
            if record.get("phase") == "staged":
                stalls.append(record["seconds"])
            elif record.get("phase") == "saved" and type(record.get("bytes")) is int and record["bytes"] > 0:
                saves.append((record["seconds"], record["bytes"]))
            if len(saves) >= SAVES and stalls:
                return
