"""What a training says of itself beside its losses: the held-out loss, and a few lines of its own at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm.data.streaming import Stream
from llm.data.tokenizer import Tokenizer
from llm.inference.generate import generate, prompt_tokens
from llm.inference.rows import RecomputedRows
from llm.inference.sampling import Sampling
from llm.train.control import Control
from llm.train.step import Passes
from llm.utils.config import TrainingConfig


@dataclass(frozen=True)
class HeldOut:
    """Mean losses per token: of everything, None where nothing is held out, and of each source that holds some out."""

    loss: float | None
    sources: dict[str, float]


def held_out_loss(config: TrainingConfig, passes: Passes, stream: Stream, control: Control) -> HeldOut | None:
    """The loss of what no source trains on. None where a stop request cut it short.

    All ranks call it together and get the same.
    """
    world = passes.layout.world
    totals: dict[str, Tensor] = {}
    for name, rows in stream.held_out(config.train.global_batch_size, config.eval.batches):
        control.heartbeat("evaluate")
        loss = passes.evaluate(rows)[1]
        mine = [passes.tokens(rows), float(control.stop_requested())]
        found = world.sum(torch.cat((loss.double().view(1), torch.tensor(mine, device=world.device))))
        totals[name] = totals[name] + found if name in totals else found
        if found[2]:
            return None
    sources = {name: float(each[0] / each[1]) for name, each in totals.items() if each[1]}
    if not sources:
        return HeldOut(None, {})
    everything = torch.stack(list(totals.values())).sum(0)
    return HeldOut(float(everything[0] / everything[1]), sources)


def samples(config: TrainingConfig, passes: Passes, tokenizer: Tokenizer) -> str | None:
    """Continuations of ``eval.sample_prompts``, the same on every rank; None where there is nothing to write.

    Where the model is spread so that it cannot write, the text says so.
    """
    wanted = config.eval
    if not wanted.sample_prompts or not wanted.sample_tokens:
        return None
    if not passes.can_generate:
        return "no samples: under pipeline or context parallelism use python -m llm.inference.generate\n"
    prompts = [prompt_tokens(tokenizer, prompt) for prompt in wanted.sample_prompts]
    rows = RecomputedRows(passes.logits, config.model.max_seq_len, passes.device)
    sampling = Sampling(max_tokens=wanted.sample_tokens, temperature=wanted.temperature, seed=config.train.seed)
    texts = generate(rows, tokenizer, prompts, sampling)
    return "\n\n".join(p + each.text for p, each in zip(wanted.sample_prompts, texts, strict=True)) + "\n"
