"""``python -m llm.tools.bench_throughput [--vary KEY=A,B] OVERRIDES``: how fast a config trains on these devices.

Steps of the trainer's own on made-up tokens, without data and checkpoints. On several ranks start it as the training
would be: by ``torchrun``, or as the command of a run (``llmops submit command=...``). Overrides are those of
``llmops submit``: ``model=1b dist=fsdp train.compile=true``. Each combination of ``--vary`` is a row of the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from llm.utils.config import ConfigError, TrainingConfig, check


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit code: 2 for a config that cannot work, 1 where nothing could be measured."""
    parser = argparse.ArgumentParser(prog="python -m llm.tools.bench_throughput", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for llmops submit")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=A,B", help="a row for each value")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="that are timed (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before them (default: 5)")
    parser.add_argument("--json", action="store_true", help="one line for each row")
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.steps < 1 or arguments.warmup < 0:
            raise ConfigError("--steps needs 1 or more, --warmup 0 or more")
        return bench(arguments.overrides, arguments.vary, arguments.warmup, arguments.steps, arguments.json)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def bench(overrides: list[str], vary: list[str], warmup: int, steps: int, as_json: bool) -> int:
    """Rows for every variant, as they are measured. One that does not fit into memory is a row too."""
    from llm.train.environment import rank_environment

    variants = list(combinations(vary))
    configs = [compose([*overrides, *variant]) for variant in variants]
    rank, size, local_rank = rank_environment()
    for config in configs:  # before anything slow
        check(config, size)

    import torch
    import torch.distributed as dist

    from llm.train.world import connect

    world = connect(configs[0].dist, rank, size, local_rank)
    rows = []
    try:
        if rank == 0 and not as_json:
            print(setting(world))
            print(HEADER)
        for variant, config in zip(variants, configs, strict=True):
            name = " ".join(variant) or config.model.name
            try:
                rows.append({"variant": name, **measure(config, world, warmup, steps)})
            except torch.OutOfMemoryError:
                if size > 1:
                    raise  # the others wait in a collective
                rows.append({"variant": name, "error": "out of memory"})
            if rank == 0:
                print(json.dumps(rows[-1]) if as_json else line(rows[-1]), flush=True)
    finally:
        if world.grouped:
            dist.destroy_process_group()
    return 0 if any("error" not in row for row in rows) else 1


def combinations(vary: list[str]) -> Iterator[tuple[str, ...]]:
    """Overrides of every variant: ``["a=1,2", "b=3"]`` gives (a=1, b=3) and (a=2, b=3). Raises ConfigError."""
    choices = []
    for text in vary:
        key, equals, values = text.partition("=")
        if not key or not equals or not values:
            raise ConfigError(f"--vary {text}: give KEY=A,B")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return itertools.product(*choices)


def compose(overrides: list[str]) -> TrainingConfig:
    """The trainer's part of the launcher's configuration. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    from llm.train.hydra_main import conf_dir, training_config

    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return training_config(hydra_compose("config", overrides=overrides))
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error


def measure(config: TrainingConfig, world: Any, warmup: int, steps: int) -> dict[str, Any]:
    """Tokens per second of all ranks, the median step and its spread (10th to 90th percentile), MFU, memory, parts."""
    import torch

    from llm.tools.bench_step import BenchStep
    from llm.train.attempt import prepare
    from llm.train.dist import lay_out
    from llm.train.throughput import Throughput, gpu_memory

    prepare(config)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    layout = lay_out(config.dist, world)
    step = BenchStep(config, layout)
    generator = torch.Generator().manual_seed(layout.dp_rank)
    batches = [step.rows(generator) for _ in range(4)]
    began = time.perf_counter()
    for number in range(warmup):
        step(batches[number % 4])
        step.phases.take(number)
    settle(world)
    warmup_s = time.perf_counter() - began
    taken, parts = [], []
    for number in range(steps):
        began = time.perf_counter()
        step(batches[number % 4])
        settle(world)
        taken.append(time.perf_counter() - began)
        parts.append(step.phases.take(number))
    tokens = config.train.global_batch_size * config.train.seq_len
    middle = statistics.median(taken)
    tenths = statistics.quantiles(taken, n=10, method="inclusive") if steps > 1 else [middle]
    memory = gpu_memory(world.device)
    return {
        "tokens_per_s": tokens / middle,
        "step_s": middle,
        "step_s_p10": tenths[0],
        "step_s_p90": tenths[-1],
        "mfu": Throughput(config.model, config.train, world.size, world.device, config.lora).mfu(tokens / middle),
        "gpu_bytes": None if memory is None else memory["peak"],
        "parts": {
            name: statistics.median(values)
            for name in ("forward_s", "backward_s", "optimizer_s")
            if (values := [each[name] for each in parts if name in each])
        },
        "warmup_s": warmup_s,
        "ranks": world.size,
        "layout": layout.sizes(),
        "torch": str(torch.__version__),
    }


def settle(world: Any) -> None:
    """Wait until the step is over on this rank's GPU; its reduction has seen to the other ranks."""
    if world.device.type == "cuda":
        import torch

        torch.cuda.synchronize(world.device)


HEADER = f"{'tokens/s':>10} {'step ms':>9} {'p10-p90':>17} {'MFU':>6} {'GPU GB':>7} {'fwd/bwd/opt ms':>19}  variant"


def setting(world: Any) -> str:
    """One line: on what, and with what, it is measured."""
    import torch

    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{world.size} x {device}, torch {torch.__version__}, Python {platform.python_version()}"


def line(row: dict[str, Any]) -> str:
    """A row of the table. What is not known is n/a."""
    if "error" in row:
        return f"{row['error']:>73}  {row['variant']}"
    spread = f"{row['step_s_p10'] * 1e3:.1f}-{row['step_s_p90'] * 1e3:.1f}"
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    memory = "n/a" if row["gpu_bytes"] is None else f"{row['gpu_bytes'] / 1e9:.1f}"
    parts = "/".join(f"{seconds * 1e3:.0f}" for seconds in row["parts"].values())
    return (
        f"{row['tokens_per_s']:>10,.0f} {row['step_s'] * 1e3:>9.1f} {spread:>17} {mfu:>6} {memory:>7} {parts:>19}"
        f"  {row['variant']}"
    )


if __name__ == "__main__":
    sys.exit(main())
