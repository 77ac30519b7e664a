"""``llmops plan``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llm.estimate.layouts import Layout
    from llmops.plan import Plan

SHOWN = 10  # layouts
BAR = 24  # characters
KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "average": "moving average",
    "activations": "activations",
    "gathered": "gathered weights",
    "workspace": "workspace",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """What run, and how it is told."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for submit; hardware=h100 says on what")
    parser.add_argument("--config-dir", metavar="DIR", type=Path, help="a folder with config groups of your own")
    parser.add_argument("--backend", help="local, slurm or k8s: where the run would go")
    parser.add_argument("--search", action="store_true", help="also rank the layouts that fit, the fastest first")
    parser.add_argument("--like", metavar="RUN", help="what its saves cost and how often it was interrupted counts")
    parser.add_argument("--json", action="store_true", help="one object, on stdout alone")


def run(arguments: argparse.Namespace) -> int:
    """Show what a run will need; exit code 2 where it cannot fit."""
    from llmops import api, plan
    from llmops.config.compose import load_config

    overrides = api.all_overrides(arguments.overrides, arguments.backend, None, ())
    config = load_config(overrides, arguments.config_dir).config
    made = plan.make(config, None if arguments.like is None else api.find(arguments.like, config.runs_url))
    found = plan.layouts(config) if arguments.search else []
    if arguments.json:
        ranked = [
            {"overrides": each.overrides, "bytes": each.memory.total, "step_s": each.time.total} for each in found
        ]
        print(json.dumps({**made.record(), **({"layouts": ranked} if arguments.search else {})}, indent=1))
    else:
        from rich.console import Console

        console = Console()
        for part in (*page(made), *([ranking(found, made)] if arguments.search else [])):
            console.print(part)
    plan.check_fits(config)
    return 0


def page(made: Plan) -> list[RenderableType]:
    """The memory of a rank by kind, and what the run takes."""
    from rich.table import Table

    total = made.memory.total if made.hardware is None else max(made.hardware.usable_bytes, made.memory.total)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for kind, size in made.memory.kinds().items():
        if size:
            table.add_row(KINDS[kind], _bytes(size), bar(size, total))
    usable = "" if made.hardware is None else f"of {_bytes(made.hardware.usable_bytes)}"
    table.add_row("[bold]of a rank", f"[bold]{_bytes(made.memory.total)}", f"[bold]{usable}")
    ranks = f"{made.ranks} rank{'s' if made.ranks > 1 else ''}"
    lines = [
        f"{made.parameters:,} parameters on {ranks}, {made.flops_per_token / 1e9:,.2f} GFLOP per token",
        f"a checkpoint: {_bytes(made.checkpoint_bytes)}; {made.steps:,} steps, {made.tokens / 1e9:,.2f} billion tokens",
    ]
    if made.trained != made.parameters:
        lines.insert(1, f"of which none is trained: {made.trained:,} in adapters are")
    if made.time is not None and made.hardware is not None:
        most = sorted(made.time.parts().items(), key=lambda part: -part[1])[:3]
        spent = ", ".join(f"{name} {seconds / made.time.total:.0%}" for name, seconds in most)
        share = "" if made.mfu is None else f", MFU {made.mfu:.0%}"
        lines.append(f"estimated step on {made.hardware.name}: {made.time.total:.3g} s ({spent}){share}")
        lines.append(
            f"{(made.tokens_per_day or 0) / 1e9:,.2f} billion tokens a day, {made.device_hours:,.0f} device-hours"
        )
        if made.cost is not None:
            lines[-1] += f", cost {made.cost:,.0f}"
    else:
        lines.append("hardware=h100, or another of conf/hardware, adds time, and whether it fits")
    lines += saving_lines(made)
    return [table, *lines]


def saving_lines(made: Plan) -> list[str]:
    """How often to save, and what that rests on."""
    saving = made.saving
    return [
        f"least is lost with checkpoint.every_minutes={saving.every_s / 60:.3g}: {saving.lost:.2%} of the time",
        f"  a save stalls training {saving.stall_s:.3g} s, counts after {saving.save_s:.3g} s",
        f"    ({saving.cost_from})",
        f"  an interruption every {saving.between_s / 3600:,.{0 if saving.between_s > 36000 else 2}f} h",
        f"    ({saving.between_from})",
    ]


def ranking(found: list[Layout], made: Plan) -> RenderableType:
    """The fastest layouts."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=f"{len(found)} layouts fit", title_justify="left")
    for heading, justify in (("step", "right"), ("memory", "right"), ("set", "left")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for each in found[:SHOWN]:
        table.add_row(f"{each.time.total:.3g} s", _bytes(each.memory.total), each.overrides or "as it is")
    return table


def bar(size: float, total: float) -> str:
    """A share of ``total``."""
    return "█" * max(1, round(BAR * size / total)) if size else ""


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
