"""Plain PyTorch that can be preempted: on one process, under DistributedDataParallel, or under torchrun.

python ddp.py [--steps N] [--every N] [--loaders N]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from llmops import preempt

BATCH = 32  # rows of a step, on all ranks together
RUN = Path(os.environ.get("LLMOPS_RUN_URL", "run"))  # the same folder in every attempt, and on every node


def agreed(stop: bool) -> bool:
    """Whether any rank has been asked to stop: all ranks must leave after the same step."""
    flag = torch.tensor(float(stop))
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def save(path: Path, **state: object) -> None:
    """All ranks hold the same state: rank 0 writes it, aside, so that a file that exists is whole."""
    if int(os.environ.get("RANK", "0")) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    if dist.is_initialized():
        dist.barrier()


def main(steps: int, every: int, loaders: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    inputs = torch.randn(64 * BATCH, 8, dtype=torch.float64)
    rows = TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    done = 0
    if start := preempt.resume_from():
        saved = torch.load(start.path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = start.step
    # The rows of a step depend on its number alone: nothing else has to be saved of the data's order.
    batches = [[step * BATCH % len(rows) + row for row in range(rank, BATCH, size)] for step in range(done, steps)]
    ranked = DistributedDataParallel(model) if dist.is_initialized() else model
    loss = torch.zeros(())
    # PyTorch would let the loading processes die of a SIGTERM, which some clusters send to all.
    data = DataLoader(rows, batch_sampler=batches, num_workers=loaders, worker_init_fn=preempt.outlive_signals)
    for step, (x, y) in enumerate(data, done + 1):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(ranked(x), y)
        loss.backward()
        optimizer.step()
        preempt.beat(step)
        stop = agreed(preempt.should_stop())
        if stop or step % every == 0:
            path = RUN / "ddp" / f"{step:08d}.pt"
            save(path, model=model.state_dict(), optimizer=optimizer.state_dict())
            preempt.committed(step, str(path))
        if stop and step < steps:
            preempt.exit_stopped()
    if rank == 0:
        print(f"done at {steps}: {sum(weight.abs().sum().item() for weight in model.parameters()):.15f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20, help="steps between two saves")
    parser.add_argument("--loaders", type=int, default=0, help="processes that load data, a rank")
    main(**vars(parser.parse_args()))
