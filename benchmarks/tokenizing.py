"""Megabytes of text per second that become token ids: ours against tokenizers and tiktoken.

    python benchmarks/tokenizing.py [--rounds 7] [--text FILE] [--json FILE] [CONTENDER ...]

All have the same merges, trained here, and split as GPT-2 does; all give an array of uint32 for each paragraph, and
their ids have to agree. One thread each, in one process: that is how a preparation uses them, a process per core. They
take turns, in an order that rotates; a ratio is the median over rounds of the quotient of two CPU times of the same
round. ``first`` is the first pass over the text, in which nobody has seen its words.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ["RAYON_NUM_THREADS"] = "1"

VOCAB, SPECIAL = 8192, 3
# Name -> the one that it is compared with. Whole commands (a preparation, say) are rows of their own: see `measure`.
AGAINST = {
    "ours": "tokenizers",
    "ours, encode_batch of 1": "tokenizers",
    "tokenizers": "tokenizers",
    "tokenizers fast": "tokenizers",
    "ours tiktoken": "tiktoken",
    "tiktoken": "tiktoken",
    "tiktoken batch": "tiktoken",
}
Run = Callable[[list[str]], list[np.ndarray]]


def contenders(texts: list[str]) -> dict[str, Run]:
    """What turns texts into arrays, by name."""
    import tiktoken
    import tokenizers

    from llm.data import words
    from llm.data.tokenizer_json import load_json
    from llm.data.tokenizer_tiktoken import load_ranks
    from llm.data.tokenizer_training import train_bpe

    data = train_bpe(texts, VOCAB)
    ranks = ranks_of(data)
    ours, ours_single, ours_ranks = load_json("a", data, {}), load_json("b", data, {}), load_ranks("#gpt2", "", ranks)
    library, fast = (tokenizers.Tokenizer.from_str(data.decode()) for _ in range(2))
    merges = {bytes(token): rank for token, rank in ours_ranks._library._mergeable_ranks.items()}
    other = tiktoken.Encoding("x", pat_str=words.GPT2, mergeable_ranks=merges, special_tokens={})
    return {
        "ours": ours.encode_batch,
        "ours, encode_batch of 1": lambda texts: [ours_single.encode_batch([text])[0] for text in texts],
        "tokenizers": lambda texts: [np.array(each.ids, np.uint32) for each in library.encode_batch(texts)],
        "tokenizers fast": lambda texts: [np.array(each.ids, np.uint32) for each in fast.encode_batch_fast(texts)],
        "ours tiktoken": ours_ranks.encode_batch,
        "tiktoken": lambda texts: [other.encode_to_numpy(text, disallowed_special=()) for text in texts],
        "tiktoken batch": lambda texts: [
            np.array(ids, np.uint32) for ids in other.encode_ordinary_batch(texts, num_threads=1)
        ],
    }


def ranks_of(data: bytes) -> bytes:
    """A file of ranks with the merges of a ``tokenizer.json``."""
    import base64

    from llm.data.tokenizer_json import byte_letters

    bytes_of = {letter: byte for byte, letter in {**dict(enumerate(range(256))), **byte_letters()}.items()}
    described = json.loads(data)
    special = {token["content"] for token in described["added_tokens"]}
    tokens = [text for text in described["model"]["vocab"] if text not in special]
    lines = (base64.b64encode(bytes(bytes_of[ord(letter)] for letter in text)) for text in tokens)
    return b"".join(line + b" %d\n" % rank for rank, line in enumerate(lines))


def measure(texts: list[str], runs: dict[str, Run], rounds: int) -> list[dict[str, Any]]:
    """Run them in turn. Raises SystemExit when their ids do not agree."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    ids: dict[str, np.ndarray] = {}
    names = list(runs)
    for turn in range(rounds + 1):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            wall, cpu = time.perf_counter(), time.process_time()
            arrays = runs[name](texts)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            # In tokenizer.json the special tokens come first.
            ids[name] = np.concatenate(arrays) + (SPECIAL if "tiktoken" in name else 0)
    rows = []
    for name in names:
        first, later = times[name][0], times[name][1:]
        base = AGAINST[name] if AGAINST[name] in runs else name
        if not np.array_equal(ids[name], ids[names[0]]):
            raise SystemExit(f"the ids of {name} and {names[0]} differ")
        rows.append(
            {
                "name": name,
                "mb_per_s": size / statistics.median(wall for wall, _ in later),
                "mb_per_cpu_s": size / statistics.median(cpu for _, cpu in later),
                "first_mb_per_cpu_s": size / first[1],
                "against": base,
                "ratio": statistics.median(
                    theirs[1] / mine[1] for mine, theirs in zip(later, times[base][1:], strict=True)
                ),
                "first_ratio": times[base][0][1] / first[1],
            }
        )
    return rows


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", metavar="CONTENDER", help=", ".join(AGAINST))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--text", default="embedded:shakespeare", metavar="FILE", help="default: embedded:shakespeare")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    from llm.data.source import text_bytes

    text = bytes(text_bytes("--text", arguments.text)).decode()
    texts = [part for part in text.split("\n\n") if part]
    runs = contenders(texts)
    chosen = {name: runs[name] for name in arguments.contenders or runs}
    rows = measure(texts, chosen, arguments.rounds)
    print(f"{'':<24} {'MB/s':>6} {'MB/CPU s':>9} {'first':>6}   ratio (first) to")
    for row in rows:
        print(
            f"{row['name']:<24} {row['mb_per_s']:>6.2f} {row['mb_per_cpu_s']:>9.2f} {row['first_mb_per_cpu_s']:>6.2f} "
            f"  {row['ratio']:>5.2f} ({row['first_ratio']:.2f}) {row['against']}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
