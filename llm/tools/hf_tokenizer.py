"""Any of our tokenizers as the files that Hugging Face's transformers read."""

from __future__ import annotations

import json
from typing import Any

from llm.data.tokenizer import ByteTokenizer, Tokenizer
from llm.data.tokenizer_json import JsonTokenizer, byte_letters
from llm.data.tokenizer_tiktoken import RanksTokenizer


def tokenizer_files(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json`` and, where chats have one, their template: name -> content."""
    if isinstance(tokenizer, JsonTokenizer):
        described = tokenizer.original()
    else:
        assert isinstance(tokenizer, ByteTokenizer | RanksTokenizer)
        ranks = tokenizer.ranks() if isinstance(tokenizer, RanksTokenizer) else {bytes([b]): b for b in range(256)}
        pattern = tokenizer.pattern if isinstance(tokenizer, RanksTokenizer) else None
        described = json.dumps(byte_level(ranks, pattern, tokenizer.special), ensure_ascii=False).encode()
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        **tokenizer.named,
    }
    if "eos_token" not in settings and tokenizer.end is not None:
        settings["eos_token"] = next(text for text, token in tokenizer.special.items() if token == tokenizer.end)
    files = {"tokenizer.json": described, "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
    if tokenizer.chat_template is not None:
        files["chat_template.jinja"] = tokenizer.chat_template.encode()
    return files


def byte_level(ranks: dict[bytes, int], pattern: str | None, special: dict[str, int]) -> dict[str, Any]:
    """A ``tokenizer.json`` of a byte-level BPE whose merges are known by the order of their results alone."""
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return token.decode("latin-1").translate(letters)

    merges = [[spelled(left), spelled(right)] for left, right in _merges(ranks)]
    to_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for text, token in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_letters]} if pattern else to_letters,
        "post_processor": None,
        "decoder": to_letters,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is that token, as tiktoken has it
            # Special tokens too: the library would number them on from the last rank, and there may be a gap.
            "vocab": {spelled(token): rank for token, rank in ranks.items()} | special,
            "merges": merges,
        },
    }  # fmt: skip


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts that each token is made of: what merging gives when its own rank and all above are not there."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(
                range(len(parts) - 1),
                key=lambda at: ranks.get(parts[at] + parts[at + 1], rank),
            )
            if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:  # else nothing merges into it, and it is a token only where it is a whole word
            merges.append((parts[0], parts[1]))
    return merges
