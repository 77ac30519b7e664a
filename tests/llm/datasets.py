"""Datasets of made-up documents."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llm.data.format import BLOCK, Index, ShardWriter, TokenizerRecord, write_index
from llm.data.packing import pack
from llm.data.source import BYTES
from llm.utils.storage import Storage


def documents(count: int, seed: int = 0, vocab: int = 50_000) -> list[NDArray[np.int64]]:
    """Texts of tokens below ``vocab``, a few of them longer than a block."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(count) < 0.02, rng.integers(BLOCK, 2 * BLOCK, count), rng.integers(1, 200, count))
    return [rng.integers(0, vocab, length) for length in lengths]


def make(
    storage: Storage,
    texts: list[NDArray[np.int64]],
    row: int | None = None,
    loss: bool = False,
    shard: int | None = None,
    vocab: int = 50_000,
) -> Index:
    """A dataset of these documents, of which a tenth is held out. ``shard``: tokens of the largest one."""
    splits = {}
    tenth = len(texts) // 10
    for split, own in (("train", texts[tenth:]), ("validation", texts[:tenth])):
        tokens = np.concatenate(own) if own else np.zeros(0, np.int64)
        starts = np.zeros(len(tokens), bool)
        starts[np.cumsum([0, *[len(each) for each in own[:-1]]])[: len(own)]] = True
        wanted = tokens % 3 > 0 if loss else None
        if row is not None:
            packed = pack(tokens, starts, wanted, row)
            tokens, starts, wanted = packed.tokens, packed.starts, packed.loss
        writer = ShardWriter(storage, f"{split}-00000", "uint16", row, wanted is not None)
        step = shard or max(len(tokens), 1)
        for at in range(0, len(tokens), step):
            part = slice(at, at + step)
            writer.add(tokens[part], starts[part], None if wanted is None else wanted[part])
            if shard is not None:
                writer.close()
        splits[split] = writer.close()
    tokenizer = TokenizerRecord(name="bytes", sha256=BYTES.sha256, vocab_size=vocab, end=None)
    index = Index(dtype="uint16", tokenizer=tokenizer, row=row, loss=loss or row is not None, splits=splits)
    write_index(storage, index)
    return index
