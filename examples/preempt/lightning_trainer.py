"""Lightning that can be preempted: one callback, and where to resume from.

python lightning_trainer.py [--steps N] [--every N]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader, IterableDataset

from llmops import preempt

RUN = os.environ.get("LLMOPS_RUN_URL", "run")  # the same folder in every attempt, and on every node


class Preempt(pl.Callback):
    """Saves every few steps and when the job is asked to stop, and tells of every checkpoint."""

    def __init__(self, every: int) -> None:
        self.every, self.stopped = every, False

    def on_train_start(self, *_: Any) -> None:
        preempt.outlive_signals()  # Lightning answers SIGTERM by leaving in the middle of an epoch, without a save

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        preempt.beat(step)
        # All ranks stop after the same step.
        stop = trainer.strategy.reduce_boolean_decision(preempt.should_stop(), all=False)
        if stop or step % self.every == 0:
            path = f"{RUN}/lightning/{step:08d}.ckpt"
            trainer.save_checkpoint(path)  # ends with a barrier
            preempt.committed(step, path)
        if stop:
            self.stopped = trainer.should_stop = True


class Batches(IterableDataset):  # type: ignore[type-arg]
    """The batch of a step depends on its number and the rank alone, so that no batch comes twice after a stop."""

    def __init__(self, first: int, rank: int) -> None:
        self.first, self.rank = first, rank

    def __iter__(self) -> Iterator[torch.Tensor]:
        for step in count(self.first):
            yield torch.randn(8, 4, generator=torch.Generator().manual_seed(step * 1000 + self.rank))


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch), batch.sin().sum(1, keepdim=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main(steps: int, every: int) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(1)
    model, callback = Model(), Preempt(every)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("LLMOPS_NNODES", "1")),
        plugins=[LightningEnvironment()],  # the ranks are started already; Lightning's own SLURM support would requeue
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    start = preempt.resume_from()
    batches = DataLoader(Batches(start.step if start else 0, trainer.global_rank), batch_size=None)
    trainer.fit(model, batches, ckpt_path=start.path if start else None, weights_only=True)
    if callback.stopped and trainer.global_step < steps:
        preempt.exit_stopped()
    if trainer.is_global_zero:
        print(f"done at {steps}: {sum(weight.abs().sum().item() for weight in model.parameters()):.15f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20, help="steps between two saves")
    main(**vars(parser.parse_args()))
