"""Megabytes of text per second from JSON lines to a dataset on disk, beside what the tokenizer alone can do.

    python benchmarks/preparing.py [--rounds 5] [--copies 20] [--json FILE]

One worker. The ceiling is ``encode_batch`` of the same documents in the batches that a preparation makes, in a process
that has nothing else to do. They take turns; the share is the median over rounds of the quotient of a round. A
preparation starts its process within the time, so the input must be large: ``--copies`` of the shipped corpus, each
with words of its own, or the tokenizer's cache would know them all.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"

VOCAB = 8192


def corpus(copies: int) -> list[str]:
    """Paragraphs; every copy spells its words in its own way."""
    file = resources.files("llm.data") / "corpus" / "shakespeare.txt.gz"
    text = gzip.decompress(file.read_bytes()).decode()
    letters = "etaoinshrdlu"
    made = [text]
    for copy in range(1, copies):
        shift = copy % len(letters)
        made.append(text.translate(str.maketrans(letters, letters[shift:] + letters[:shift])))
    return [part for each in made for part in each.split("\n\n") if part]


def ceiling(texts: list[str], tokenizer_file: Path) -> float:
    """Seconds of the tokenizer alone."""
    from llm.data.prepare.unit import BATCH_DOCUMENTS
    from llm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_file))
    began = time.perf_counter()
    for at in range(0, len(texts), BATCH_DOCUMENTS):
        tokenizer.encode_batch(texts[at : at + BATCH_DOCUMENTS])
    return time.perf_counter() - began


def prepared(source: Path, output: Path, tokenizer_file: Path) -> float:
    """Seconds of the whole command, but for the start of this interpreter."""
    from llm.tools import prepare_data

    began = time.perf_counter()
    arguments = ["--input", str(source), "--output", str(output), "--tokenizer", str(tokenizer_file), "--workers", "1"]
    if prepare_data.main(arguments):
        raise SystemExit("prepare_data failed")
    return time.perf_counter() - began


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    from llm.data.tokenizer_training import train_bpe

    texts = corpus(arguments.copies)
    size = sum(len(text.encode()) for text in texts) / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_bytes(train_bpe(texts[:20_000], VOCAB))
        with (folder / "in.jsonl").open("w") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        for turn in range(arguments.rounds):
            alone = ceiling(texts, folder / "tokenizer.json")
            whole = prepared(folder / "in.jsonl", folder / f"out{turn}", folder / "tokenizer.json")
            rows.append({"ceiling_mb_per_s": size / alone, "prepared_mb_per_s": size / whole, "share": alone / whole})
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print(
        f"{size:.0f} MB: the tokenizer alone {found['ceiling_mb_per_s']:.2f} MB/s, "
        f"prepared {found['prepared_mb_per_s']:.2f} MB/s, {100 * found['share']:.0f}% of it"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"median": found, "rounds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
