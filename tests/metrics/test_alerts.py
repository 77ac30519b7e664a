"""Each alert fires when it should, with words that say what to do, and not before; run by promtool."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.metrics.parts import TREE, promtool

ALERTS = TREE / "docker" / "prometheus" / "alerts.yml"
RUN = 'run_id="20260131-120000-big-aaaa"'
INFO = f'llmops_run_info{{{RUN}, run="big", owner="ada", backend="slurm", kind="llm"}}'
LABELS = {"run_id": "20260131-120000-big-aaaa", "run": "big", "owner": "ada"}

# Alert, series of one value a minute, when it is silent, when it fires (minutes), its labels, a part of its text.
CASES: list[tuple[str, dict[str, str], int | None, int | None, dict[str, str], str]] = [
    (
        "LlmopsRunStalled",
        {INFO: "1x60", f"llmops_run_stalled_seconds{{{RUN}}}": "_x10 240 310+60x30"},
        12,
        15,
        LABELS,
        "no sign of life for 9m",
    ),
    ("LlmopsRunStalled", {INFO: "1x60", f"llmops_run_stalled_seconds{{{RUN}}}": "_x10 310 _x40"}, 30, None, {}, ""),
    (
        "LlmopsRunCrashLooping",
        {INFO: "1x90", f'llmops_run_attempts_total{{{RUN}, reason="failed"}}': "0x10 1x10 2x10 4x60"},
        28,
        35,
        LABELS,
        "have failed within an hour",
    ),
    # Preemptions are no failures, and two failures are no loop.
    (
        "LlmopsRunCrashLooping",
        {
            INFO: "1x90",
            f'llmops_run_attempts_total{{{RUN}, reason="preempted"}}': "0+1x80",
            f'llmops_run_attempts_total{{{RUN}, reason="failed"}}': "0x10 2x80",
        },
        60,
        None,
        {},
        "",
    ),
    (
        "LlmopsGoodputLow",
        {
            INFO: "1x200",
            f"llmops_run_goodput_ratio{{{RUN}}}": "0.25x200",
            f"llmops_run_created_timestamp_seconds{{{RUN}}}": "0x200",
            f'llmops_run_state{{{RUN}, state="running"}}': "1x200",
        },
        145,
        155,
        LABELS,
        "Only 25% of the time",
    ),
    (
        "LlmopsGoodputLow",  # one that waits loses nobody's node-hours
        {
            INFO: "1x200",
            f"llmops_run_goodput_ratio{{{RUN}}}": "0.25x200",
            f"llmops_run_created_timestamp_seconds{{{RUN}}}": "0x200",
            f'llmops_run_state{{{RUN}, state="pending"}}': "1x200",
        },
        190,
        None,
        {},
        "",
    ),
    (
        "LlmopsNoCommit",
        {INFO: "1x200", f"llmops_run_uncommitted_seconds{{{RUN}}}": "0+60x200"},
        124,
        127,
        LABELS,
        "2h 7m",
    ),
    ("LlmopsNoCommit", {INFO: "1x200", f"llmops_run_uncommitted_seconds{{{RUN}}}": "7000x200"}, 190, None, {}, ""),
    (
        "LlmopsSchedulerDown",
        {'llmops_scheduler_up{backend="slurm"}': "1x5 0x60", 'llmops_scheduler_up{backend="k8s"}': "1x65"},
        14,
        17,
        {"backend": "slurm"},
        "slurm",
    ),
    (
        "LlmopsStoreDown",
        {"llmops_store_up": "1x5 0x60", "llmops_last_look_timestamp_seconds": "0+60x65"},
        14,
        17,
        {},
        "cannot read the run store",
    ),
    (
        "LlmopsStoreDown",  # whoever looks is stuck, and does not know it
        {"llmops_store_up": "1x65", "llmops_last_look_timestamp_seconds": "0+60x5 300x60"},
        20,
        27,
        {},
        "cannot read the run store",
    ),
    ("LlmopsExporterDown", {"llmops_store_up": "1x5 stale"}, 9, 13, {}, "does not run"),
    ("LlmopsExporterDown", {"llmops_store_up": "0x30"}, 29, None, {}, ""),
]


def rules() -> dict[str, dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def fired(name: str, series: dict[str, str], minute: int, tmp_path) -> list[dict[str, Any]]:
    """The alerts of that name which promtool finds at a minute: read from what it says against none expected."""
    case = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": key, "values": value} for key, value in series.items()],
                "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": name, "exp_alerts": []}],
            }
        ],
    }
    path = tmp_path / "case.yml"
    path.write_text(yaml.safe_dump(case))
    try:
        promtool("test", "rules", str(path))
    except AssertionError as error:
        said = str(error)
        assert "got:[" in re.sub(r"\s", "", said), said
        return [{"text": said}]
    return []


@pytest.mark.parametrize(
    ("name", "series", "silent", "fires", "labels", "words"),
    CASES,
    ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)],
)
def test_an_alert_fires_when_it_should_and_not_before(name, series, silent, fires, labels, words, tmp_path):
    assert not fired(name, series, silent, tmp_path)
    if fires is not None:
        (found,) = fired(name, series, fires, tmp_path)
        for key, value in labels.items():
            assert f'{key}="{value}"' in found["text"]
        assert words in found["text"]


def test_every_alert_is_tried_and_says_what_it_means():
    both = {name for name, _, silent, fires, _, _ in CASES if silent is not None and fires is not None}
    assert set(rules()) == both
    for rule in rules().values():
        assert rule["for"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_configuration_that_is_mounted_is_valid():
    promtool("check", "config", str(ALERTS.with_name("prometheus.yml")))
