"""Text becomes datasets of tokens: every format, every option, and what is refused."""

from __future__ import annotations

import gzip
import itertools
import json
import re

import msgspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data.prepare.inputs import File, Piece
from llm.data.prepare.records import Row, Rows
from llm.data.tokenizer import load_tokenizer
from llm.tools import prepare_data
from llm.utils.config import ConfigError, PrepareConfig
from tests.data.preparing import contents, jsonl, prepare, read_split, shakespeare, texts

SMALL = ["one", "zwei é", "three\nlines\n\nhere", "vier", "five " * 30]


def parquet(path, rows, row_group=2):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_holds_the_same_documents(tmp_path, name):
    data = jsonl(SMALL)
    if name.endswith(".gz"):  # of two members, as `cat` makes them, filled up with zeros
        data = gzip.compress(data[:40]) + gzip.compress(data[40:]) + bytes(100)
    elif name.endswith(".zst"):
        data = zstandard.compress(data[:40]) + zstandard.compress(data[40:])
    if name.endswith(".parquet"):
        parquet(tmp_path / name, [{"id": 1, "text": text} for text in SMALL])
    else:
        (tmp_path / name).write_bytes(data)
    index = prepare(tmp_path / name, tmp_path / "out")
    assert texts(tmp_path / "out") == SMALL
    assert index.report["documents"] == {"train": 5}
    assert index.report["bytes"] == {"train": sum(len(text.encode()) for text in SMALL)}
    assert index.made_from["files"] == 1


def test_parts_of_files_of_every_size_are_the_whole(tmp_path):
    """Units of a few bytes: every line is in exactly one of them, in order."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(SMALL))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["six", "seven"])[:-1].replace(b"\n", b"\r\n\n"))
    parquet(tmp_path / "c.parquet", [{"text": str(number) * 100} for number in range(9)])
    for size in (1, 7, 50, 130, 1000, 10_000):
        out = tmp_path / f"out{size}"
        index = prepare(str(tmp_path / "*.*"), out, unit_mb=size / 1e6)
        assert texts(out) == [*SMALL, "six", "seven", *(str(number) * 100 for number in range(9))]
        assert index.report["records"] == 16


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.sampled_from(["", " ", "a", "bb", "c c c", "\r"]), max_size=20),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_paragraphs_do_not_depend_on_where_a_file_is_cut(tmp_path, lines, cuts):
    data = "\n".join(lines).encode()
    (tmp_path / "a.txt").write_bytes(data)
    file = File(url=str(tmp_path / "a.txt"), size=len(data), version="", form="text")
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    rows = Rows(PrepareConfig(paragraphs=True))
    found, count = [], 0
    for start, end in itertools.pairwise(edges):
        for line, row in rows.of(file, Piece(0, start, end), lambda _: None):
            assert isinstance(row, Row)
            found.append((count + line, row.content))
        count += rows.count
    whole = re.finditer(r"(?:^[^\n]*\S[^\n]*(?:\n|\Z))+", data.decode(), re.MULTILINE)
    assert found == [(data[: each.start()].count(b"\n") + 1, each.group().removesuffix("\n")) for each in whole]


def test_text_files_are_documents_or_their_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("first\nof a\n\n\nsecond\n")
    (tmp_path / "b.md").write_text("third")
    prepare(str(tmp_path / "*.*"), tmp_path / "whole")
    assert texts(tmp_path / "whole") == ["first\nof a\n\n\nsecond\n", "third"]
    prepare(str(tmp_path / "*.*"), tmp_path / "parts", paragraphs=True)
    assert texts(tmp_path / "parts") == ["first\nof a", "second", "third"]


def test_the_split_goes_by_the_document_alone(tmp_path):
    every = list(dict.fromkeys(shakespeare()))
    (tmp_path / "a.jsonl").write_bytes(jsonl(every))
    (tmp_path / "b.jsonl").write_bytes(jsonl(reversed(every)))
    for name in "ab":
        index = prepare(tmp_path / f"{name}.jsonl", tmp_path / f"out-{name}", validation=0.1, unit_mb=0.5)
    held = texts(tmp_path / "out-a", "validation")
    assert set(held) == set(texts(tmp_path / "out-b", "validation"))
    assert sorted(held + texts(tmp_path / "out-a")) == sorted(text for text in every if text)
    assert 0.08 < len(held) / len(every) < 0.12
    assert index.report["documents"]["validation"] == len(held)
    prepare(tmp_path / "a.jsonl", tmp_path / "seeded", validation=0.1, seed=1)
    assert set(texts(tmp_path / "seeded", "validation")) != set(held)


@pytest.mark.parametrize("unit", [30, 100_000])
@pytest.mark.parametrize("buckets", [1, 3])
def test_of_equal_documents_the_first_stays(tmp_path, monkeypatch, unit, buckets):
    monkeypatch.setattr("llm.data.prepare.plan.BUCKET", 400 // buckets)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x", "y", "x", "z", "dropped", "y"]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(["new", "z", "new", "x", "last", "dropped"]))
    index = prepare(
        [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tmp_path / "out",
        deduplicate=True, drop="^drop", unit_mb=unit / 1e6,
    )  # fmt: skip
    assert texts(tmp_path / "out") == ["x", "y", "z", "new", "last"]
    assert index.report["duplicates"] == 5
    assert index.report["filtered"] == {"drop": 2}


def test_filters_say_what_they_leave_out(tmp_path):
    rows = [
        {"text": "kept text", "lang": "en", "meta": {"n": 1}},
        {"text": "französisch", "lang": "fr", "meta": {"n": 1}},
        {"text": "no language", "meta": {"n": 1}},
        {"text": "wrong number", "lang": "en", "meta": {"n": 2}},
        {"text": "ab", "lang": "de", "meta": {"n": 1}},
        {"text": "long " * 20, "lang": "en", "meta": {"n": 1}},
        {"text": "1234567 a", "lang": "en", "meta": {"n": 1}},
        {"text": "has a secret in it", "lang": "en", "meta": {"n": 1}},
    ]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    parquet(tmp_path / "a.parquet", rows)
    for name in ("a.jsonl", "a.parquet"):
        index = prepare(
            tmp_path / name, tmp_path / f"out-{name}", keep=["lang=en", "lang=de", "meta.n=1"],
            min_chars=3, max_chars=50, min_alpha=0.5, drop=r"\bsecret\b",
        )  # fmt: skip
        assert texts(tmp_path / f"out-{name}") == ["kept text"]
        assert index.report["filtered"] == {
            "keep lang": 2, "keep meta.n": 1, "min_chars": 1, "max_chars": 1, "min_alpha": 1, "drop": 1,
        }  # fmt: skip


def test_bad_lines_are_counted_and_named_by_file_and_line(tmp_path):
    good = json.dumps({"text": "good"}).encode()
    lines = [good, b"{", b'{"other": 1}', b"", b'{"text": 5}', b'{"text": "\xff"}', rb'{"text": "\ud800"}', b"[]", good]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good] * 20))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ConfigError) as refused:
        prepare(str(tmp_path / "*.jsonl"), tmp_path / "out", unit_mb=60e-6)
    assert "6 of 28 lines are bad" in str(refused.value)
    assert f"most, 6, in {tmp_path}/b.jsonl" in str(refused.value)
    assert not (tmp_path / "out" / "index.json").exists()
    # What was done counts: how many bad lines are taken decides no token.
    shard = tmp_path / "out" / "train-00000-000.tokens"
    before = shard.stat().st_mtime_ns
    assert prepare_data.main(
        ["--input", str(tmp_path / "*.jsonl"), "--output", str(tmp_path / "out"), "--unit-mb", "60e-6",
         "--validation", "0", "--max-bad-fraction", "0.5"]
    ) == 0  # fmt: skip
    assert shard.stat().st_mtime_ns == before
    assert texts(tmp_path / "out") == ["good"] * 22
    report = json.loads((tmp_path / "out" / "index.json").read_bytes())["report"]
    assert report["bad_lines"] == 6
    assert [sample.partition("b.jsonl:")[2].partition(":")[0] for sample in report["bad_samples"]] == list("235678")
    assert "missing required field `text`" in report["bad_samples"][1]
    assert "`int`" in report["bad_samples"][2]


def test_bad_rows_of_parquet(tmp_path):
    invalid = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(np.array([0, 2, 3, 5], "<i4")), pyarrow.py_buffer(b"ok\xffok")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "a.parquet")
    index = prepare(tmp_path / "a.parquet", tmp_path / "out", max_bad_fraction=0.5)
    assert texts(tmp_path / "out") == ["ok", "ok"]
    assert index.report["bad_samples"] == [f"{tmp_path}/a.parquet:2: invalid UTF-8"]
    parquet(tmp_path / "b.parquet", [{"text": "x"}, {"text": None}])
    assert prepare(tmp_path / "b.parquet", tmp_path / "b", max_bad_fraction=0.5).report["bad_lines"] == 1
    with pytest.raises(ConfigError, match="has no column 'content': it has text"):
        prepare(tmp_path / "b.parquet", tmp_path / "c", field="content")


def test_a_wrong_field_is_found_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(SMALL))
    with pytest.raises(ConfigError, match=r"a.jsonl:1: .*`content`.* none of the first 5 lines"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", field="content")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "no such format"])
def test_a_cut_file_is_named(tmp_path, name, damage):
    data = jsonl(SMALL * 50)
    if name.endswith("parquet"):
        parquet(tmp_path / name, [{"text": text} for text in SMALL])
        data = (tmp_path / name).read_bytes()
    else:
        data = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data)
    (tmp_path / name).write_bytes(data[: len(data) - 9] if damage == "cut" else b"x" * 100)
    with pytest.raises(ConfigError, match=f"{name} is (cut off|no |damaged)"):
        prepare(tmp_path / name, tmp_path / "out")


def test_packed_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(shakespeare()[:300]))
    index = prepare(tmp_path / "a.jsonl", tmp_path / "out", pack=128, unit_mb=0.01)
    assert (index.row, index.loss) == (129, True)
    tokens, _, loss = read_split(tmp_path / "out")
    assert loss is not None
    assert len(tokens) % 129 == 0
    assert 0.9 < index.report["packing_efficiency"]["train"] <= 1
    assert index.report["cut"]["train"] > 0
    # Every token but the first of each document is learnt exactly once.
    assert int(loss.sum()) == index.report["tokens"]["train"] - index.report["documents"]["train"]


def chat(answer: str) -> dict:
    return {"messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": answer}]}


def test_a_tokenizer_is_trained_and_lies_beside_the_index(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(shakespeare()[:1500]))
    index = prepare(tmp_path / "a.jsonl", tmp_path / "out", train_tokenizer=600, unit_mb=0.05, validation=0.1)
    assert (index.tokenizer.name, index.tokenizer.file) == ("bpe-600", "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert (tokenizer.sha256, tokenizer.vocab_size) == (index.tokenizer.sha256, 600)
    assert tokenizer.end == index.tokenizer.end is not None
    tokens, starts, _ = read_split(tmp_path / "out")
    documents = np.split(tokens, np.flatnonzero(starts)[1:])
    assert all(document[-1] == tokenizer.end for document in documents)
    assert len(tokens) < 0.6 * index.report["bytes"]["train"]
    held, began, _ = read_split(tmp_path / "out", "validation")
    found = [tokenizer.decode(part[:-1].tolist()) for part in documents + np.split(held, np.flatnonzero(began)[1:])]
    assert sorted(found) == sorted(text for text in shakespeare()[:1500] if text)
    # The same tokenizer, named as a file, makes the same tokens.
    again = prepare(
        tmp_path / "a.jsonl", tmp_path / "again", tokenizer=str(tmp_path / "out" / "tokenizer.json"), unit_mb=0.05,
        validation=0.1,
    )  # fmt: skip
    assert again.fingerprint() == index.fingerprint()


@pytest.mark.parametrize("pack", [None, 64])
def test_chats_teach_only_what_the_assistant_says(tmp_path, pack):
    (tmp_path / "a.jsonl").write_bytes(jsonl(shakespeare()[:300]))
    prepare(tmp_path / "a.jsonl", tmp_path / "text", train_tokenizer=400)
    tokenizer = load_tokenizer(str(tmp_path / "text"))
    bad = [{"messages": [{"role": "user", "content": "nobody answers"}]}, {"messages": "text"}]
    rows = [chat("It is so."), *bad, chat("No <|im_end|> here")]
    (tmp_path / "chat.jsonl").write_bytes(jsonl(rows))
    parquet(tmp_path / "chat.parquet", [row for row in rows if row["messages"] != "text"])
    made = []
    for name in ("chat.jsonl", "chat.parquet"):
        out = tmp_path / f"out-{name}"
        index = prepare(
            tmp_path / name, out, tokenizer=str(tmp_path / "text"), chat=True, max_bad_fraction=0.5, pack=pack
        )
        assert index.loss
        assert index.report["documents"] == {"train": 2}
        assert "chat.jsonl:2" in index.report["bad_samples"][0] or name == "chat.parquet"
        assert "no message of the assistant" in index.report["bad_samples"][0]
        tokens, _, loss = read_split(out)
        assert loss is not None
        said = ["It is so.<|im_end|>", "No <|im_end|> here<|im_end|>"]
        assert tokenizer.decode(tokens[loss].tolist()) == "".join(said if pack is None else said[::-1])  # longest first
        assert pack or np.count_nonzero(tokens == tokenizer.end) == 2  # filling is zeros, which is the same token
        made.append(tokens.tolist())
    assert made[0] == made[1]


def test_chats_need_a_tokenizer_that_can(tmp_path):
    (tmp_path / "chat.jsonl").write_bytes(jsonl([chat("yes")]))
    with pytest.raises(ConfigError, match="bytes has no chat_template"):
        prepare(tmp_path / "chat.jsonl", tmp_path / "out", chat=True)


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(SMALL))
    with pytest.raises(ConfigError, match=r"nothing is left .* of 5 documents \(5 min_chars\)"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", min_chars=1000)
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(ConfigError, match="there are none"):
        prepare(tmp_path / "b.jsonl", tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input": ["no/*.jsonl"]}, "nothing matches"),
        ({"input": ["."]}, "is a folder"),
        ({"input": ["a.jsonl", "*.jsonl"]}, "named twice"),
        ({"input": ["a.bin"]}, "does not say what it is"),
        ({"input": []}, "prepare.input is empty"),
        ({"output": "a.jsonl"}, "a.jsonl is there"),
        ({"output": "."}, "a.jsonl is there"),
        ({"input": ["**/*.jsonl"], "output": "sub/out"}, "lies inside prepare.input"),
        ({"drop": "("}, "no regular expression"),
        ({"keep": ["lang"]}, "field=value"),
        ({"max_chars": 3, "min_chars": 5}, "nothing is left"),
        ({"validation": 1.0}, "prepare.validation=1"),
        ({"chat": True, "paragraphs": True}, "a paragraph is no chat"),
        ({"train_tokenizer": 500, "tokenizer": "x.json"}, "set one of them"),
        ({"input": ["a.txt"], "keep": ["a=b"]}, "plain text"),
        ({"tokenizer": "nonsense"}, "nonsense"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(jsonl(SMALL))
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "a.txt").write_bytes(b"x")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(said)):
        prepare(**{"source": ["a.jsonl"], "output": "out", **options})
    assert contents(tmp_path) == before


def test_another_dataset_is_kept_unless_it_may_be_overwritten(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(SMALL))
    out = tmp_path / "out"
    prepare(tmp_path / "a.jsonl", out, unit_mb=50e-6)
    first = contents(out)
    assert prepare(tmp_path / "a.jsonl", out, unit_mb=50e-6)  # nothing to do
    assert contents(out) == first
    with pytest.raises(ConfigError, match=r"holds another dataset .its min_chars is 1, not 4"):
        prepare(tmp_path / "a.jsonl", out, unit_mb=50e-6, min_chars=4)
    (tmp_path / "a.jsonl").write_bytes(jsonl([*SMALL, "more"]))
    with pytest.raises(ConfigError, match="its input files have changed"):
        prepare(tmp_path / "a.jsonl", out, unit_mb=50e-6)
    assert contents(out) == first
    prepare(tmp_path / "a.jsonl", out, overwrite=True)
    assert texts(out) == [*SMALL, "more"]
    assert set(contents(out)) == {"index.json", "train-00000-000.tokens"}


def test_a_shard_that_is_gone_is_made_again(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(SMALL))
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--max-bad-fraction", "0"]
    with (tmp_path / "a.jsonl").open("ab") as stream:
        stream.write(b"bad\n")
    assert prepare_data.main(arguments) == 2
    (tmp_path / "out" / "train-00000-000.tokens").unlink()
    arguments[-1] = "1"
    assert prepare_data.main(arguments) == 1
    assert prepare_data.main(arguments) == 0


def test_flags_and_config_are_one(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(SMALL))
    (tmp_path / "run.yaml").write_text(
        f"model: ignored\nprepare: {{input: ['{tmp_path}/a.jsonl'], output: '{tmp_path}/out', validation: 0.0}}\n"
    )
    assert prepare_data.main(["--config", str(tmp_path / "run.yaml"), "--min-chars", "5", "--workers", "1"]) == 0
    assert texts(tmp_path / "out") == SMALL[1:3] + SMALL[4:]
    assert "prepared 1 units; 0 had been prepared before" in capsys.readouterr().out
    options = json.loads((tmp_path / "out" / "index.json").read_bytes())["made_from"]["options"]
    assert options["min_chars"] == 5
    assert prepare_data.main(["--config", str(tmp_path / "run.yaml"), "--min-chars", "x"]) == 2
    assert "min_chars" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("prepare: {inputs: []}")
    assert prepare_data.main(["--config", str(tmp_path / "bad.yaml")]) == 2
    assert "inputs" in capsys.readouterr().err


def test_every_option_has_its_flag():
    flags = {action.dest for action in prepare_data._parser()._actions}
    assert {field.name for field in msgspec.structs.fields(PrepareConfig)} <= flags


def test_an_object_store(tmp_path, s3_url, capsys):
    """Input and output in S3; the same tokens as from the folder."""
    from llm.utils.storage import open_storage

    every = shakespeare()[:2000]
    store = open_storage(s3_url)
    for name, data in (("b", every[1000:]), ("a", every[:1000])):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(jsonl(data)))
        store.write(f"in/{name}.jsonl.gz", (tmp_path / f"{name}.jsonl.gz").read_bytes())
    options = ["--unit-mb", "0.04", "--workers", "2", "--deduplicate"]
    assert prepare_data.main(["--input", f"{s3_url}/in/*.gz", "--output", f"{s3_url}/out", *options]) == 0
    assert "prepared 2 units" in capsys.readouterr().out
    assert prepare_data.main(["--input", f"{tmp_path}/*.gz", "--output", f"{tmp_path}/out", *options]) == 0
    assert texts(f"{s3_url}/out") == texts(tmp_path / "out")
    files = {name for name, size in store.sizes("out").items() if size is not None}
    assert files == set(contents(tmp_path / "out"))
