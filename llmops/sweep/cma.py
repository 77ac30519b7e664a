"""CMA-ES for trials that choose their own points: each replays all generations from the trials that have ended.

No state is kept anywhere but in the trials. A trial says which generation it was sampled from; of each generation the
first ``population`` trials to end count, in the order in which they ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cmaes import CMA  # type: ignore[import-untyped]
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

GENERATION = "llmops:generation"
Space = dict[str, FloatDistribution | IntDistribution]


class ReplayingCma(BaseSampler):
    """Numbers by CMA-ES; choices, and a space of one number, one by one with ``independent``.

    ``population``: trials in a generation; None: the usual size for the space.
    """

    def __init__(
        self, space: dict[str, BaseDistribution], seed: int, independent: BaseSampler, population: int | None = None
    ) -> None:
        self._space: Space = {
            name: distribution
            for name, distribution in sorted(space.items())
            if isinstance(distribution, FloatDistribution | IntDistribution) and not distribution.single()
        }
        self._seed, self._independent = seed, independent
        usual = 4 + math.floor(3 * math.log(max(1, len(self._space))))
        self._population = max(usual, population or 0)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space) if len(self._space) > 1 else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        optimizer = self.replay(study)
        study._storage.set_trial_system_attr(trial._trial_id, GENERATION, optimizer.generation)
        optimizer.reseed_rng(self._seed)
        return {
            name: _external(float(coordinate), distribution)
            for (name, distribution), coordinate in zip(self._space.items(), optimizer.ask(), strict=True)
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def replay(self, study: Study) -> CMA:
        """The optimizer after all generations that are complete."""
        size = len(self._space)
        optimizer = CMA(
            mean=np.full(size, 0.5),
            sigma=1 / 6,
            bounds=np.tile([0.0, 1.0], (size, 1)),
            population_size=self._population,
            seed=0,  # never used: a draw comes after reseeding
        )
        ended: dict[int, list[FrozenTrial]] = {}
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
            generation = trial.system_attrs.get(GENERATION)
            if generation is not None and self._space.keys() <= trial.params.keys():
                ended.setdefault(int(generation), []).append(trial)
        while len(members := ended.get(optimizer.generation, [])) >= self._population:
            members = sorted(members, key=_when)[: self._population]
            points = [self._point(trial) for trial in members]
            optimizer.tell(list(zip(points, _ranks(study, members), strict=True)))
        return optimizer

    def _point(self, trial: FrozenTrial) -> npt.NDArray[np.float64]:
        return np.array([_internal(float(trial.params[name]), each) for name, each in self._space.items()])


def _when(trial: FrozenTrial) -> tuple[float, int]:
    return (trial.datetime_complete.timestamp() if trial.datetime_complete else math.inf, trial.number)


def _ranks(study: Study, trials: Sequence[FrozenTrial]) -> list[float]:
    """What CMA-ES is told: it only compares. Pruned ones come after complete ones, the longer they ran the better."""
    sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0

    def key(trial: FrozenTrial) -> tuple[float, float, float]:
        if trial.state == TrialState.COMPLETE:
            value = sign * float(trial.values[0])
            return (0.0, 0.0, value) if math.isfinite(value) else (2.0, 0.0, 0.0)
        step = trial.last_step
        value = math.inf if step is None else sign * trial.intermediate_values[step]
        return (1.0, -float(step or 0), value if not math.isnan(value) else math.inf)

    keys = [key(trial) for trial in trials]
    return [float(sorted(keys).index(each)) for each in keys]


def _bounds(distribution: FloatDistribution | IntDistribution) -> tuple[float, float]:
    """Of the continuous variable behind it: each of its steps has the same share, the first and last ones included."""
    half = distribution.step / 2 if distribution.step else 0.0
    low, high = distribution.low - half, distribution.high + half
    return (math.log(low), math.log(high)) if distribution.log else (low, high)


def _internal(value: float, distribution: FloatDistribution | IntDistribution) -> float:
    low, high = _bounds(distribution)
    return ((math.log(value) if distribution.log else value) - low) / (high - low)


def _external(coordinate: float, distribution: FloatDistribution | IntDistribution) -> float | int:
    low, high = _bounds(distribution)
    value = low + coordinate * (high - low)
    value = math.exp(value) if distribution.log else value
    if distribution.step:
        value = distribution.low + round((value - distribution.low) / distribution.step) * distribution.step
    value = min(max(value, distribution.low), distribution.high)
    return round(value) if isinstance(distribution, IntDistribution) else value
