"""Training a byte-level BPE, as GPT-2's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llm.utils.config import ConfigError

# <|endoftext|> ends a document; the others are ChatML's, so that a model can be taught to chat later.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMALLEST = 256 + len(SPECIAL)


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """The ``tokenizer.json`` of a byte-level BPE with at most ``vocab_size`` tokens, special ones included.

    Texts that have fewer pairs to merge give a smaller vocabulary. The same texts in the same order give the same
    bytes. Raises ConfigError for too small a vocabulary and for texts that are all empty.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL)} special tokens make {SMALLEST}"
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ConfigError("training a tokenizer needs the package tokenizers: pip install 'llmops[data]'") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_not_empty(texts), trainer)
    return tokenizer.to_str(pretty=True).encode() + b"\n"


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    from llm.data.tokenizer import well_formed

    seen = False
    for text in texts:
        if text:
            seen = True
            yield well_formed(text)
    if not seen:
        raise ConfigError("the corpus to train a tokenizer on is empty")
