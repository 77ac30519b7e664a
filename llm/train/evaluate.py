"""What a training says of itself beside its losses: the held-out loss, and a few lines of its own at the end."""

from __future__ import annotations

import contextlib

import torch

from llm.data.source import Text
from llm.data.streaming import held_out_batches
from llm.data.tokenizer import load_tokenizer
from llm.inference.generate import generate
from llm.train.control import Control
from llm.train.step import Passes
from llm.utils.config import TrainingConfig


def held_out_loss(config: TrainingConfig, passes: Passes, text: Text, control: Control) -> float | None:
    """Mean loss per token of the held-out text, 0 where there is none. None where a stop request cut it short.

    All ranks call it together and get the same.
    """
    layout, world = passes.layout, passes.layout.world
    total = torch.zeros(3, dtype=torch.float64, device=world.device)
    for rows in held_out_batches(
        text.held_out,
        config.train.seq_len,
        config.train.global_batch_size,
        config.eval.batches,
        layout.dp_rank,
        layout.dp,
    ):
        control.heartbeat("evaluate")
        loss = passes.evaluate(rows)[1]
        mine = [passes.tokens(rows), float(control.stop_requested())]
        total += world.sum(torch.cat((loss.double().view(1), torch.tensor(mine, device=world.device))))
        if total[2]:
            return None
    return float(total[0] / total[1]) if total[1] else 0.0


def samples(config: TrainingConfig, passes: Passes) -> str | None:
    """Continuations of ``eval.sample_prompts``, the same on every rank; None where there is nothing to write.

    Where the model is spread so that it cannot write, the text says so.
    """
    wanted = config.eval
    if not wanted.sample_prompts or not wanted.sample_tokens:
        return None
    if not passes.can_generate:
        return "no samples: under pipeline or context parallelism use python -m llm.inference.generate\n"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        texts = generate(
            passes.logits,
            load_tokenizer(config.data.tokenizer),
            wanted.sample_prompts,
            wanted.sample_tokens,
            wanted.temperature,
            config.model.max_seq_len,
            torch.Generator().manual_seed(config.train.seed),
            passes.device,
        )
    return "\n\n".join(texts) + "\n"
