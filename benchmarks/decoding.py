"""Tokens per second of greedy generation on CPU: ours against transformers and litgpt, with the same tokens.

    python benchmarks/decoding.py [--batch 1] [--batch 16] [--rounds 7] [--json FILE] [CONTENDER ...]

20.45 M parameters (``training_models.SHAPE``), prompts of 32 tokens, 96 new ones, float32, 2 threads. A turn is one
whole generation, prompt included. All must give the same tokens. ``transformers`` is its ``generate`` as people call
it, with a cache that grows; ``-compiled`` has a static cache and a compiled forward. litgpt's is its batched generator.
Turns and ratios: see ``turns.py``. The peers' environment is that of ``training.py``:

    python benchmarks/training.py --install /tmp/peers
    /tmp/peers/bin/python benchmarks/decoding.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turns import ratio, serve, take_turns

ALL = ("transformers", "transformers-compiled", "litgpt", "ours", "ours-compiled")
PROMPT, NEW, THREADS = 32, 96, 2
WARMUP = 2  # generations, in which the compiled ones compile
Generate = Callable[[Any], list[list[int]]]  # prompts (B, T) to new tokens


def ours(compiled: bool) -> Generate:
    """This project's generator."""
    from training_models import SHAPE, weights

    from llm.data.tokenizer import ByteTokenizer
    from llm.inference.generate import generate
    from llm.inference.rows import CachedRows
    from llm.inference.sampling import Sampling
    from llm.model.transformer import Transformer

    class Tokens(ByteTokenizer):
        vocab_size = SHAPE.vocab_size

    model = Transformer(SHAPE).eval().requires_grad_(False)
    model.load_state_dict(weights())
    rows, sampling = CachedRows(model, compiled), Sampling(max_tokens=NEW)
    return lambda prompts: [each.tokens for each in generate(rows, Tokens(), prompts.tolist(), sampling)]


def transformers(compiled: bool) -> Generate:
    """transformers' generate."""
    import torch
    from training_models import hugging_face_model

    model = hugging_face_model().eval()
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if compiled:
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward)

    def generate(prompts: Any) -> list[list[int]]:
        with torch.no_grad():
            done = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return done[:, PROMPT:].tolist()

    return generate


def litgpt(compiled: bool) -> Generate:
    """litgpt's batched generation."""
    import torch
    from litgpt.generate.base import batched_generate_fn
    from training_models import litgpt_model

    model = litgpt_model().eval()

    def generate(prompts: Any) -> list[list[int]]:
        with torch.no_grad():
            model.clear_kv_cache()
            model.max_seq_length = PROMPT + NEW
            model.set_kv_cache(batch_size=len(prompts))
            steps = list(
                batched_generate_fn(
                    model,
                    prompts,
                    PROMPT + NEW,
                    sample_args={"temperature": 0.0},
                    include_prompt=False,
                    include_eos=False,
                )
            )
        return [[int(step[row]) for step in steps] for row in range(len(prompts))]

    return generate


def contend(name: str) -> None:
    """Be a contender."""
    import torch
    from training_models import SHAPE

    torch.set_num_threads(THREADS)
    base, _, rest = name.partition("/")
    kind, _, compiled = base.partition("-")
    generate = {"ours": ours, "transformers": transformers, "litgpt": litgpt}[kind](bool(compiled))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(SHAPE.vocab_size, (int(rest), PROMPT), generator=generator)
    serve(lambda: {"tokens": generate(prompts)})


def compare(names: list[str], batch: int, rounds: int) -> list[dict[str, Any]]:
    """One batch size. Raises SystemExit when the tokens differ."""
    contenders = take_turns(__file__, [f"{name}/{batch}" for name in names], rounds, WARMUP)
    first = contenders[0]
    rows = []
    for name, each in zip(names, contenders, strict=True):
        if any(answer["tokens"] != first.answers[0]["tokens"] for answer in each.answers):
            raise SystemExit(f"{name} and {names[0]} give different tokens")
        seconds = statistics.median(each.times("wall"))
        rows.append(
            {
                "batch": batch,
                "name": name,
                "tokens_per_s": batch * NEW / seconds,
                "speed_up": ratio(first, each, "wall"),
                "speed_up_cpu": ratio(first, each, "cpu"),
            }
        )
    return rows


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", metavar="CONTENDER", help=", ".join(ALL))
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return contend(arguments.serve)
    rows = [
        row
        for batch in arguments.batch or (1, 16)
        for row in compare(arguments.contenders or list(ALL), batch, arguments.rounds)
    ]
    print(f"{'batch':>5} {'':<22} {'tokens/s':>9} {'speed-up':>9} {'by CPU time':>12}")
    for row in rows:
        print(
            f"{row['batch']:>5} {row['name']:<22} {row['tokens_per_s']:>9,.0f} {row['speed_up']:>9.2f} "
            f"{row['speed_up_cpu']:>12.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
