"""From logits to the next token, for rows of a batch that may each ask for something else.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_ALTERNATIVES = 20


@dataclass(frozen=True)
class Sampling:
    """How one text is continued. Raises ValueError, in one line that names the setting, for what cannot be.

    In this order: the penalties, temperature, ``top_k``, ``top_p``, ``min_p``. ``repetition_penalty`` (Keskar et al.,
    "CTRL", 2019) counts tokens of the prompt, too; ``presence_penalty`` and ``frequency_penalty``, subtracted once and
    per occurrence, count the generated ones alone.
    """

    max_tokens: int = 256
    temperature: float = 0.0  # 0 = always the likeliest token
    top_k: int = 0  # only the so many likeliest; 0 = all
    top_p: float = 1.0  # only the likeliest that together have this probability (Holtzman et al., 2020)
    min_p: float = 0.0  # only those at least this share of the likeliest one's probability (Nguyen et al., 2024)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()  # texts that end it, and are left out
    stop_tokens: tuple[int, ...] = ()  # the same for tokens, besides the tokenizer's own end
    ignore_end: bool = False  # go on after the tokenizer's end
    seed: int | None = None  # None = another one each time
    logprobs: int | None = None  # how many alternatives are told at each place; None = no log-probabilities

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": (self.max_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature <= 100, "between 0 and 100"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "above 0, at most 100"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "between -2 and 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            "stop": (all(self.stop), "texts that are not empty"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= MAX_ALTERNATIVES, f"0 to {MAX_ALTERNATIVES}"),
        }
        for name, (good, wanted) in checks.items():
            if not good:  # also for NaN, which compares with nothing
                raise ValueError(f"{name}={getattr(self, name)!r}: {wanted}")

    @property
    def plain(self) -> bool:
        """Is it always the likeliest token, and nothing else?"""
        return self.temperature == 0 and not self.penalised

    @property
    def penalised(self) -> bool:
        """Does what is there already change the logits?"""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass
class Row:
    """A text that is being continued: its settings, its tokens so far, and its own random numbers.

    The numbers are a row's own, so that what else is in the batch does not change its text.
    """

    sampling: Sampling
    prompt: Sequence[int]
    generated: list[int] = field(default_factory=list)
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)  # noqa: S311 - nothing secret


@dataclass(frozen=True)
class Chosen:
    """A token, with log-probabilities where they are wanted: its own, and those of the likeliest, by token."""

    token: int
    logprob: float | None = None
    top: dict[int, float] | None = None


def choose(logits: Tensor, rows: Sequence[Row], vocabulary: int) -> list[Chosen]:
    """The next token of each row from logits (B, V or more). Tokens from ``vocabulary`` on are never taken: no text
    has them. Log-probabilities are those of the model, before anything is done to them."""
    logits = logits[:, :vocabulary].float()
    if all(row.sampling.plain for row in rows):
        tokens = logits.argmax(-1)
    else:
        tokens = pick(probabilities(logits, rows), [row.random.random() for row in rows])
    return tell(logits, tokens.tolist(), rows)


def tell(logits: Tensor, tokens: Sequence[int], rows: Sequence[Row]) -> list[Chosen]:
    """These tokens of rows with these logits (B, V), with the log-probabilities that each row wants."""
    wanted = [row.sampling.logprobs for row in rows]
    if all(each is None for each in wanted):
        return [Chosen(token) for token in tokens]
    told = logits.float().log_softmax(-1)  # (B, V)
    values, indices = (each.tolist() for each in told.topk(min(max(n or 0 for n in wanted), told.shape[1])))
    return [
        Chosen(token, float(told[at, token]), dict(zip(indices[at][:n], values[at][:n], strict=True)))
        if (n := wanted[at]) is not None
        else Chosen(token)
        for at, token in enumerate(tokens)
    ]


def probabilities(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """What each row's next token is drawn from, (B, V) in float32; 1 for one token where the temperature is 0."""
    device = logits.device
    logits = penalise(logits, rows)
    settings = [row.sampling for row in rows]
    greedy = torch.tensor([each.temperature == 0 for each in settings], device=device)[:, None]
    heat = torch.tensor([each.temperature or 1.0 for each in settings], device=device)[:, None]
    # The largest is taken off first: a tiny temperature would make infinities of it.
    logits = (logits - logits.amax(-1, keepdim=True)) / heat
    if any(each.top_k or each.top_p < 1 or each.min_p for each in settings):
        logits = _cut(logits, settings)
    likeliest = torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy, likeliest, logits.softmax(-1))


def pick(probabilities: Tensor, draws: Sequence[float]) -> Tensor:
    """One token (B) of each row's ``probabilities`` (B, V), by a number in [0, 1) for each."""
    total = probabilities.double().cumsum(-1)  # in float32 the last of a large vocabulary would be lost
    wanted = torch.tensor(draws, dtype=torch.float64, device=total.device)[:, None] * total[:, -1:]
    return torch.searchsorted(total, wanted, right=True)[:, 0].clamp_(max=total.shape[1] - 1)


def penalise(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits (B, V) with the penalties of rows that have some."""
    if not any(row.sampling.penalised for row in rows):
        return logits
    logits = logits.clone()
    for values, row in zip(logits, rows, strict=True):
        own = row.sampling
        if own.repetition_penalty != 1:
            seen = torch.tensor(sorted({*row.prompt, *row.generated}), device=logits.device)
            seen = seen[seen < values.numel()]
            found = values[seen]
            values[seen] = torch.where(found > 0, found / own.repetition_penalty, found * own.repetition_penalty)
        if row.generated and (own.presence_penalty or own.frequency_penalty):
            counts = torch.bincount(torch.tensor(row.generated, device=logits.device), minlength=values.numel())
            values -= own.presence_penalty * (counts > 0) + own.frequency_penalty * counts
    return logits


def _cut(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Minus infinity for tokens that ``top_k``, ``top_p`` or ``min_p`` leave out; ties are broken by their order."""
    device, size = logits.device, logits.shape[1]
    top_k = torch.tensor([each.top_k or size for each in settings], device=device)[:, None]
    top_p = torch.tensor([each.top_p for each in settings], device=device)[:, None]
    min_p = torch.tensor([each.min_p for each in settings], device=device)[:, None]
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    kept = torch.arange(size, device=device) < top_k
    share = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
    kept &= share.cumsum(-1) - share < top_p  # those before it do not suffice yet
    kept &= share >= min_p * share[:, :1]
    kept[:, 0] = True
    return torch.full_like(logits, -torch.inf).scatter(1, order, ordered.masked_fill(~kept, -torch.inf))
