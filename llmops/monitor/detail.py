"""All about one run, for its page and the dashboards: what ``describe`` says, and what takes more reading."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llmops.errors import ClusterError, UserError
from llmops.job import JobView
from llmops.monitor import goodput
from llmops.monitor.describe import Described, describe_run, finite
from llmops.monitor.endpoint import endpoint
from llmops.monitor.scores import scores
from llmops.runs.lineage import merged_metrics, segments
from llmops.runs.model import Run
from llmops.runs.streams import decode_line, lines_backwards, parts

POINTS = 500
CHECKPOINTS = 50
READERS = 16
CURVES = ("loss", "tokens_per_s", "mfu", "grad_norm", "lr", "step_s", "data_s")
TAIL_BYTES = 1 << 22  # of an attempt's metrics, in which evaluations are looked for


def detail(run: Run, job: JobView | None, now: float) -> Described:
    """The described run with its timeline, goodput, curves, evaluations, scores, checkpoints and configuration changes.

    What cannot be read is named in ``problems``, and empty.
    """
    described, spans = describe_run(run, job, now)
    accounted = goodput.account(spans, described["nodes"] or 1, described["ranks_per_node"] or 1)
    found: Described = {
        **described,
        "timeline": [
            {"kind": each.kind, "start": each.start, "end": each.end, "attempt": each.attempt} for each in spans
        ],
        "goodput_shares": accounted.shares(),
        "params": run.record.params if run.record else {},
        "node_hours": accounted.total_s / 3600,
        "rank_hours": accounted.held_rank_s / 3600,
        "series": {"step": [], "time": [], **{name: [] for name in CURVES}},
        "evals": [],
        "scores": [],
        "endpoint": None,
        "checkpoints": [],
        "config_changes": [],
    }
    for key, read in (
        ("series", series),
        ("evals", evaluations),
        ("scores", scores),
        ("endpoint", endpoint),
        ("checkpoints", checkpoints),
        ("config_changes", config_changes),
    ):
        try:
            found[key] = read(run)
        except (UserError, ClusterError, OSError) as error:
            found["problems"] = [*found["problems"], str(error)]
    return found


def series(run: Run, points: int = POINTS) -> dict[str, list[Any]]:
    """Columns of at most ``points`` steps that count, evenly spread; numbers are means of the steps between."""
    columns: dict[str, list[Any]] = {"step": [], "time": [], **{name: [] for name in CURVES}}
    records = list(merged_metrics(run))
    count = min(points, len(records))
    for index in range(count):
        share = records[index * len(records) // count : (index + 1) * len(records) // count]
        columns["step"].append(share[-1]["step"])
        columns["time"].append(finite(share[-1].get("time")))
        for name in CURVES:
            values = [value for each in share if (value := finite(each.get(name))) is not None]
            columns[name].append(math.fsum(values) / len(values) if values else None)
    return columns


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Held-out losses that count, oldest first."""
    found: dict[int, dict[str, Any]] = {}
    for segment in segments(run):
        for path in reversed(parts(run.store, f"metrics/{segment.attempt:04d}", "", ".jsonl")):
            read = 0
            for line in lines_backwards(run.store, path):
                read += len(line)
                if read > TAIL_BYTES:
                    break
                if b'"eval"' not in line:
                    continue
                record = decode_line(line)
                if record is None or record.get("kind") != "eval":
                    continue
                step = record.get("step")
                if type(step) is not int or not segment.first_step - 1 <= step <= (segment.last_step or step):
                    continue
                row = {"step": step, "loss": finite(record.get("loss")), "time": finite(record.get("time"))}
                found.setdefault(step, row)
    return [found[step] for step in sorted(found)]


def checkpoints(run: Run) -> list[dict[str, Any]]:
    """The newest commits, newest first; one that cannot be read has no size."""
    from llm.checkpoint.format import CheckpointError
    from llm.checkpoint.lineage import folders, is_committed, read_manifest
    from llmops.runs.ssh_storage import open_storage

    storage = open_storage(run.store)

    def look(commit: Any) -> dict[str, Any] | None:
        if not is_committed(storage, commit):
            return None
        row = {"step": commit.step, "attempt": commit.attempt, "path": commit.path, "time": None, "bytes": None}
        try:
            manifest = read_manifest(storage, commit)
        except CheckpointError as error:
            return {**row, "problem": str(error)}
        return {**row, "time": manifest.time, "bytes": manifest.bytes}

    newest = sorted(folders(storage), key=lambda commit: (commit.step, commit), reverse=True)[:CHECKPOINTS]
    with ThreadPoolExecutor(READERS) as pool:
        return [row for row in pool.map(look, newest) if row is not None]


def config_changes(run: Run) -> list[dict[str, Any]]:
    """What each submission's configuration has that the one before had not, by key. Values are as they were written."""
    found: list[dict[str, Any]] = []
    before: Mapping[str, Any] | None = None
    path = None
    for submission in run.submissions:
        if submission.record.config == path:
            continue
        path = submission.record.config
        now = configuration(run, path)
        if before is not None:
            found += [
                {"key": key, "old": before.get(key), "new": now.get(key), "submission": submission.number}
                for key in sorted({*before, *now})
                if before.get(key) != now.get(key)
            ]
        before = now
    return found


def configuration(run: Run, path: str) -> dict[str, Any]:
    """One of a run's configurations, by dotted key."""
    import yaml

    try:
        return flat(yaml.safe_load(run.store.get(path)))
    except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys; an empty section is a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def overlay(runs: Sequence[Run], points: int = POINTS) -> dict[str, dict[str, list[Any]]]:
    """:func:`series` of several runs, by id; that of one that cannot be read is empty but for its ``problems``."""
    found = {}
    for run in runs:
        try:
            found[run.id] = series(run, points)
        except (UserError, ClusterError, OSError) as error:
            empty: dict[str, list[Any]] = {name: [] for name in ("step", "time", *CURVES)}
            found[run.id] = {**empty, "problems": [str(error)]}
    return found
