"""Metrics of rank 0 for Prometheus, at ``/metrics`` of LLMOPS_METRICS_BIND (``ADDRESS:PORT``; 0 is a free port).

The training loop writes plain numbers, microseconds a step; they become text on the server's thread when somebody asks.
Counters start at 0 with each attempt, which is Prometheus' way. Without LLMOPS_METRICS_BIND and
LLMOPS_METRICS_PUSHGATEWAY nothing is opened, and nothing is imported. What goes wrong is a warning, never a failure.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from llm.train.control import Control

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from llm.utils.metrics_server import Server

BIND, PUSHGATEWAY = "LLMOPS_METRICS_BIND", "LLMOPS_METRICS_PUSHGATEWAY"
PUSH_EVERY_S = 15.0
PUSH_S = 4.0  # for one push
CLOSE_S = 5.0  # that the end of training waits for the last one, at most
STEP_S = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0)
SAVE_S = (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Counts of seconds by size."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Prometheus' cumulative buckets, and the sum."""
        counts = list(accumulate(list(self._counts)))
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        return [(name, float(count)) for name, count in zip(names, counts, strict=True)], self._sum


class Exporter:
    """The numbers, and the server and the pusher where they are wanted."""

    def __init__(self, control: Control, memory: Callable[[], dict[str, int] | None] = lambda: None) -> None:
        """``memory``: bytes of the GPU by kind, asked for at each scrape."""
        self._control, self._memory = control, memory
        self._gauges: dict[str, float] = {}  # absent until they are known
        self._counters = {"tokens": 0.0, "data_wait": 0.0, "bytes": 0.0, "stall": 0.0, "failures": 0.0}
        self._steps, self._saves = Histogram(STEP_S), Histogram(SAVE_S)
        self._over = threading.Event()
        self._server: Server | None = None
        self._pusher: threading.Thread | None = None

    # --- what the training loop tells ------------------------------------------------------------------------------

    def stepped(
        self,
        step: int,
        loss: float,
        norm: float,
        lr: float,
        tokens: int,
        seconds: float,
        data_s: float,
        mfu: float | None,
    ) -> None:
        """One update is done; ``tokens`` are those of the step, over all ranks."""
        gauges, counters = self._gauges, self._counters
        gauges["step"], gauges["loss"], gauges["grad_norm"], gauges["lr"] = step, loss, norm, lr
        gauges["tokens_per_s"] = tokens / seconds
        if mfu is not None:
            gauges["mfu"] = mfu
        counters["tokens"] += tokens
        counters["data_wait"] += data_s
        self._steps.observe(seconds)

    def evaluated(self, loss: float) -> None:
        """The held-out loss."""
        self._gauges["eval_loss"] = loss

    def committed(self, seconds: float, size: int) -> None:
        """A checkpoint counts from now on."""
        self._saves.observe(seconds)
        self._counters["bytes"] += size
        self._gauges["last_commit"] = time.time()

    def failed(self) -> None:
        """A checkpoint could not be saved."""
        self._counters["failures"] += 1

    def stalled(self, total_s: float) -> None:
        """For how long saves have held training up, since its start."""
        self._counters["stall"] = total_s

    # --- who asks --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Serve and push where the environment says so. Returns at once: the rest is a thread's work."""
        bind, gateway = os.environ.get(BIND), os.environ.get(PUSHGATEWAY)
        if bind:
            threading.Thread(target=self._serve, args=(bind,), daemon=True).start()
        if gateway:
            self._pusher = threading.Thread(target=self._push, args=(gateway,), daemon=True)
            self._pusher.start()

    def close(self) -> None:
        """Push for the last time. Takes :data:`CLOSE_S` seconds at most."""
        self._over.set()
        if self._pusher is not None:
            self._pusher.join(CLOSE_S)
            self._pusher = None

    def _registry(self) -> CollectorRegistry:
        from prometheus_client import CollectorRegistry

        registry = CollectorRegistry()
        registry.register(_Collector(self.collect))
        return registry

    def _serve(self, bind: str) -> None:
        try:
            from prometheus_client import generate_latest

            from llm.utils.metrics_server import TEXT, Server, parse_bind

            registry = self._registry()
            self._server = Server(*parse_bind(bind), {"/metrics": (TEXT, lambda: generate_latest(registry))})
            self._control.serving(self._server.server_port)
        except (OSError, ValueError, ImportError) as error:
            print(f"warning: no metrics are served at {BIND}={bind}: {error}", file=sys.stderr, flush=True)

    def _push(self, gateway: str) -> None:
        told = False
        over = False
        while not over:
            over = self._over.wait(PUSH_EVERY_S)
            try:
                from prometheus_client import push_to_gateway

                key = {"run_id": os.environ.get("LLMOPS_RUN_ID", ""), "kind": "train"}
                push_to_gateway(gateway, job="llmops", registry=self._registry(), grouping_key=key, timeout=PUSH_S)
            except (OSError, ValueError, ImportError) as error:
                if not told:
                    print(f"warning: metrics cannot be pushed to {gateway}: {error}", file=sys.stderr, flush=True)
                told = True

    def collect(self) -> Iterator[Metric]:
        """All numbers that are known, as Prometheus' families."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        gauges, counters = dict(self._gauges), dict(self._counters)
        for key, name, text in _GAUGES:
            if key in gauges:
                yield GaugeMetricFamily(f"llmops_train_{name}", text, value=gauges[key])
        for key, name, text in _COUNTERS:
            yield CounterMetricFamily(f"llmops_train_{name}", text, value=counters[key])
        steps = HistogramMetricFamily("llmops_train_step_seconds", "Seconds that steps have taken.")
        steps.add_metric([], *self._steps.buckets())
        yield steps
        saves = HistogramMetricFamily("llmops_train_checkpoint_seconds", "Seconds from a save's begin to its commit.")
        saves.add_metric([], *self._saves.buckets())
        yield saves
        if (memory := self._memory()) is not None:
            text = "Memory of this rank's GPU: allocated to tensors, at its peak, and reserved."
            family = GaugeMetricFamily("llmops_train_gpu_memory_bytes", text, labels=["kind"])
            for kind, size in memory.items():
                family.add_metric([kind], size)
            yield family


_GAUGES = (
    ("step", "step", "Optimizer steps done."),
    ("loss", "loss", "Training loss of the last step."),
    ("grad_norm", "grad_norm", "Gradient norm of the last step, before clipping."),
    ("lr", "learning_rate", "Learning rate of the last step."),
    ("tokens_per_s", "tokens_per_second", "Tokens a second in the last step, over all ranks."),
    ("mfu", "mfu_ratio", "Share of the devices' peak FLOP/s that the last step has used."),
    ("eval_loss", "eval_loss", "Newest held-out loss."),
    ("last_commit", "checkpoint_last_commit_timestamp_seconds", "When this attempt last committed a checkpoint."),
)
_COUNTERS = (
    ("tokens", "tokens", "Tokens trained on in this attempt, over all ranks."),
    ("data_wait", "data_wait_seconds", "Seconds that rank 0 has waited for its next batch."),
    ("bytes", "checkpoint_bytes", "Bytes of the checkpoints that were committed."),
    ("stall", "checkpoint_stall_seconds", "Seconds in which saves have held training up."),
    ("failures", "checkpoint_failures", "Checkpoints that could not be saved."),
)


class _Collector:
    """What a registry wants: without ``describe``, it collects once to learn the names."""

    def __init__(self, collect: Callable[[], Iterator[Any]]) -> None:
        self.collect = collect
