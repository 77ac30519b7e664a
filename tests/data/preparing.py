"""What tests of preparations share: input made on the spot, a preparation without processes, and what came out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.format import Index, read_index, record, verified
from llm.data.prepare.merge import merge, tidy
from llm.data.prepare.plan import claim
from llm.data.prepare.run import plan_job
from llm.data.prepare.stages import STAGES, stages
from llm.utils.config import PrepareConfig
from llm.utils.storage import open_storage


def shakespeare() -> list[str]:
    """Paragraphs of the shipped corpus."""
    file = resources.files("llm.data") / "corpus" / "shakespeare.txt.gz"
    return gzip.decompress(file.read_bytes()).decode().split("\n\n")


def jsonl(rows: Iterable[Any]) -> bytes:
    """Rows, or texts, as JSON lines."""
    return b"".join(json.dumps({"text": row} if isinstance(row, str) else row).encode() + b"\n" for row in rows)


def prepare(source: Path | str | list[str], output: Path | str, **options: Any) -> Index:
    """Prepare in this process."""
    named = source if isinstance(source, list) else [str(source)]
    config = PrepareConfig(**{"input": named, "output": str(output), "validation": 0.0, **options})
    job = plan_job(config)
    found = claim(job.storage, job.plan, config.overwrite)
    if found is not None:
        return found
    for stage, count in stages(config, job.plan):
        for item in range(count):
            STAGES[stage](job, item, lambda _size, _tokens: None)
    index = merge(job)
    tidy(job)
    return index


def read_split(output: Path | str, split: str = "train") -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Tokens, starts and loss of a split, each block checked against its checksum."""
    storage = open_storage(str(output))
    index = read_index(storage)
    assert index is not None
    tokens, starts, loss = [], [], []
    for shard in index.splits.get(split, []):
        records = verified(storage.read(shard.name), index, shard, 0, shard.name)
        assert records.dtype == record(index.dtype, index.loss)
        tokens.append(records["tokens"].reshape(-1)[: shard.tokens])
        for bits, name in ((starts, "starts"), (loss, "loss")):
            if name in records.dtype.names:
                bits.append(np.unpackbits(records[name].reshape(-1), bitorder="little")[: shard.tokens].astype(bool))
    if not tokens:
        return np.zeros(0, int), np.zeros(0, bool), None
    return np.concatenate(tokens), np.concatenate(starts), np.concatenate(loss) if loss else None


def texts(output: Path | str, split: str = "train") -> list[str]:
    """The documents of a dataset of bytes that are not packed, in order."""
    tokens, starts, _ = read_split(output, split)
    return [bytes(part.astype(np.uint8)).decode() for part in np.split(tokens, np.flatnonzero(starts)) if len(part)]


def contents(output: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
