"""Training a byte-level BPE."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.data.tokenizer import load_tokenizer
from llm.data.tokenizer_json import load_json
from llm.data.tokenizer_training import SMALLEST, train_bpe
from llm.tools.train_tokenizer import main, parts
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


def test_the_command_trains_on_files_and_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "folder" / "tokenizer.json"
    text.write_text(corpus()[:200_000])
    assert main([str(text), "--vocab-size", "400", "--output", str(output)]) == 0
    assert load_tokenizer(str(output)).vocab_size == 400
    assert "".join(parts(str(text))) == text.read_text()
    assert len(list(parts(str(text)))) > 1
    for arguments, told in (
        ([str(text), "--vocab-size", "500", "--output", str(output)], "exists and is another tokenizer"),
        ([str(text), "--vocab-size", "5", "--output", "x"], "vocab_size=5 is too small"),
        ([f"{tmp_path}/absent", "--vocab-size", "500", "--output", "x"], "no such file"),
        ([str(output.parent / "b"), "--vocab-size", "500", "--output", "x"], "is no UTF-8"),
    ):
        (output.parent / "b").write_bytes(b"\xff")
        assert main(arguments) == 2
        assert told in capsys.readouterr().err
