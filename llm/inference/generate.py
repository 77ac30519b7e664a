"""Text from a model: ``python -m llm.inference.generate --run-url RUN --prompt TEXT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from llm.checkpoint.format import CheckpointError
from llm.data.tokenizer import Tokenizer
from llm.inference.load import load_model, load_run_tokenizer
from llm.inference.rows import CachedRows, Rows
from llm.inference.sampling import Chosen, Row, Sampling, choose
from llm.inference.text import TextStream
from llm.train.environment import rank_environment
from llm.train.world import World, connect
from llm.utils.config import ConfigError, DistConfig, TrainingConfig, load


@dataclass
class Completion:
    """What was added to a prompt. ``tokens`` are all that were taken, a stop's or the end's included; ``text`` has
    neither. ``finish``: why it ended, ``length`` when no more were allowed or there was no room."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Literal["stop", "length"] = "length"
    chosen: list[Chosen] = field(default_factory=list)  # with log-probabilities, where they are wanted


def generate(
    rows: Rows,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling] | Sampling,
    limit: int | None = None,
    on_token: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Continue the tokens of each prompt, all in one batch, each as its sampling says.

    ``limit`` is the most positions that a row may have, prompt included. ``on_token`` is told the number of a row and
    how it stands after each of its tokens. Ranks that share a model call this with the same arguments, and seeds, and
    get the same. Raises ValueError for a prompt that is empty or leaves no room.
    """
    if isinstance(samplings, Sampling):
        samplings = [samplings] * len(prompts)
    if not prompts:
        return []
    allowed = [room(at, *each, limit) for at, each in enumerate(zip(prompts, samplings, strict=True))]
    texts = [Text(Row(each, prompt), tokenizer) for each, prompt in zip(samplings, prompts, strict=True)]
    open_ = [at for at, count in enumerate(allowed) if count]
    if not open_:
        return [text.completion for text in texts]
    logits = rows.start(prompts, max(allowed))
    while True:
        chosen = choose(logits[open_] if len(open_) < len(texts) else logits, [texts[at].row for at in open_],
                        tokenizer.vocab_size)  # fmt: skip
        for at, each in zip(open_, chosen, strict=True):
            texts[at].add(each, allowed[at])
            if on_token is not None:
                on_token(at, texts[at].completion)
        open_ = [at for at in open_ if not texts[at].done]
        if not open_:
            return [text.completion for text in texts]
        # Rows that are done get their last token again: what they compute is not looked at.
        logits = rows.add([text.row.generated[-1] if text.row.generated else 0 for text in texts])


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens of a prompt; an empty one starts as if a document had just ended."""
    return tokenizer.encode(prompt) or [tokenizer.end or 0]


def room(number: int, prompt: Sequence[int], sampling: Sampling, limit: int | None) -> int:
    """How many tokens may be added to a prompt. Raises ValueError, as :func:`generate`."""
    if not prompt:
        raise ValueError(f"prompt {number} has no tokens: there is nothing to go on from")
    if limit is not None and len(prompt) >= limit:
        raise ValueError(f"prompt {number} has {len(prompt)} tokens, and the model takes {limit} with what it adds")
    return sampling.max_tokens if limit is None else min(sampling.max_tokens, limit - len(prompt))


class Text:
    """One row's text: what its tokens make it, and whether it is done."""

    def __init__(self, row: Row, tokenizer: Tokenizer) -> None:
        self.row, self.completion, self.done = row, Completion(), False
        self.stream = TextStream(tokenizer, row.sampling.stop)
        self.ends = {*row.sampling.stop_tokens}
        if tokenizer.end is not None and not row.sampling.ignore_end:
            self.ends.add(tokenizer.end)

    def add(self, chosen: Chosen, allowed: int) -> None:
        """One more token, of ``allowed`` in all."""
        self.row.generated.append(chosen.token)
        completion = self.completion
        completion.tokens.append(chosen.token)
        if self.row.sampling.logprobs is not None:
            completion.chosen.append(chosen)
        ended = chosen.token in self.ends
        if not ended:
            self.stream.push(chosen.token)
        if ended or len(completion.tokens) == allowed:
            self.stream.finish()
            self.done = True
        if ended or self.stream.stopped is not None:
            completion.finish, self.done = "stop", True
        completion.text = self.stream.text


def main(argv: list[str] | None = None) -> int:
    """Print a continuation of each prompt; returns the exit code. Ranks that torchrun starts share the model."""
    options = _parser().parse_args(argv)
    try:
        world = connect(DistConfig(), *rank_environment())
        try:
            texts = _write(options, world)
        finally:
            if world.grouped:
                dist.destroy_process_group()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    if world.rank == 0:
        print("\n\n".join(texts))
    return 0


def _write(options: argparse.Namespace, world: World) -> list[str]:
    """The prompts with what follows them."""
    sampling = _sampling(options)
    config = _config(options.run_url, options.config)
    dtype = getattr(torch, options.dtype)
    model, commit = load_model(config, options.run_url, world.device, dtype, world=world)
    tokenizer = load_run_tokenizer(options.run_url, commit)
    prompts = [prompt_tokens(tokenizer, prompt) for prompt in options.prompt]
    rows = CachedRows(model, options.compile, world.size)
    limit = config.model.max_seq_len
    if world.rank == 0:
        print(f"step {commit.step}, {commit.path}", file=sys.stderr)
    if options.draft_run_url:
        done = _speculate(options, rows, tokenizer, prompts, sampling, limit)
    else:
        done = generate(rows, tokenizer, prompts, sampling, limit)
    return [prompt + each.text for prompt, each in zip(options.prompt, done, strict=True)]


def _speculate(
    options: argparse.Namespace,
    rows: CachedRows,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    sampling: Sampling,
    limit: int,
) -> list[Completion]:
    """With a small model's help, whole on every rank."""
    from llm.inference.speculate import Guesses, speculate

    url = options.draft_run_url
    config = _config(url, None)
    model, commit = load_model(config, url, rows.device, rows.dtype)
    if load_run_tokenizer(url, commit).sha256 != tokenizer.sha256:
        raise ConfigError(f"--draft-run-url {url}: it was trained with another tokenizer than {options.run_url}")
    draft = CachedRows(model, options.compile)
    limit = min(limit, config.model.max_seq_len)
    guesses = Guesses()
    done = [speculate(rows, draft, tokenizer, each, sampling, options.ahead, limit, guesses) for each in prompts]
    print(f"{guesses.taken} of {guesses.made} guesses were right", file=sys.stderr)
    return done


def _config(run_url: str, path: str | None) -> TrainingConfig:
    return load(path or f"{run_url.rstrip('/')}/config.yaml")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm.inference.generate", description="Let a trained model write.")
    parser.add_argument("--run-url", required=True, help="run directory: a path or an fsspec URL")
    parser.add_argument("--config", help="the run's config (default: config.yaml in the run directory)")
    parser.add_argument("--prompt", action="append", required=True, help="may be given more than once")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add to each prompt, at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="only the so many likeliest tokens; 0 = all")
    parser.add_argument("--top-p", type=float, default=1.0, help="only the likeliest with this probability together")
    parser.add_argument("--min-p", type=float, default=0.0, help="only those with this share of the likeliest one's")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: what is there is less likely")
    parser.add_argument("--stop", action="append", default=[], help="a text that ends it; may be given more than once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draft-run-url", metavar="RUN", help="run of a small model that guesses tokens ahead")
    parser.add_argument("--ahead", type=int, default=4, help="how many tokens it guesses at a time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and cache")
    parser.add_argument("--compile", action="store_true", help="compile the step: some seconds, then more tokens/s")
    return parser


def _sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(
        max_tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=tuple(options.stop),
        seed=options.seed,
    )


if __name__ == "__main__":
    sys.exit(main())
