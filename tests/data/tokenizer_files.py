"""Small tokenizers of every kind, made on the spot."""

from __future__ import annotations

import base64
import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from llm.data import words
from llm.data.tokenizer import Tokenizer
from llm.data.tokenizer_json import byte_letters, load_json
from llm.data.tokenizer_tiktoken import load_ranks
from llm.data.tokenizer_training import SPECIAL, train_bpe

CORPUS = Path(__file__).parents[2] / "llm" / "data" / "corpus" / "shakespeare.txt.gz"
VOCAB = 800
LATIN = "naïve café — “Größe” ☃ 東京タワー Привет, мир 123456 🙂🙃 e\u0301\n"
# Other ways to split than GPT-2's; "unknown" is none that is known, so that the library does it all.
SPLITS = {"llama3": words.LLAMA3, "qwen2": words.QWEN2, "o200k": words.O200K, "unknown": r"\p{L}+|[^\p{L}]"}
# Added tokens that are no special ones: a word, and a mark for reasoning.
ADDED = ("<think>", "</think>", "hello")


@lru_cache
def corpus() -> str:
    return gzip.decompress(CORPUS.read_bytes()).decode()


@lru_cache
def trained() -> bytes:
    """A byte-level BPE that splits as GPT-2."""
    return train_bpe([corpus()[:200_000], LATIN * 50], VOCAB)


def json_file(kind: str) -> bytes:
    """A ``tokenizer.json``: trained, or one of SPLITS, or of those below."""
    if kind == "trained":
        return trained()
    described = json.loads(trained())
    if kind in SPLITS:
        split = {"type": "Split", "pattern": {"Regex": SPLITS[kind]}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
        if kind == "qwen2":
            described["normalizer"] = {"type": "NFC"}
    elif kind == "added":
        for at, text in enumerate(ADDED):
            described["added_tokens"].append(
                {**described["added_tokens"][0], "id": VOCAB + at, "content": text, "special": False}
            )
    elif kind == "ignoring":  # as Llama 3's: a word of the vocabulary is one token, whatever the merges say
        described["model"]["ignore_merges"] = True
        del described["model"]["merges"][-300:]
    elif kind == "prefixed":
        described["pre_tokenizer"]["add_prefix_space"] = True
    elif kind == "truncating":
        described["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        described["padding"] = {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        }
        described["post_processor"] = {
            "type": "BertProcessing",
            "sep": ["<|endoftext|>", 0],
            "cls": ["<|endoftext|>", 0],
        }
    else:
        return unusual(kind)
    return json.dumps(described).encode()


def unusual(kind: str) -> bytes:
    """Models whose own vocabulary makes the spelling of their special token out of plain text."""
    letters = list("</s>abcdefghij klmnopqrtuvwxyz")
    if kind == "unigram":
        pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in letters)]
        tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    elif kind == "words":
        vocab = {text: at for at, text in enumerate(["<unk>", "</s>", "to", "be"])}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        assert kind == "merges"
        vocab = {text: at for at, text in enumerate(["<unk>", "</s>", *letters, "</", "s>"])}
        merges = [("<", "/"), ("s", ">"), ("</", "s>")]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer.to_str().encode()


@lru_cache
def json_tokenizer(kind: str) -> Tokenizer:
    return load_json(kind, json_file(kind), {})


def ranks_file() -> bytes:
    """The trained one's merges as tiktoken writes them."""
    bytes_of = {letter: byte for byte, letter in {**dict(enumerate(range(256))), **byte_letters()}.items()}
    vocab: dict[str, Any] = json.loads(trained())["model"]["vocab"]
    tokens = [bytes(bytes_of[ord(letter)] for letter in text) for text in vocab if text not in SPECIAL]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@lru_cache
def ranks_tokenizer(encoding: str) -> Tokenizer:
    return load_ranks(f"x#{encoding}", "x", ranks_file())
