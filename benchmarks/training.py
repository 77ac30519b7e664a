"""Tokens per second of a training step on CPU: ours against transformers, torchtitan and litgpt.

    python benchmarks/training.py [--rounds 9] [--json FILE] [CONTENDER ...]

20.45 M parameters (``training_models.SHAPE``), sequences of 256 tokens, 8 in a batch, float32, 2 threads. All start
from the same weights and see the same batches, and their losses have to agree; each uses the optimizer and clipping
that its users do. ``-compiled`` after a name is the same with torch.compile. Contenders are processes that stay, and
take turns: a round is one step of each, in an order that rotates, so that other load on the machine meets all alike.
A ratio is the median over rounds of the quotient of two times of the same round.

The peers go into an environment of their own, which ``make_environment`` below makes:

    python benchmarks/training.py --install /tmp/peers    # transformers 5.23.0, torchtitan 0.3.0, litgpt 0.5.13
    /tmp/peers/bin/python benchmarks/training.py
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from turns import TREE, ratio, serve, take_turns

ALL = ("ours", "ours-compiled", "transformers", "transformers-compiled", "torchtitan", "torchtitan-compiled", "litgpt")
BASE = "transformers"
THREADS = 2
WARMUP = 3  # steps, in which the compiled ones compile
TOLERANCE = 2e-3  # of losses after some steps, relative to the first contender's

# What the peers' models import; nothing here replaces torch.
NEEDED = ("einops", "jsonargparse", "lightning==2.*", "lightning-utilities", "psutil", "spmd_types==0.2.3")
NEEDED += ("torchdata", "torchmetrics", "tyro", "docstring-parser", "torchtitan==0.3.0", "litgpt==0.5.13")


def make_environment(folder: Path) -> None:
    """A virtual environment that sees this one's packages. litgpt pins versions that transformers cannot use, and
    torchtitan much that its models do not: these come without what they ask for."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    (site / "parent.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-c", str(TREE / "constraints.txt"), "transformers==5.23.0"], check=True)
    subprocess.run([*pip, "--no-deps", *NEEDED], check=True)


def contend(name: str) -> None:
    """Be a contender: build, then a step for every turn."""
    import torch
    from training_models import CONTENDERS, LENGTH, ROWS, SHAPE

    torch.set_num_threads(THREADS)
    base, _, compiled = name.partition("-")
    step = CONTENDERS[base](bool(compiled))
    text = gzip.decompress((TREE / "llm" / "data" / "corpus" / "shakespeare.txt.gz").read_bytes())
    pairs = torch.frombuffer(bytearray(text[: len(text) // 2 * 2]), dtype=torch.uint8).view(-1, 2).long()
    tokens = (pairs[:, 0] * 256 + pairs[:, 1]) % SHAPE.vocab_size  # two letters a token
    generator = torch.Generator().manual_seed(1)

    def work() -> dict[str, float]:
        starts = torch.randint(len(tokens) - LENGTH - 1, (ROWS,), generator=generator)
        return {"loss": step(torch.stack([tokens[start : start + LENGTH + 1] for start in starts]))}

    serve(work)


def compare(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Run them in turn. Raises SystemExit when their losses do not agree."""
    contenders = take_turns(__file__, names, rounds, WARMUP)
    first = contenders[0]
    base = next((each for each in contenders if each.name == BASE), first)
    rows = []
    for each in contenders:
        apart = max(
            abs(mine["loss"] - theirs["loss"]) / theirs["loss"]
            for mine, theirs in zip(each.answers, first.answers, strict=True)
        )
        if apart > TOLERANCE:
            raise SystemExit(f"the losses of {each.name} and {first.name} differ by {apart:.1e}: not the same training")
        seconds = statistics.median(each.times("wall"))
        rows.append(
            {
                "name": each.name,
                "tokens_per_s": 2048 / seconds,
                "step_s": seconds,
                "speed_up": ratio(base, each, "wall"),
                "speed_up_cpu": ratio(base, each, "cpu"),
                "loss": each.answers[-1]["loss"],
                "losses_apart": apart,
            }
        )
    return rows


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", metavar="CONTENDER", help=", ".join(ALL))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="make the peers' environment, and end")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return contend(arguments.serve)
    if arguments.install:
        return make_environment(arguments.install)
    rows = compare(arguments.contenders or list(ALL), arguments.rounds)
    print(f"{'':<22} {'tokens/s':>9} {'step ms':>8} {'speed-up':>9} {'by CPU time':>12} {'last loss':>10} {'apart':>8}")
    for row in rows:
        print(
            f"{row['name']:<22} {row['tokens_per_s']:>9,.0f} {row['step_s'] * 1e3:>8.0f} {row['speed_up']:>9.2f} "
            f"{row['speed_up_cpu']:>12.2f} {row['loss']:>10.4f} {row['losses_apart']:>8.0e}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
