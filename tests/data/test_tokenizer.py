"""Tokenizers of files: the library's ids, and never a special token out of text."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import words
from llm.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_file
from llm.data.tokenizer_tiktoken import ENCODINGS
from llm.utils.config import ConfigError
from tests.data.tokenizer_files import (
    ADDED,
    LATIN,
    SPLITS,
    VOCAB,
    corpus,
    json_file,
    json_tokenizer,
    ranks_file,
    ranks_tokenizer,
)

LEVEL = ("trained", *SPLITS, "added", "ignoring")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "</s>", "<unk>", "<|endofprompt|>", *ADDED)
pieces = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [*SPECIAL, "'s", "'LL", "\u017f", " ", "\n\n", "\x1c", "\x85", "\u3000", "123456", LATIN, "The king"]
    ),
)
any_text = st.lists(pieces, max_size=12).map("".join)


@lru_cache
def library_alone(kind: str) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer.from_str(json_file(kind).decode())
    library.encode_special_tokens = True
    return library


@lru_cache
def tiktoken_alone(pattern: str) -> tiktoken.Encoding:
    lines = [line.split() for line in ranks_file().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("kind", LEVEL)
@settings(max_examples=60)
@given(texts=st.lists(any_text, max_size=4))
def test_ids_are_the_librarys_and_tell_the_text(kind: str, texts: list[str]) -> None:
    tokenizer = json_tokenizer(kind)
    library = library_alone(kind)
    expected = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
    assert [array.tolist() for array in tokenizer.encode_batch(texts)] == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    told = [unicodedata.normalize("NFC", text) if kind == "qwen2" else text for text in texts]
    assert [tokenizer.decode(ids) for ids in expected] == told


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=60)
@given(texts=st.lists(any_text, max_size=4))
def test_ids_are_those_of_tiktoken(encoding: str, texts: list[str]) -> None:
    tokenizer = ranks_tokenizer(encoding)
    library = tiktoken_alone(ENCODINGS[encoding].pattern)
    expected = library.encode_ordinary_batch(texts)
    assert [array.tolist() for array in tokenizer.encode_batch(texts)] == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts


@pytest.mark.parametrize("pattern", sorted(words.KNOWN))
def test_every_safe_character_splits_as_in_the_libraries(pattern: str) -> None:
    text = "".join(f"a{c}b {c}{c}1{c}12{c}\n{c} '{c}s'S{c}A{c}aB \n {c}" for c in words.safe_characters())
    ours = words.translated(pattern).findall(text)
    assert "".join(ours) == text
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    assert ours == [text[begin:end] for _, (begin, end) in split.pre_tokenize_str(text)]
    # tiktoken tells no words; but one that is in the ranks is one token.
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in ours:
        ranks.setdefault(word.encode(), len(ranks))
    library = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert library.encode_ordinary(text) == [ranks[word.encode()] for word in ours]


def test_gpt2s_pattern_is_the_byte_levels_own() -> None:
    text = "".join(f"a{c}b {c}1{c} '{c}s {c}" for c in words.safe_characters())
    own = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert words.translated(words.GPT2).findall(text) == [text[begin:end] for _, (begin, end) in own]


@pytest.mark.parametrize("chunk", [1, 100, 5000])
def test_a_long_text_is_cut_where_words_end(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus()[:60_000] + " \n\n  " + LATIN
    expected = json_tokenizer("trained").encode(text)
    monkeypatch.setattr(words, "CHUNK", chunk)
    assert json_tokenizer("trained").encode(text) == expected
    assert len(list(words._chunks(text))) > 10


def test_the_words_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST", 10)
    kept = words.Words(words.GPT2, lambda word: [len(word)])
    ids = kept.ids("one three fives " * 3 + "x" * 100 + "".join(f" {n}" for n in range(50)))
    assert ids is not None
    assert ids.tolist()[:4] == [3, 6, 6, 4]
    assert len(kept) <= 10
    assert max(map(len, kept)) <= words.LONGEST


@pytest.mark.parametrize("kind", ["trained", "added", "unknown", "unigram", "words", "merges"])
def test_no_text_makes_a_special_token(kind: str) -> None:
    tokenizer = json_tokenizer(kind)
    assert tokenizer.special
    for text in tokenizer.special:
        for spelled in (text, f"to {text} be", f"{text}{text}", text * 5):
            ids = {*tokenizer.encode(spelled), *tokenizer.encode_batch([spelled])[0].tolist()}
            assert not ids & {token for name, token in tokenizer.special.items() if name != "<unk>"}


def test_the_library_alone_would_make_one() -> None:
    for kind in ("unigram", "words", "merges"):
        library = library_alone(kind)
        assert library.token_to_id("</s>") in library.encode("</s>", add_special_tokens=False).ids


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_text_makes_a_special_token_of_tiktoken(encoding: str) -> None:
    tokenizer = ranks_tokenizer(encoding)
    for text, token in tokenizer.special.items():
        assert token not in tokenizer.encode(f"a{text}\u0378")
        assert tokenizer.decode([token]) == text
    assert tokenizer.vocab_size == max(tokenizer.special.values()) + 1
    assert tokenizer.end in tokenizer.special.values()


def test_special_tokens_are_told_and_unknown_ids_left_out() -> None:
    for tokenizer in (json_tokenizer("trained"), ranks_tokenizer("gpt2")):
        assert tokenizer.end is not None
        assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.end, 10**6, -1]) == "a b<|endoftext|>"


def test_a_file_that_cuts_and_pads_does_neither_here() -> None:
    text = "To be, or not to be, that is the question"
    assert json_tokenizer("truncating").encode(text) == json_tokenizer("trained").encode(text)
    for kind in ("truncating", "unknown"):
        assert json_tokenizer(kind).decode(json_tokenizer(kind).encode_batch([text, "\u0378"])[1].tolist()) == "\u0378"


def test_added_tokens_that_are_no_special_ones_are_text() -> None:
    ids = json_tokenizer("added").encode("<think>hello</think>")
    assert ids == [VOCAB, VOCAB + 2, VOCAB + 1]
    assert json_tokenizer("added").vocab_size == VOCAB + 3


def test_surrogates_alone_become_replacement_characters() -> None:
    for tokenizer in (ByteTokenizer(), json_tokenizer("trained"), json_tokenizer("unknown"), ranks_tokenizer("gpt2")):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
        assert tokenizer.decode(tokenizer.encode_batch(["a\ud800b"])[0].tolist()) == "a\ufffdb"


def test_a_million_blanks() -> None:
    text = " " * 1_000_000 + "x"
    for tokenizer in (json_tokenizer("trained"), ranks_tokenizer("llama3")):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match="tiktoken cannot split a text of 1000002"):
        ranks_tokenizer("llama3").encode(text + "\u0378")


def same(one: Tokenizer, other: Tokenizer) -> bool:
    text = "One king\n\n" + LATIN
    return (
        one.encode(text) == other.encode(text)
        and (one.sha256, one.vocab_size, one.end, one.special, one.chat_template, one.named)
        == (other.sha256, other.vocab_size, other.end, other.special, other.chat_template, other.named)
    )  # fmt: skip


def test_a_tokenizer_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    data = json_file("trained")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(data)
    import fsspec

    fsspec.filesystem("memory").pipe_file("/tokenizers/mine.json", data)
    names = [str(folder), f"{folder}/", f"{folder}/tokenizer.json", folder.as_uri(), "memory://tokenizers/mine.json"]
    loaded = [load_tokenizer(name) for name in names]
    assert [tokenizer.name for tokenizer in loaded] == names
    assert all(same(loaded[0], other) for other in loaded)
    assert loaded[0].sha256 == hashlib.sha256(data).hexdigest()
    assert loaded[0].end == loaded[0].special["<|endoftext|>"]


def test_a_folder_of_an_object_store(s3_server: str) -> None:
    import fsspec

    store = fsspec.filesystem("s3")
    store.pipe_file("runs/tokenizers/mine/tokenizer.json", json_file("trained"))
    store.pipe_file("runs/tokenizers/mine/tokenizer_config.json", b'{"chat_template": "x"}')
    tokenizer = load_tokenizer("s3://runs/tokenizers/mine")
    assert same(tokenizer, load_tokenizer("s3://runs/tokenizers/mine/tokenizer.json"))
    assert tokenizer.chat_template == "x"
    with pytest.raises(ConfigError, match="there is no such file"):
        load_tokenizer("s3://runs/tokenizers/other")


def test_what_lies_beside_goes_into_the_copy(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(json_file("trained"))
    plain = load_tokenizer(str(tmp_path))
    assert tokenizer_file(plain) == json_file("trained")
    config = {"eos_token": {"content": "<|im_end|>", "special": True}, "bos_token": None, "chat_template": "old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }} ü")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.end == tokenizer.special["<|im_end|>"]
    assert tokenizer.chat_template == "{{ messages }} ü"
    assert tokenizer.sha256 == plain.sha256
    copy = tokenizer_file(tokenizer)
    assert copy is not None
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "any name"
    path.write_bytes(copy)
    again = load_tokenizer(str(path))
    assert same(again, tokenizer)
    assert tokenizer_file(again) == copy
    tokenizers.Tokenizer.from_file(str(path))  # the library reads it too


def test_a_ranks_file_says_its_encoding_by_name(tmp_path: Path) -> None:
    data = ranks_file()
    for file in ("cl100k_base.tiktoken", "o200k_base.tiktoken", "tokenizer.model"):
        (tmp_path / file).write_bytes(data)
    named = load_tokenizer(f"{tmp_path}/cl100k_base.tiktoken")
    said = load_tokenizer(f"{tmp_path}/tokenizer.model#cl100k_base")
    assert same(named, said)
    assert named.vocab_size == 100277
    assert load_tokenizer(f"{tmp_path}/tokenizer.model#llama3").vocab_size == len(data.splitlines()) + 256
    assert load_tokenizer(f"{tmp_path}/o200k_base.tiktoken").sha256 != named.sha256
    copy = tokenizer_file(named)
    assert copy is not None
    (tmp_path / "copy").write_bytes(copy)
    assert same(load_tokenizer(f"{tmp_path}/copy"), named)


def test_bytes_need_no_file() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer_file(tokenizer) is None
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end) == ("bytes", 256, None)
    assert tokenizer.sha256 == ByteTokenizer().sha256
    array = tokenizer.encode_batch(["ü", ""])[0]
    assert (array.tolist(), array.dtype) == ([195, 188], np.uint32)


@pytest.mark.parametrize(
    ("file", "data", "told"),
    [
        ("absent", None, "there is no such file"),
        ("tokenizer.json", b"{", "no tokenizer.json of Hugging Face"),
        ("tokenizer.json", b"{}", "no 'model'"),
        ("tokenizer.json", b'{"model": {"type": "Odd", "vocab": {}}}', "no tokenizer.json of Hugging Face"),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"special": true}]}', "no 'content'"),
        ("tokenizer.json", b'{"model": {"vocab": [["a"]]}}', "no tokenizer.json of Hugging Face"),
        ("tokenizer.json", b"\x80\x04pickle", "line 1 is no 'base64 rank'"),
        ("tokenizer.json", b"", "no rank for the byte 0x00"),
        ("x.tiktoken", b"IQ== 0\n", "no rank for the byte 0x00"),
        ("x.tiktoken", ranks_file(), "o200k_base, llama3"),
        ("gpt2.tiktoken", ranks_file() + b"aGVsbG8gd29ybGQ= 50256\n", "is it another encoding's?"),
        ("gpt2.tiktoken", ranks_file() + b"aGVsbG8gd29ybGQ= 5\n", "given to two tokens"),
    ],
)
def test_what_is_no_tokenizer_is_one_clear_line(tmp_path: Path, file: str, data: bytes | None, told: str) -> None:
    if data is not None:
        (tmp_path / file).write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(f"{tmp_path}/{file}")
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"data.tokenizer={tmp_path}/{file}")
    assert "\n" not in str(caught.value)


def test_an_end_that_there_is_not_and_a_protocol_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(json_file("trained"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(ConfigError, match="eos_token=<eos>"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="odd://x/y: cannot be read"):
        load_tokenizer("odd://x/y")


@pytest.mark.parametrize("package", ["tokenizers", "tiktoken"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / "gpt2.tiktoken"
    path.write_bytes(json_file("trained") if package == "tokenizers" else ranks_file())
    with pytest.raises(ConfigError, match=rf"{package}: pip install 'llmops\[data\]'"):
        load_tokenizer(str(path))
