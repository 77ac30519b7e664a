"""Speculative decoding: a small model guesses some tokens ahead, and the large one checks them all in one forward.

The text has the distribution of the large model alone, and at temperature 0 its tokens (Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", 2023, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.data.tokenizer import Tokenizer
from llm.inference.generate import Completion, Text, room
from llm.inference.rows import CachedRows
from llm.inference.sampling import Row, Sampling, choose, pick, probabilities, tell


@dataclass
class Guesses:
    """How many tokens the draft model has guessed, and how many of them were taken."""

    made: int = 0
    taken: int = 0


def speculate(
    rows: CachedRows,
    draft: CachedRows,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    ahead: int = 4,
    limit: int | None = None,
    guesses: Guesses | None = None,
) -> Completion:
    """Continue one prompt with the model of ``rows``, which checks ``ahead`` guesses of the ``draft``'s at a time.

    Both models must have the same tokenizer. The rest is as in :func:`llm.inference.generate.generate`. Texts of a
    batch would each have another number of guesses right, so they are continued one by one.
    """
    guesses = Guesses() if guesses is None else guesses
    allowed = room(0, prompt, sampling, limit)
    text = Text(Row(sampling, prompt), tokenizer)
    if not allowed:
        return text.completion
    size = tokenizer.vocab_size
    logits = rows.start([prompt], allowed + ahead)[:, :size]
    draft.start([prompt], allowed + ahead)
    text.add(choose(logits, [text.row], size)[0], allowed)
    tokens = [*prompt, *text.row.generated]
    while not text.done:
        # The large model has seen all tokens but the last one, the draft no more than that.
        guessed, chances = _guess(draft, text.row, tokens, min(ahead, allowed - len(text.row.generated) - 1), size)
        logits = _extend(rows, [*tokens, *guessed])[:, :size]  # (guesses + 1, V)
        taken = _take(text, guessed, chances, logits, allowed)
        guesses.made, guesses.taken = guesses.made + len(guessed), guesses.taken + taken
        tokens = [*prompt, *text.row.generated]
        for each in (rows, draft):
            each.forget(max(each.length - len(tokens) + 1, 0))
    return text.completion


def _guess(draft: CachedRows, row: Row, tokens: list[int], count: int, size: int) -> tuple[list[int], list[Tensor]]:
    """Tokens that the draft goes on with, and the distribution (V) that each was drawn from."""
    guessed: list[int] = []
    chances = []
    for _ in range(count):
        logits = _extend(draft, [*tokens, *guessed])[-1:, :size]
        chance = _distribution(logits, row, guessed)
        guessed.append(int(pick(chance[None], [row.random.random()])[0]))
        chances.append(chance)
    return guessed, chances


def _take(text: Text, guessed: list[int], chances: list[Tensor], logits: Tensor, allowed: int) -> int:
    """Add the guesses up to the first wrong one, and one token of the large model's own. How many were taken.

    A guess x stays with probability p(x) / q(x), where p is the large model's and q what it was drawn from; else the
    token is drawn from what p has more than q.
    """
    row = text.row
    for at, own in enumerate(logits):
        target = _distribution(own[None], row, [])
        if at < len(guessed):
            guess, chance = guessed[at], chances[at]
            if row.random.random() * chance[guess] < target[guess]:
                text.add(tell(own[None], [guess], [row])[0], allowed)
                if text.done:
                    return at + 1
                continue
            rest = (target - chance).clamp(min=0)
            target = rest if rest.sum() > 0 else target
        token = int(pick(target[None], [row.random.random()])[0])
        text.add(tell(own[None], [token], [row])[0], allowed)
        return at
    raise AssertionError("there are more logits than guesses")


def _extend(rows: CachedRows, tokens: Sequence[int]) -> Tensor:
    """Logits (N, V) after each of the ``tokens`` that the rows have not seen yet."""
    return rows.extend(torch.tensor([tokens[rows.length :]], device=rows.device))


def _distribution(logits: Tensor, row: Row, more: Sequence[int]) -> Tensor:
    """What is drawn from, (V), after ``more`` tokens that are not the row's yet."""
    there = Row(row.sampling, row.prompt, [*row.generated, *more]) if row.sampling.penalised else row
    return probabilities(logits.float(), [there])[0]
