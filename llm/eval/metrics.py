"""What evaluations are told in: perplexity, accuracy, exact match, pass@k. Free of torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens that are fed to a model together, of which the last ``scored`` predictions count."""

    inputs: list[int]  # one before each target
    targets: list[int]
    scored: int


def windows(tokens: Sequence[int], prefix: int, length: int, stride: int | None = None) -> Iterator[Window]:
    """Every token of a text once, each seen after as many before it as the windows of ``length`` tokens let it.

    The first token follows ``prefix``. Windows move by ``stride`` tokens: a small one costs more passes, and gives each
    token at least ``length - stride`` before it; None is ``length``, which is what the harness does. Raises ValueError
    for a stride above ``length``.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"a stride of {stride} with windows of {length} tokens would leave tokens out")
    everything = [prefix, *tokens]
    done = 0
    while done < len(tokens):
        # The first window has nothing before it to look at, and scores all that it holds.
        end = min(done + (length if done == 0 else stride), len(tokens))
        begin = max(end - length, 0)
        yield Window(list(everything[begin:end]), list(tokens[begin:end]), end - done)
        done = end


@dataclass(frozen=True)
class Perplexity:
    """Of one text or more: the sum of log-probabilities (natural), and what it is spread over."""

    logprob: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0

    @classmethod
    def of(cls, text: str, logprob: float, tokens: int) -> Perplexity:
        """Of one text. Bytes are those of UTF-8; words are what blanks part, as the harness counts them."""
        return cls(logprob, tokens, len(text.encode()), len(re.split(r"\s+", text)))

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(
            self.logprob + other.logprob,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.words + other.words,
        )

    @property
    def per_token(self) -> float:
        """How many tokens the model hesitates between; depends on the tokenizer."""
        return _exp(self.logprob, self.tokens)

    @property
    def per_byte(self) -> float:
        """The same for bytes; can be compared between tokenizers."""
        return _exp(self.logprob, self.bytes)

    @property
    def per_word(self) -> float:
        """The same for words."""
        return _exp(self.logprob, self.words)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the text would take, compressed by the model, for each of its bytes."""
        return -self.logprob / self.bytes / math.log(2) if self.bytes else math.nan


def _exp(logprob: float, count: int) -> float:
    """exp(-logprob / count): NaN where there is nothing, infinite where a float cannot hold it."""
    if not count:
        return math.nan
    try:
        return math.exp(-logprob / count)
    except OverflowError:
        return math.inf


def accuracy(right: Sequence[bool]) -> float:
    """Share that is right; NaN of nothing."""
    return sum(right) / len(right) if right else math.nan


def exact_match(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of answers that are the wanted text, blanks at both ends aside."""
    return accuracy([answer.strip() == each.strip() for answer, each in zip(answers, wanted, strict=True)])


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that of ``k`` samples at least one is correct, when ``correct`` of ``samples`` were: unbiased.

    1 - C(n - c, k) / C(n, k), as a product that does not overflow (Chen et al., "Evaluating Large Language Models
    Trained on Code", 2021). Raises ValueError for a k above n, or counts that cannot be.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples: k must be 1 to the number of samples")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(samples - correct + 1, samples + 1))
