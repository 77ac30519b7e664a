"""The best trial, what matters, and the page in a terminal."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
from rich.console import Console

from llmops.config.compose import load_config
from llmops.sweep import report
from llmops.sweep.importance import importance
from llmops.sweep.model import Axis, TrialRow
from tests.sweep.studies import row, rows, study

HOSTILE = "\x1b[2J</script><b>\u202egolf"


def shown(record, trials, width: int = 80, terminal: bool = True, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    report.show(record, trials, Console(width=width, force_terminal=terminal, color_system=None, file=file))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(("direction", "trial"), [("minimize", 1), ("maximize", 3)])
def test_the_best_trial(direction: str, trial: int) -> None:
    trials = [row(0, math.nan), row(1, 1.0), row(2, 1.0), row(3, 5.0, "timeout"), row(4, -9.0, "pruned")]
    trials += [row(5, math.inf), row(6, None), row(7, 99.0, "running"), row(8, -99.0, "failed"), row(9, 5.0)]
    found = report.best(study(direction=direction), trials)
    assert found is not None
    assert found.trial == trial
    assert report.best(study(), []) is None


def test_overrides_give_the_point_back() -> None:
    record = study(axes=[*study().axes, Axis(key="name", kind="choice", values=["a"])])
    text = "it's ${a}, 1e3"
    params = {"train.lr": 1.5e-05, "train.warmup_steps": 30, "model": "tiny", "train.dtype": "bfloat16", "name": text}
    overrides = report.as_overrides(record, row(0, 1.0, params=params))
    config = load_config(overrides).config
    assert (config.train.lr, config.train.warmup_steps, config.train.dtype) == (1.5e-05, 30, "bfloat16")
    assert (config.model.name, config.name) == ("tiny", text)
    assert report.as_overrides(record, TrialRow(trial=1, id="s.0001", state="pending")) == []


def test_the_summary_is_json() -> None:
    found = json.loads(json.dumps(report.summary(study(), [*rows(20), row(20, math.nan)]), allow_nan=False))
    assert found["trials"] == 21
    assert found["states"] == {"complete": 18, "pruned": 3}
    assert found["best"]["overrides"][2].startswith("model=")
    assert sum(found["importance"].values()) == pytest.approx(1)


def test_importance() -> None:
    shares = importance(study(), rows(60))
    assert list(shares) == sorted(shares, key=lambda key: -shares[key])
    assert next(iter(shares)) == "train.lr"
    assert shares["train.lr"] > 0.5
    assert importance(study(), rows(3)) == {}
    assert importance(study(), [row(trial, 1.0 * trial, params=row(0).params) for trial in range(9)]) == {}


def test_importance_of_odd_choices() -> None:
    axes = [Axis(key="a", kind="choice", values=[1, True, [1, 2], None]), Axis(key="b", kind="choice", values=["x"])]
    trials = [row(trial, float(trial), params={"a": axes[0].values[trial % 4], "b": "x"}) for trial in range(8)]
    assert list(importance(study(axes=axes), trials)) == ["a"]


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmops.sweep.importance.find_spec", lambda name: None)
    assert importance(study(), rows(60)) == {}
    assert "pip install 'llmops[sweep]'" in shown(study(), rows(60))


@pytest.mark.parametrize("width", [80, 200])
def test_the_page_fits(width: int) -> None:
    text = shown(study(), rows(50), width)
    assert max(map(len, text.splitlines())) <= width
    assert "50: 43 complete, 7 pruned" in text
    assert "30 more trials" in text
    assert "train.lr" in text
    assert "value by trial, and the best so far" in text
    header = next(line for line in text.splitlines() if line.startswith("TRIAL"))
    assert all(axis.key in header for axis in study().axes) or width == 80


def test_the_important_parameters_stay_where_space_is_scarce() -> None:
    axes = [Axis(key=f"section.parameter_{number}", kind="interval", low=0, high=1) for number in range(12)]
    trials = []
    for trial in range(40):
        params = {axis.key: ((trial + 1) * (7 + 2 * at)) % 41 / 41 for at, axis in enumerate(axes)}
        trials.append(row(trial, params["section.parameter_11"], params=params))
    header = next(line for line in shown(study(axes=axes), trials).splitlines() if line.startswith("TRIAL"))
    assert "section.parameter_11" in header
    assert "more parameters" in shown(study(axes=axes), trials)


def test_a_pipe_gets_plain_lines() -> None:
    text = shown(study(), rows(50), terminal=False)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    (header,) = [line for line in text.splitlines() if line.startswith("TRIAL")]
    assert all(axis.key in header for axis in study().axes)


@pytest.mark.parametrize("terminal", [True, False])
def test_ascii_terminals(terminal: bool) -> None:
    text = shown(study(name="große Suche"), rows(50), terminal=terminal, encoding="ascii")
    assert "gro\\xdfe Suche" in text
    assert "####" in text


def test_what_users_wrote_is_cleaned() -> None:
    axes = [Axis(key=HOSTILE, kind="choice", values=[HOSTILE])]
    text = shown(study(axes=axes, name=HOSTILE), [row(0, 1.0, params={HOSTILE: HOSTILE})], 200)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "golf" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_studies_with_little_to_show(terminal: bool) -> None:
    assert "no trial has a value yet" in shown(study(), [], terminal=terminal)
    assert "no trial has a value yet" in shown(study(), [row(0, state="failed"), row(1, math.nan)], terminal=terminal)
    assert "best" in shown(study(), [row(0, 2.5)], terminal=terminal)
    assert "3.00" in shown(study(), [row(0, 2.5), row(1, 2.5)], terminal=terminal)


def test_the_page_needs_no_optuna_at_import() -> None:
    import subprocess

    code = "import sys, llmops.sweep.report, llmops.sweep.page; assert not {'optuna', 'plotext'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
