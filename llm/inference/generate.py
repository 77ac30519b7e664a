"""Sampling text from a model: ``python -m llm.inference.generate --run-url RUN --prompt TEXT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from llm.checkpoint.format import CheckpointError, Commit
from llm.checkpoint.lineage import newest_commit, read_manifest
from llm.data.streaming import TOKENIZER
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.model.transformer import Transformer
from llm.train.base import check_base, fill, identity
from llm.train.lora import add_adapters, trained
from llm.train.pieces import local_pieces
from llm.train.resharding import load as load_tensors
from llm.train.world import World
from llm.utils.config import ConfigError, TrainingConfig, load
from llm.utils.storage import open_storage


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


def load_model(config: TrainingConfig, run_url: str, device: torch.device) -> tuple[Transformer, Commit]:
    """The whole model of a run's newest commit, on one device. Raises CheckpointError."""
    storage = open_storage(run_url)
    commit = newest_commit(storage)
    if commit is None:
        raise CheckpointError(f"{run_url} holds no committed checkpoint yet")
    alone = World(0, 1, 0, device, grouped=False)
    with device:
        model = Transformer(config.model)
    add_adapters(model, config.lora)
    parameters = dict(model.named_parameters())
    manifest = read_manifest(storage, commit)
    if config.lora.rank:
        fill(config, parameters)
        check_base(identity(config, parameters, alone), manifest.state.get("base"))
    pieces = local_pieces({f"model.{name}": value for name, value in trained(parameters).items()})
    load_tensors(storage, commit, manifest, pieces, alone, prefixes=("model.",))
    return model.eval(), commit


def load_run_tokenizer(run_url: str, commit: Commit) -> Tokenizer:
    """The tokenizer that a run was trained with. Raises ConfigError where the run directory has another one."""
    storage = open_storage(run_url)
    names = storage.list(TOKENIZER)
    found = load_tokenizer(f"{run_url.rstrip('/')}/{TOKENIZER}/{names[0]}" if names else "bytes")
    wanted = read_manifest(storage, commit).state.get("data", {}).get("tokenizer")
    if wanted not in (None, found.sha256):  # an imported checkpoint knows none
        raise ConfigError(
            f"{commit.path} was trained with a tokenizer whose SHA-256 is {wanted[:12]}…, and {run_url}/{TOKENIZER} "
            f"has {found.name} ({found.sha256[:12]}…): restore the file"
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """Print a continuation of each prompt; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m llm.inference.generate", description="Let a trained model write.")
    parser.add_argument("--run-url", required=True, help="run directory: a path or an fsspec URL")
    parser.add_argument("--config", help="the run's config (default: config.yaml in the run directory)")
    parser.add_argument("--prompt", action="append", required=True, help="may be given more than once")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add to each prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = load(options.config or f"{options.run_url.rstrip('/')}/config.yaml")
        model, commit = load_model(config, options.run_url, device)
        tokenizer = load_run_tokenizer(options.run_url, commit)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"step {commit.step}, {commit.path}", file=sys.stderr)
    texts = generate(
        model,
        tokenizer,
        options.prompt,
        options.tokens,
        options.temperature,
        config.model.max_seq_len,
        torch.Generator().manual_seed(options.seed),
        device,
    )
    print("\n\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
