"""How often a run should save: assumptions that are said, or what an earlier run has measured."""

from __future__ import annotations

import math

import pytest

from llm.estimate.saving import NODE_S, Measured, Saving, saving
from llmops import plan
from llmops.config.compose import load_config
from llmops.measured import measured
from tests.conftest import RunMaker
from tests.monitor.history import preempted_and_crashed
from tests.plan.test_plan import BIG, verb


def test_assumptions_give_the_interval_of_young_and_daly() -> None:
    made = saving(80e9, 8)
    assert (made.stall_s, made.save_s) == pytest.approx((1.0, 10.0))
    assert made.between_s == pytest.approx(NODE_S / 8)
    assert made.every_s == pytest.approx(math.sqrt(2 * made.stall_s * made.between_s))
    assert "assumed" in made.cost_from
    assert "assumed" in made.between_from


def test_no_other_interval_loses_less() -> None:
    made = saving(800e9, 256)
    for factor in (0.5, 0.9, 1.1, 2.0):
        other = Saving(
            made.stall_s, made.save_s, made.between_s, made.every_s * factor, made.cost_from, made.between_from
        )
        assert other.lost > made.lost


def test_a_save_is_over_before_the_next_one_begins() -> None:
    slow = Measured("r", stall_s=0.1, save_s=5000.0, bytes=80e9, nodes=8, interruptions=50, node_s=1e6)
    assert saving(80e9, 8, slow).every_s == 5000.0


def test_an_earlier_run_is_scaled_by_bytes_of_a_node(make_run: RunMaker) -> None:
    history = preempted_and_crashed(make_run)
    found = measured(history.made.load())
    # Stalls of 4, 6, 5 and 20 s; commits that counted 16, 14, 5 and 10 s after they were begun; 100 bytes each.
    assert (found.stall_s, found.save_s, found.bytes) == (5.5, 12.0, 100.0)
    assert found.interruptions == 1  # the preemption had its state saved
    assert found.node_s == (1100 + 900 + 1190) * found.nodes
    made = saving(300.0 / found.nodes, 1, found)
    assert made.stall_s == pytest.approx(3 * 5.5)
    assert made.between_s == pytest.approx((found.node_s + NODE_S) / 2)
    assert made.cost_from == f"from saves of {found.run}"


def test_a_run_without_saves_leaves_their_cost_assumed(make_run: RunMaker) -> None:
    found = measured(make_run().load())
    assert (found.stall_s, found.interruptions, found.node_s) == (None, 0, 0.0)
    made = saving(80e9, 8, found)
    assert "assumed" in made.cost_from
    assert made.between_s == pytest.approx(NODE_S / 8)


def test_the_plan_says_how_often_and_why(make_run: RunMaker) -> None:
    history = preempted_and_crashed(make_run)
    run = history.made.load()
    runs_url = run.url.removesuffix(run.id).rstrip("/")
    shown = verb(*BIG, f"runs_url={runs_url}", "--like", run.id)
    assert shown.returncode == 0, shown.stderr
    assert "least is lost with checkpoint.every_minutes=" in shown.stdout
    assert f"from saves of {run.name}" in shown.stdout
    assert plan.make(load_config(BIG).config).record()["saving"]["every_s"] > 60
    refused = verb(*BIG, f"runs_url={runs_url}", "--like", "no-such-run")
    assert refused.returncode == 2
    assert "no-such-run" in refused.stderr
