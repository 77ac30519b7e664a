"""How the time to shard a 7B model, to plan its checkpoint and to search layouts grows with the number of ranks.

    python benchmarks/planning.py [--rounds 3] [--ranks 64,256,1024]

The view of rank 0, on the meta device, among ranks that do not exist: no tensor has values, and nothing is exchanged.
What the other ranks hold is taken to be what rank 0 holds. Medians of rounds; one before them, of a smaller model, is
for the imports. ``search`` is the whole command.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import msgspec
import torch

from llm.checkpoint.image import Box, lay_out, owners
from llm.tools.profile_memory import made_up_ranks, sharded
from llm.train.checkpoint import LOCAL_FILE
from llm.train.optim import build
from llm.train.pieces import NAMES, local_pieces
from llm.utils.config import TrainingConfig
from llmops.config.compose import load_config

LAYOUTS = {"fsdp": ["dist=fsdp"], "hsdp": ["dist=hsdp"], "fsdp_tp": ["dist=fsdp_tp", "dist.tp=8"]}


def overrides(model: str, ranks: int, layout: str) -> list[str]:
    """As for ``llmops plan``."""
    copies = [f"dist.dp_replicate={ranks // 8}"] if layout == "hsdp" else []
    cluster = ["cluster=slurm", f"cluster.nodes={ranks // 8}", "cluster.ranks_per_node=8"]
    batch = ["train.global_batch_size=1024", "train.micro_batch_size=1", "train.dtype=bfloat16"]
    return [f"model={model}", "hardware=h100", *cluster, *batch, *LAYOUTS[layout], *copies]


def shard_and_plan(model: str, ranks: int, layout: str) -> tuple[float, float]:
    """Seconds to build and shard the model, and to plan a checkpoint of it and its optimizer's state."""
    config = msgspec.convert(load_config(overrides(model, ranks, layout)).data, TrainingConfig)
    with made_up_ranks(config, ranks, 0) as placed:
        began = time.perf_counter()
        parameters = sharded(config, placed)
        took = time.perf_counter() - began
        state = build(parameters, config.train, config.model).state()
        began = time.perf_counter()
        plan_checkpoint(state, ranks)
        return took, time.perf_counter() - began


def plan_checkpoint(state: dict[str, torch.Tensor], ranks: int) -> None:
    """As ``llm.train.checkpoint.Checkpointer.attach``: what is held here, who saves what of it, into which files."""
    pieces = local_pieces(state)
    boxes = [
        Box(
            name=piece.name,
            dtype=NAMES[piece.data.dtype],
            shape=piece.shape,
            offset=piece.offset,
            local_shape=list(piece.data.shape),
            placement=piece.placement,
        )
        for piece in pieces
    ]
    shared = [index for index, piece in enumerate(pieces) if piece.spread < ranks]
    alone = sorted(set(range(len(boxes))).difference(shared))
    held = [boxes[index] for index in shared]
    load = dict.fromkeys(range(ranks), sum(boxes[index].bytes for index in alone))
    saves = owners(((rank, held) for rank in range(ranks)), load)
    mine = sorted([*alone, *(shared[index] for index in saves.get(0, ()))])
    lay_out([boxes[index] for index in mine], 0, LOCAL_FILE)


def search(ranks: int) -> float:
    """Seconds of ``llmops plan --search``."""
    command = [sys.executable, "-m", "llmops", "plan", "--search", "--json", *overrides("7b", ranks, "fsdp")]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", default="64,256,1024")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for layout in LAYOUTS:
        shard_and_plan("1b", 16, layout)
    print(f"{'ranks':>6} {'layout':>8} {'shard s':>8} {'plan s':>8} {'search s':>9}")
    for ranks in map(int, arguments.ranks.split(",")):
        for layout in LAYOUTS:
            taken = [shard_and_plan("7b", ranks, layout) for _ in range(arguments.rounds)]
            shard, plan = (statistics.median(column) for column in zip(*taken, strict=True))
            found = statistics.median(search(ranks) for _ in range(arguments.rounds)) if layout == "fsdp" else None
            print(
                f"{ranks:>6} {layout:>8} {shard:>8.2f} {plan:>8.2f} {'' if found is None else f'{found:9.2f}'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
