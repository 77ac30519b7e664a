"""Samplers and pruners that trials share without a controller, with processes that are killed and that race."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmops.errors import UserError
from llmops.runs.store import PosixStore
from llmops.sweep.model import Axis
from llmops.sweep.optimizer import Optimizer, database_url, needed
from llmops.sweep.records import Study
from tests.sweep.follow_study import in_processes, make_study, result

MIXED = (
    Axis(key="train.lr", kind="interval", low=1e-5, high=1e-1, log=True),
    Axis(key="model.layers", kind="interval", low=1, high=64, log=True, integer=True),
    Axis(key="train.batch", kind="range", values=[8, 16, 24], low=8, high=24, step=8, integer=True),
    Axis(key="train.decay", kind="range", values=[0.1, 0.2, 0.3], low=0.1, high=0.3, step=0.1),
    Axis(key="train.betas", kind="choice", values=[[0.9, 0.95], [0.9, 0.999]]),
    Axis(key="model.tied", kind="choice", values=[True, 1]),
    Axis(key="recipe", kind="choice", values=["a", "b", None], group=True),
)


def trials(study: Study) -> list[Any]:
    optimizer = Optimizer.open(study)
    return optimizer._storage.get_all_trials(optimizer._id)


def bowl(params: dict[str, Any]) -> float:
    return float((params["train.x"] - 2.0) ** 2 + (params["train.y"] + 1.0) ** 2)


def best_of(study: Study, count: int, value: Callable[[dict[str, Any]], float] = bowl) -> float:
    return min(run(study, count, value))


def run(study: Study, count: int, value: Callable[[dict[str, Any]], float] = bowl) -> list[float]:
    """Trials one after the other; their values."""
    optimizer = Optimizer.open(study)
    values = []
    for trial in range(count):
        values.append(value(optimizer.ask(trial)))
        optimizer.tell(result(trial, value=values[-1]))
    return values


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "random"])
def test_values_are_those_of_the_axes(tmp_path: Path, sampler: str) -> None:
    study = make_study(str(tmp_path), axes=MIXED, sampler=sampler)
    optimizer = Optimizer.open(study)
    asked = []
    for trial in range(24):
        params = optimizer.ask(trial)
        asked.append(params)
        optimizer.tell(result(trial, value=params["train.lr"]))
        assert 1e-5 <= params["train.lr"] <= 1e-1
        assert type(params["model.layers"]) is int
        assert 1 <= params["model.layers"] <= 64
        for axis in MIXED[2:]:
            assert any(params[axis.key] is value or params[axis.key] == value for value in axis.values)
        assert params["model.tied"] is True or type(params["model.tied"]) is int
    again = Optimizer.open(study)
    assert [again.ask(trial) for trial in range(24)] == asked


def test_given_points_are_kept(tmp_path: Path) -> None:
    study = make_study(str(tmp_path), axes=MIXED, sampler="grid", pruner={"name": "median"})
    fixed = {axis.key: axis.values[-1] if axis.values else axis.high for axis in MIXED}
    fixed["model.layers"] = 64
    assert Optimizer.open(study).ask(0, fixed) == fixed
    assert Optimizer.open(study).ask(0) == fixed
    with pytest.raises(UserError, match="not a point"):
        Optimizer.open(study).ask(1, {**fixed, "train.lr": 7.0})


def killed_at(url: str, name: str, call: int, after: bool, trial: int) -> None:
    """Ask, and be killed at the store's n-th create."""
    from llmops.runs.store import open_store
    from llmops.sweep import records

    create, count = PosixStore.create, 0

    def fatal(self: PosixStore, path: str, data: bytes, mode: int = 0o644) -> bool:
        nonlocal count
        count += 1
        if count == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        made = create(self, path, data, mode)
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    PosixStore.create = fatal  # type: ignore[method-assign]
    Optimizer.open(records.load_study(open_store(url).sub(name))).ask(trial)


def test_ask_killed_at_every_point_gives_one_trial(tmp_path: Path) -> None:
    study = make_study(str(tmp_path), sampler="tpe")
    for call, after in ((1, False), (1, True), (1, False), (1, True)):  # the study's, then the trial's
        assert in_processes(partial(killed_at, str(tmp_path), study.id, call, after, 0)) == [-signal.SIGKILL]
    assert len(trials(study)) == 1
    params = Optimizer.open(study).ask(0)
    assert Optimizer.open(study).ask(0) == params
    assert [trial.params for trial in trials(study)] == [params]


def ask_into(study: Study, trial: int, folder: Path) -> None:
    params = Optimizer.open(study).ask(trial)
    (folder / f"{trial}.{os.getpid()}").write_text(json.dumps(params))


@pytest.mark.parametrize("database", [False, True])
def test_two_asks_of_one_trial_agree(tmp_path: Path, database: bool) -> None:
    storage = f"sqlite:///{tmp_path}/study.db" if database else None
    study = make_study(str(tmp_path / "runs"), sampler="tpe", storage=storage)
    answers = tmp_path / "answers"
    answers.mkdir()
    assert in_processes(*[partial(ask_into, study, index // 3, answers) for index in range(9)]) == [0] * 9
    for trial in range(3):
        assert len({path.read_text() for path in answers.glob(f"{trial}.*")}) == 1
    Optimizer.open(study).heal({})
    running = [each for each in trials(study) if each.state.name == "RUNNING"]
    assert sorted(each.user_attrs["trial"] for each in running) == [0, 1, 2]
    assert len({each.params["train.x"] for each in running}) == 3


def test_tpe_and_cmaes_beat_random(tmp_path: Path) -> None:
    """Of 60 trials the last 20, on average: the one best may be luck."""
    late = {
        sampler: sum(run(make_study(str(tmp_path / sampler), sampler=sampler, seed=1), 60)[40:]) / 20
        for sampler in ("random", "tpe", "cmaes")
    }
    assert late["tpe"] < late["random"] / 5
    assert late["cmaes"] < late["random"] / 5


def test_one_dimension_and_choices_with_cmaes(tmp_path: Path) -> None:
    line = make_study(str(tmp_path / "line"), axes=[Axis(key="x", kind="interval", low=-5, high=5)], sampler="cmaes")
    assert best_of(line, 30, lambda params: (params["x"] - 2.0) ** 2) < 0.3
    axes = [*make_study(str(tmp_path / "a")).record.axes, Axis(key="c", kind="choice", values=["bad", "good"])]
    mixed = make_study(str(tmp_path / "mixed"), axes=axes, sampler="cmaes")
    assert best_of(mixed, 60, lambda params: bowl(params) + 10 * (params["c"] == "bad")) < 1.0


def test_cmaes_replays_the_same_in_every_process(tmp_path: Path) -> None:
    from llmops.sweep.cma import GENERATION

    study = make_study(str(tmp_path / "runs"), sampler="cmaes")
    best_of(study, 40)
    generations = [trial.system_attrs[GENERATION] for trial in trials(study)]
    assert generations == [index // 6 for index in range(40)]
    script = (
        "import json, sys; from llmops.runs.store import open_store; from llmops.sweep import records; "
        "from llmops.sweep.optimizer import Optimizer; o = Optimizer.open(records.load_study(open_store(sys.argv[1])));"
        "print(json.dumps(o._sample(40)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, study.url], env={**os.environ, "PYTHONHASHSEED": seed}, text=True,
            capture_output=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1
    sampled, system = json.loads(outputs.pop())
    assert (sampled, system[GENERATION]) == (Optimizer.open(study).ask(40), 6)


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_what_is_not_a_number_is_avoided(tmp_path: Path, sampler: str, direction: str) -> None:
    """Left of 0 the loss is NaN; most of those asked late lie right of it."""
    study = make_study(str(tmp_path), sampler=sampler, direction=direction, seed=2)
    optimizer = Optimizer.open(study)
    sign = 1.0 if direction == "minimize" else -1.0
    left = []
    for trial in range(60):
        params = optimizer.ask(trial)
        left.append(params["train.x"] < 0)
        value = sign * bowl(params)
        optimizer.tell(result(trial, "nan") if left[-1] else result(trial, value=value))
    worst = math.inf * sign
    assert [each.value == worst for each in trials(study)] == left
    assert sum(left[40:]) < 5


def test_a_study_of_nothing_but_nan_goes_on(tmp_path: Path) -> None:
    for sampler in ("tpe", "cmaes"):
        optimizer = Optimizer.open(make_study(str(tmp_path / sampler), sampler=sampler))
        for trial in range(20):
            optimizer.ask(trial)
            optimizer.tell(result(trial, "nan"))
        assert optimizer.ask(20)


@pytest.mark.parametrize(
    ("outcome", "value", "state", "stored"),
    [
        ("complete", 1.5, "COMPLETE", 1.5),
        ("pruned", 1.5, "PRUNED", 1.5),
        ("pruned", None, "PRUNED", None),
        ("timeout", 1.5, "COMPLETE", 1.5),
        ("timeout", None, "PRUNED", None),
        ("nan", None, "COMPLETE", math.inf),
        ("failed", 1.5, "FAIL", None),
        ("cancelled", None, "FAIL", None),
    ],
)
def test_outcomes(tmp_path: Path, outcome: str, value: float | None, state: str, stored: float | None) -> None:
    study = make_study(str(tmp_path), sampler="tpe")
    optimizer = Optimizer.open(study)
    optimizer.ask(0)
    for _ in range(2):
        optimizer.tell(result(0, outcome, value))
        Optimizer.open(study).tell(result(0, "complete", 99.0))
    assert [(each.state.name, each.value) for each in trials(study)] == [(state, stored)]


def test_a_failed_trial_has_another_life(tmp_path: Path) -> None:
    study = make_study(str(tmp_path), sampler="tpe")
    optimizer = Optimizer.open(study)
    params = optimizer.ask(0)
    optimizer.tell(result(0, "failed", submission=0))
    assert Optimizer.open(study).ask(0) == params
    # The old result, which anybody may tell again, is not the new life's.
    optimizer.heal({0: result(0, "failed", submission=0)})
    assert [each.state.name for each in trials(study)] == ["FAIL", "RUNNING"]
    optimizer.heal({0: result(0, "complete", 0.5, submission=1)})
    assert [(each.state.name, each.user_attrs["life"]) for each in trials(study)] == [("FAIL", 0), ("COMPLETE", 1)]


def test_healing_tells_what_died_untold(tmp_path: Path) -> None:
    study = make_study(str(tmp_path), sampler="tpe")
    optimizer = Optimizer.open(study)
    for trial in range(4):
        optimizer.ask(trial)
    optimizer.heal({1: result(1, value=3.0), 2: result(2, "failed"), 9: result(9, value=1.0)})
    assert [each.state.name for each in trials(study)] == ["RUNNING", "COMPLETE", "FAIL", "RUNNING"]
    before = len(list((tmp_path / study.id / "journal").iterdir()))
    optimizer.heal({1: result(1, value=3.0), 2: result(2, "failed")})
    assert len(list((tmp_path / study.id / "journal").iterdir())) == before


@pytest.mark.parametrize("name", ["median", "asha", "hyperband"])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_pruners_stop_the_bad_ones(tmp_path: Path, name: str, direction: str) -> None:
    """Curves that fall to their number: of 30 in random order the worst end early, and the best one does not."""
    study = make_study(
        str(tmp_path), axes=[Axis(key="k", kind="choice", values=list(range(30)))], sampler="grid",
        direction=direction, pruner={"name": name, "min_step": 10},
    )  # fmt: skip
    optimizer = Optimizer.open(study)
    sign = 1.0 if direction == "minimize" else -1.0
    kinds = random.Random(0).sample(range(30), 30)
    lasted = {}
    for trial, kind in enumerate(kinds):
        optimizer.ask(trial, {"k": kind})
        for step in range(10, 101, 10):
            optimizer.report(trial, step, sign * (1 + kind + 100 / step))
            if optimizer.should_prune(trial):
                optimizer.tell(result(trial, "pruned", sign * (1 + kind + 100 / step)))
                break
        else:
            optimizer.tell(result(trial, value=sign * (2.0 + kind)))
        lasted[kind] = step
    early = [kind for kind, step in lasted.items() if step < 100]
    assert lasted[0] == 100
    assert len(early) >= 10
    assert sum(early) / len(early) > 15
    assert optimizer.should_prune(kinds.index(early[0]))


def test_saying_a_thing_twice_changes_and_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = make_study(str(tmp_path), sampler="tpe", pruner={"name": "asha"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer = Optimizer.open(study)
            optimizer.ask(0)
            optimizer.report(0, 1, 3.0)
            optimizer.report(0, 1, 4.0)
            optimizer.report(0, 2, math.nan)
            optimizer.should_prune(0)
            optimizer.tell(result(0, value=1.0))
            optimizer.report(0, 3, 1.0)
            assert optimizer.should_prune(0) is False
    [trial] = trials(study)
    assert trial.intermediate_values[1] == 3.0
    assert sorted(trial.intermediate_values) == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDY_DB", f"sqlite:///{tmp_path}/study.db")
    study = make_study(str(tmp_path / "runs"), sampler="tpe", storage="env:STUDY_DB", pruner={"name": "median"})
    optimizer = Optimizer.open(study)
    params = optimizer.ask(0)
    optimizer.report(0, 1, math.inf)
    optimizer.tell(result(0, "nan"))
    other = Optimizer.open(study)
    assert other.ask(0) == params
    assert [each.value for each in trials(study)] == [math.inf]
    assert not (tmp_path / "runs" / study.id / "journal").exists()


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ("env:NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE is not set"),
        ("postgresql://ada:geheim@db/studies", "write env:NAME"),
        ("mysql://db/studies?password=geheim", "write env:NAME"),
        ("sqlite:///here.db", "absolute path"),
        ("geheim", "no URL of a database"),
    ],
)
def test_storages_that_cannot_work(storage: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        database_url(storage)
    assert "geheim" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_journal_is_json_and_nothing_pickles(tmp_path: Path) -> None:
    study = make_study(str(tmp_path), sampler="cmaes", pruner={"name": "hyperband"})
    best_of(study, 15)
    parts = list((tmp_path / study.id / "journal").iterdir())
    assert len(parts) >= 30
    for part in parts:
        assert json.loads(part.read_bytes())["logs"]
    folder = Path(sys.modules["llmops.sweep.optimizer"].__file__ or "").parent
    for name in ("journal", "optimizer", "pruners", "cma", "follow"):
        assert "import pickle" not in (folder / f"{name}.py").read_text()


def test_importing_is_cheap() -> None:
    script = "import sys, llmops.sweep.optimizer, llmops.sweep.follow; print([m in sys.modules for m in sys.argv[1:]])"
    done = subprocess.run([sys.executable, "-c", script, "optuna", "numpy"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, False]"


def test_who_needs_it(tmp_path: Path) -> None:
    sweeps = [{"sampler": "grid"}, {"sampler": "random"}, {"sampler": "tpe"}, {"sampler": "cmaes"}]
    told = [needed(make_study(str(tmp_path / str(i)), **each).record.sweep) for i, each in enumerate(sweeps)]
    assert told == [False, False, True, True]
    assert needed(make_study(str(tmp_path / "p"), pruner={"name": "asha"}).record.sweep)
