"""Megabytes of text per second from JSON lines to a dataset on disk, beside what tokenizers alone and datasets can do.

    PYTHONPATH=. python benchmarks/preparing.py [--rounds 5] [--copies 20] [--json FILE]

One worker, one thread. The tokenizers alone encode the same documents in the batches that a preparation makes. They
take turns; a ratio is the median over rounds of the quotient of a round. A preparation starts its process within the
time, so the input must be large: ``--copies`` of the shipped corpus, each with words of its own, or the tokenizer's
cache would know them all. ``datasets`` takes part where it is installed (``pip install datasets``; its pins may
replace packages of this project, so in an environment of its own that sees this one's).
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
from importlib.util import find_spec
from pathlib import Path

os.environ.update(RAYON_NUM_THREADS="1", HF_HUB_OFFLINE="1")

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


def library(texts: list[str], tokenizer_file: Path) -> float:
    """Seconds of the ``tokenizers`` library's own ``encode_batch``, whose ids become arrays."""
    import numpy as np
    from tokenizers import Tokenizer

    from llm.data.prepare.unit import BATCH_DOCUMENTS

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    began = time.perf_counter()
    for at in range(0, len(texts), BATCH_DOCUMENTS):
        for encoding in tokenizer.encode_batch(texts[at : at + BATCH_DOCUMENTS]):
            np.array(encoding.ids, np.uint16)
    return time.perf_counter() - began


def mapped(source: Path, output: Path, tokenizer_file: Path) -> float:
    """Seconds of ``datasets``: load the JSON lines, ``map`` in batches with the same library, save."""
    import datasets
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    datasets.disable_progress_bars()

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.ids for encoding in tokenizer.encode_batch(batch["text"])]}

    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(output / "cache"))
    rows.map(encode, batched=True, batch_size=1000, remove_columns=["text"]).save_to_disk(str(output / "saved"))
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
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, source = folder / "tokenizer.json", folder / "in.jsonl"
        file.write_bytes(train_bpe(texts[:20_000], VOCAB))
        with source.open("w") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        for turn in range(arguments.rounds):
            seconds = {
                "prepare_data, the whole command": prepared(source, folder / f"out{turn}", file),
                "its tokenizer alone": ceiling(texts, file),
                "tokenizers.encode_batch alone": library(texts, file),
            }
            if find_spec("datasets") is not None:
                seconds["datasets.map, loaded and saved"] = mapped(source, folder / f"map{turn}", file)
            rows.append(seconds)
    ours = "prepare_data, the whole command"
    print(f"{size:.0f} MB, one worker, one thread; medians of {len(rows)} rounds")
    for name in rows[0]:
        rate = statistics.median(size / row[name] for row in rows)
        ratio = statistics.median(row[name] / row[ours] for row in rows)
        print(f"{name:<34} {rate:>6.2f} MB/s   ours is {ratio:.2f} times as fast")
    if arguments.json:
        arguments.json.write_text(json.dumps({"mb": size, "seconds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
