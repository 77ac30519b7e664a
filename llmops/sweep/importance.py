"""Which parameters a study's objective depends on, by PED-ANOVA (Watanabe et al., IJCAI 2023), as Optuna has it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llmops.sweep.model import Axis, StudyRecord, TrialRow

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST = 4  # complete trials below which importance means nothing


def available() -> bool:
    """Is Optuna installed?"""
    return find_spec("optuna") is not None


def importance(record: StudyRecord, rows: Sequence[TrialRow]) -> dict[str, float]:
    """Share of each parameter, largest first; together 1. Parameters that never varied are left out.

    Empty without Optuna, and where fewer than four trials are complete or nothing varied.
    """
    axes, complete = record.axes, [row for row in rows if _counts(record, row)]
    if len(complete) < FEWEST or not available():
        return {}
    columns = {axis.key: [row.params[axis.key] for row in complete] for axis in axes}
    varied = [axis for axis in axes if len({_label(value) for value in columns[axis.key]}) > 1]
    if not varied:
        return {}
    import optuna

    spaces = {axis.key: _distribution(axis, columns[axis.key]) for axis in varied}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce the study
    try:
        study = optuna.create_study(direction=record.sweep.direction)
        for row in complete:
            params = {key: _inside(row.params[key], space) for key, space in spaces.items()}
            study.add_trial(optuna.create_trial(params=params, distributions=spaces, value=row.value))
        return {key: float(share) for key, share in optuna.importance.get_param_importances(study).items()}
    finally:
        optuna.logging.set_verbosity(verbosity)


def _counts(record: StudyRecord, row: TrialRow) -> bool:
    known = row.value is not None and math.isfinite(row.value)
    return row.state == "complete" and known and all(axis.key in row.params for axis in record.axes)


def _distribution(axis: Axis, values: Sequence[Any]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.kind == "choice" or not all(_is_number(value) for value in values):
        return CategoricalDistribution(sorted({_label(value) for value in values}))
    low = min([*values, *([] if axis.low is None else [axis.low])])
    high = max([*values, *([] if axis.high is None else [axis.high])])
    log = axis.log and low > 0
    if axis.integer:
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _inside(value: Any, space: BaseDistribution) -> Any:
    from optuna.distributions import CategoricalDistribution

    return _label(value) if isinstance(space, CategoricalDistribution) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(value: Any) -> str:
    """Choices may be lists, and 1 and true are two of them."""
    return json.dumps(value, sort_keys=True)
