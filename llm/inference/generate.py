"""Sampling text from a model: ``python -m llm.inference.generate --run-url RUN --prompt TEXT``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm.data.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    logits_of: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    prompts: list[str],
    new_tokens: int,
    temperature: float,
    max_seq_len: int,
    generator: torch.Generator,
    device: torch.device,
) -> list[str]:
    """Continue each prompt by ``new_tokens`` tokens; ``temperature`` 0 always takes the likeliest.

    All prompts run in one batch, padded on the right: causal attention never looks there. Under FSDP every rank calls
    this with the same arguments and gets the same text. Of a text longer than ``max_seq_len`` the model sees the end.
    """
    texts = [tokenizer.encode(prompt) or [0] for prompt in prompts]  # an empty prompt starts from token 0
    for _ in range(new_tokens):
        seen = [text[-max_seq_len:] for text in texts]
        width = max(len(text) for text in seen)
        rows = torch.tensor([text + [0] * (width - len(text)) for text in seen], device=device)  # (B, T)
        last = torch.tensor([len(text) - 1 for text in seen], device=device)
        logits = logits_of(rows)[torch.arange(len(seen), device=device), last].float().cpu()  # (B, V)
        for text, row in zip(texts, logits, strict=True):
            text.append(pick(row[: tokenizer.vocab_size], temperature, generator))
    return [tokenizer.decode(text) for text in texts]


def pick(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One token id from logits (V)."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
