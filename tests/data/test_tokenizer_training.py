"""Training a byte-level BPE."""

from __future__ import annotations

import pytest

from llm.data.tokenizer_json import load_json
from llm.data.tokenizer_training import SMALLEST, train_bpe
from llm.utils.config import ConfigError
from tests.data.tokenizer_files import corpus


def test_the_same_texts_give_the_same_file() -> None:
    texts = corpus()[:100_000].split("\n\n")
    first = train_bpe(texts, 600)
    assert train_bpe(iter(texts), 600) == first
    assert train_bpe(texts[1:], 600) != first
    tokenizer = load_json("x", first, {})
    assert tokenizer.vocab_size == 600
    assert tokenizer.end == tokenizer.special["<|endoftext|>"]
    assert len(tokenizer.encode(texts[3])) < 0.6 * len(texts[3].encode())
    assert tokenizer.decode(tokenizer.encode("never seen: ☃\x00")) == "never seen: ☃\x00"


def test_bytes_alone_are_the_smallest_vocabulary() -> None:
    tokenizer = load_json("x", train_bpe(["aaaa"], SMALLEST), {})
    assert len(tokenizer.encode("aaaa ☃")) == 8
    with pytest.raises(ConfigError, match=f"vocab_size={SMALLEST - 1} is too small"):
        train_bpe(["aaaa"], SMALLEST - 1)


def test_few_texts_give_few_tokens() -> None:
    assert load_json("x", train_bpe(["ab"], 5000), {}).vocab_size == SMALLEST + 1
    for empty in ([], ["", ""]):
        with pytest.raises(ConfigError, match="corpus to train a tokenizer on is empty"):
            train_bpe(empty, 1000)
