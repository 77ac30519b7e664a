"""A study as one HTML file: no network, no other files, its data inside as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec

from llmops.monitor.plot import thin
from llmops.render import render_template
from llmops.sweep import importance, report
from llmops.sweep.model import StudyRecord, TrialRow

TEMPLATE = "sweep_report.html.j2"
CURVE_POINTS = 100  # of each learning curve
# Inside strings of JSON alone; they could end the script element or begin a comment in it.
_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})


def html(record: StudyRecord, rows: Sequence[TrialRow]) -> str:
    """The page. Whatever names and values hold, the page shows it as text."""
    return render_template(TEMPLATE, None, {"data": script_json(data(record, rows))})


def data(record: StudyRecord, rows: Sequence[TrialRow]) -> dict[str, Any]:
    """What the page, and the dashboard, show of a study."""
    found = report.best(record, rows)
    return {
        "study": {
            "id": record.id,
            "name": record.name,
            "sampler": record.sweep.sampler,
            "pruner": record.sweep.pruner.name,
            "objective": record.sweep.objective,
            "direction": record.sweep.direction,
        },
        "axes": [msgspec.to_builtins(axis) for axis in record.axes],
        "trials": [_trial(row) for row in rows],
        "counted": [row.trial for row in report.ranked(record, rows)],
        "soFar": report.so_far(record, rows),
        "best": None if found is None else {"trial": found.trial, "overrides": report.as_overrides(record, found)},
        "importance": importance.importance(record, rows),
        "importanceKnown": importance.available(),
    }


def script_json(value: object) -> str:
    """JSON that can stand in a ``<script>`` element: nothing in it ends the element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _trial(row: TrialRow) -> dict[str, Any]:
    return {
        "trial": row.trial,
        "id": row.id,
        "state": row.state,
        "value": row.value if row.value is not None and math.isfinite(row.value) else None,
        "step": row.step,
        "params": row.params,
        "seconds": row.seconds,
        "attempts": row.attempts,
        "reason": row.reason,
        "points": thin(row.points, CURVE_POINTS),
    }
