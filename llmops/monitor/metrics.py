"""States of runs and queues as Prometheus' families: what ``llmops metrics`` serves.

Runs have series of their own while they are not over, and for an hour after that; of more than :data:`MAX_RUNS` the
newest. All others are in the counts alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from llmops.monitor.feed import Seen
from llmops.monitor.targets import Target
from llmops.runs.model import Reason
from llmops.runs.state import DONE

MAX_RUNS = 500
SHOWN_S = 3600.0  # after its end
REASONS = tuple(reason for reason in get_args(Reason) if reason != "finished")
_WAITING = ("pending", "preempted")  # in the queue, for the first time or again
_TRIAL_WAITING = (*_WAITING, "waiting")


@dataclass(frozen=True)
class Look:
    """What was seen: objects of ``llmops status --json``, runs and studies; where jobs serve metrics; what it took."""

    described: Sequence[Mapping[str, Any]]
    targets: Sequence[Target]
    seconds: float


def text(seen: Seen[Look], now: float) -> bytes:
    """All of it in Prometheus' text format. ``now``: epoch seconds."""
    registry = CollectorRegistry()
    registry.register(_Collector(lambda: collect(seen, now)))
    return generate_latest(registry)


class _Collector:
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self.collect = collect


def collect(seen: Seen[Look], now: float) -> Iterator[Metric]:
    """All families. Of a store that does not answer, what was seen last stays; ``llmops_store_up`` says so."""
    up = float(seen.value is not None and not seen.trouble)
    yield GaugeMetricFamily("llmops_store_up", "Whether the run store answered the last look.", value=up)
    look = seen.value
    if look is None:
        return
    text = "When the run store and the schedulers last answered."
    yield GaugeMetricFamily("llmops_last_look_timestamp_seconds", text, value=seen.taken)
    yield GaugeMetricFamily("llmops_look_seconds", "Seconds that the last look took.", value=look.seconds)
    yield GaugeMetricFamily("llmops_targets", "Addresses that discovery tells Prometheus.", value=len(look.targets))
    yield from _counts(look.described)
    shown, omitted = choose(look.described, now)
    text = "Runs without series of their own because there are too many."
    yield GaugeMetricFamily("llmops_runs_omitted", text, value=omitted)
    yield from _of_runs(shown, now)
    yield from _scores(shown)


def choose(described: Sequence[Mapping[str, Any]], now: float) -> tuple[list[Mapping[str, Any]], int]:
    """The runs that get series of their own, and how many would but are too many."""
    live = [
        each
        for each in described
        if "trials" not in each and (each["state"] not in DONE or now - (each.get("ended") or 0.0) < SHOWN_S)
    ]
    newest = sorted(live, key=lambda each: each["created"] or 0.0, reverse=True)
    return newest[:MAX_RUNS], max(len(newest) - MAX_RUNS, 0)


def scheduler_answers(described: Mapping[str, Any]) -> bool | None:
    """Whether a run's scheduler answered when it was asked about it; None where it was not asked."""
    if described["state"] in DONE or "trials" in described or not described["backend"] or not described["job_ids"]:
        return None
    told: str = described["reason"]
    return not (described["state"] == "unknown" and told.startswith(f"{described['backend']} did not answer"))


def _counts(described: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    runs, studies, jobs = Counter[tuple[str, str]](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    up: dict[str, bool] = {}
    for each in described:
        place = each["backend"] or "none"
        if "trials" in each:
            studies[place, each["state"]] += 1
            jobs[place, "running"] += each["trials"].get("running", 0)
            jobs[place, "waiting"] += sum(each["trials"].get(state, 0) for state in _TRIAL_WAITING)
            continue
        runs[place, each["state"]] += 1
        jobs[place, "running"] += each["state"] == "running"
        jobs[place, "waiting"] += each["state"] in _WAITING
        if (answers := scheduler_answers(each)) is not None:
            up[place] = up.get(place, True) and answers
    for name, text, counted in (
        ("llmops_runs", "Runs in the run store, without trials of studies.", runs),
        ("llmops_studies", "Studies in the run store.", studies),
        ("llmops_queue_jobs", "Runs and trials that wait for their scheduler, and that run.", jobs),
    ):
        family = GaugeMetricFamily(name, text, labels=["backend", "state"])
        for labels, count in sorted(counted.items()):
            family.add_metric(labels, count)
        yield family
    text = "Whether a scheduler that has jobs answered the last look."
    family = GaugeMetricFamily("llmops_scheduler_up", text, labels=["backend"])
    for place, answers in sorted(up.items()):
        family.add_metric([place], float(answers))
    yield family


# Name, help, and the value in a run's object, None where there is none.
_VALUES: tuple[tuple[str, str, Callable[[Mapping[str, Any], float], float | None]], ...] = (
    ("step", "Last step that counts.", lambda run, _: run["step"]),
    ("max_steps", "Step at which the run is finished.", lambda run, _: run["max_steps"]),
    ("loss", "Training loss of the last step.", lambda run, _: run["loss"]),
    ("goodput_ratio", "Share of the run's time that is training which counts.", lambda run, _: run.get("goodput")),
    ("mfu_ratio", "Share of the devices' peak FLOP/s that is used.", lambda run, _: run.get("mfu")),
    ("tokens_per_second", "Tokens a second at present.", lambda run, _: run.get("tokens_per_s")),
    (
        "stalled_seconds",
        "Seconds without a sign of life, of a run that is stalled.",
        lambda run, _: run.get("stalled_s"),
    ),
    ("eta_seconds", "Seconds to the last step at the present speed.", lambda run, _: run.get("eta_s")),
    ("created_timestamp_seconds", "When the run was submitted.", lambda run, _: run["created"]),
    (
        "last_commit_timestamp_seconds",
        "When the newest checkpoint was committed.",
        lambda run, _: (run.get("last_commit") or {}).get("time"),
    ),
    (
        "uncommitted_seconds",
        "Seconds since the newest commit, or since the attempt began, of a built-in trainer that runs.",
        lambda run, now: uncommitted_s(run, now),
    ),
)


def uncommitted_s(run: Mapping[str, Any], now: float) -> float | None:
    """How much would be lost now. None for a run that does not run, and for programs, of whose state nobody knows."""
    attempts = run["attempts"]
    if run["state"] != "running" or run.get("kind") != "llm" or not attempts:
        return None
    committed = (run.get("last_commit") or {}).get("time") or 0.0
    return float(max(now - max(committed, attempts[-1]["started"]), 0.0))


def _scores(shown: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    text = "Newest score of a run's checkpoints in a task."
    score = GaugeMetricFamily("llmops_run_score", text, labels=["run_id", "task", "metric"])
    step = GaugeMetricFamily("llmops_run_score_step", "Step of that score.", labels=["run_id", "task", "metric"])
    for run in shown:
        for each in run.get("scores", ()):
            if each["value"] is not None:
                labels = [run["id"], each["task"], each["metric"]]
                score.add_metric(labels, each["value"])
                step.add_metric(labels, each["step"])
    yield from (score, step)


def _of_runs(shown: Sequence[Mapping[str, Any]], now: float) -> Iterator[Metric]:
    labels = ["run_id", "run", "owner", "backend", "kind"]
    info = GaugeMetricFamily("llmops_run_info", "What a run is: 1, for its labels.", labels=labels)
    state = GaugeMetricFamily("llmops_run_state", "1 for the state that a run is in.", labels=["run_id", "state"])
    attempts = CounterMetricFamily(
        "llmops_run_attempts", "Attempts that have ended, by reason.", labels=["run_id", "reason"]
    )
    for run in shown:
        kind = run.get("kind")
        info.add_metric([run["id"], run["name"], run["owner"] or "", run["backend"] or "none", kind or ""], 1)
        state.add_metric([run["id"], run["state"]], 1)
        ended = Counter(each["reason"] for each in run["attempts"] if each["reason"])
        for reason in REASONS:  # also those that are 0: a first failure must show as an increase
            attempts.add_metric([run["id"], reason], ended[reason])
    yield from (info, state, attempts)
    for name, text, value in _VALUES:
        family = GaugeMetricFamily(f"llmops_run_{name}", text, labels=["run_id"])
        for run in shown:
            if (number := value(run, now)) is not None:
                family.add_metric([run["id"]], number)
        yield family


def served(seen: Callable[[], Seen[Look]]) -> bytes:
    """The text for a scrape of this moment."""
    return text(seen(), time.time())
