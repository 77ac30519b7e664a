"""A study's axes, sampler and pruner as Optuna's objects. Imports Optuna where it is used."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from llmops.errors import UserError
from llmops.sweep.model import Axis, StudyRecord

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler


def distribution(axis: Axis) -> BaseDistribution:
    """What Optuna calls an axis."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.kind == "choice":
        return CategoricalDistribution(list(range(len(axis.values))) if _by_index(axis) else axis.values)
    assert axis.low is not None
    assert axis.high is not None
    low, high = sorted((axis.low, axis.high))
    step = abs(axis.step) if axis.step and axis.kind == "range" else None
    if axis.integer:
        return IntDistribution(int(low), int(high), log=axis.log, step=int(step or 1))
    return FloatDistribution(low, high, log=axis.log, step=step)


def _by_index(axis: Axis) -> bool:
    """Values that Optuna cannot store, or would confuse: to it 1, 1.0 and true are one."""
    scalars = all(value is None or isinstance(value, str | bool | int | float) for value in axis.values)
    return not scalars or len(set(axis.values)) < len(axis.values)


def inward(axis: Axis, value: Any) -> Any:
    """A value of the axis as Optuna has it."""
    if axis.kind == "choice" and _by_index(axis):
        same = [i for i, each in enumerate(axis.values) if type(each) is type(value) and each == value]
        if not same:
            raise UserError(f"{axis.key}: {value!r} is none of its values")
        return same[0]
    return value


def outward(axis: Axis, known: BaseDistribution, value: Any) -> Any:
    if axis.kind == "choice":
        return axis.values[int(known.to_internal_repr(value))]
    if axis.kind == "range" and axis.values:
        return min(axis.values, key=lambda each: abs(each - value))  # as it was written, not 0.30000000000000004
    return value


def sampler(record: StudyRecord, space: dict[str, BaseDistribution], trial: int) -> BaseSampler:
    """The sampler for one trial. Each has its own seed, or trials that start together would get the same point."""
    from optuna.samplers import RandomSampler, TPESampler

    sweep = record.sweep
    digest = hashlib.sha256(f"{sweep.seed}/{trial}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if sweep.sampler == "tpe":
        return TPESampler(multivariate=True, constant_liar=True, seed=seed)
    if sweep.sampler == "cmaes":
        from llmops.sweep.cma import ReplayingCma

        single = TPESampler(multivariate=False, constant_liar=True, seed=seed)
        # What runs at the same time belongs to one generation, as long as there are enough generations to learn from.
        population = min(sweep.max_parallel or 0, record.trials // 10)
        return ReplayingCma(space, seed, single, population)
    return RandomSampler(seed=seed)


def pruner(record: StudyRecord) -> BasePruner:
    """The pruner, with rungs in training steps."""
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner

    wanted, steps = record.sweep.pruner, record.max_steps
    first = wanted.min_step or (max(1, steps // 100) if steps else 0)
    if wanted.name == "median":
        return MedianPruner(n_startup_trials=wanted.startup_trials, n_warmup_steps=wanted.min_step)
    if wanted.name == "asha":
        return SuccessiveHalvingPruner(min_resource=first or "auto", reduction_factor=wanted.reduction_factor)
    if wanted.name == "hyperband":
        return HyperbandPruner(
            min_resource=max(1, first),
            max_resource=max(steps, first) if steps else "auto",
            reduction_factor=wanted.reduction_factor,
        )
    return NopPruner()
