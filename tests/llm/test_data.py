"""Sources and the reading of them: the right tokens in every row, and a clear word for what cannot be read."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.data.blocks import Blocks
from llm.data.format import BLOCK, DataError, read_index, record, token_type
from llm.data.order import Order, Picks, Position
from llm.data.reading import Reader, Rows, Share
from llm.data.source import ByteSource, Opened, Source, TokenSource, open_source
from llm.data.tokenizer import ByteTokenizer
from llm.utils.config import ConfigError, DataConfig
from llm.utils.storage import open_storage
from tests.llm.datasets import documents, make

TEXT = memoryview(bytes(range(256)) * 5)  # 128 windows of 10, the last one not full
SEQ_LEN = 48


def opened(place: str | Path, seq_len: int = SEQ_LEN, **changes: object) -> Opened:
    return open_source("data.source", str(place), DataConfig(source=str(place), **changes), seq_len)  # type: ignore[arg-type]


def order_of(source: Source) -> Order:
    return Order({"data": source.size}, {"data": [(0, 1.0)]}, 0)


def all_picks(order: Order, batch: int, batches: int, first: int = 0) -> list[Picks]:
    found, position = [], order.position(first * batch)
    for _ in range(batches):
        found.append(order.take(position, [(position.samples, position.samples + batch)]))
        position = found[-1].after
    return found


def read_all(source: Source, threads: int, share: Share, first: int = 0, batches: int = 9) -> list[Rows]:
    order = order_of(source)
    reader = Reader([source], SEQ_LEN, threads, 3)
    return [rows for _, rows in reader.batches(order, all_picks(order, 8, batches, first), share)]


# ---- text ------------------------------------------------------------------------------------------------------------


def test_windows_hold_every_byte_as_a_target_once() -> None:
    source = ByteSource(TEXT, 10)
    assert source.size == 128
    targets = []
    for number in range(source.size):
        row = source.row(number)
        assert row.tokens.shape == (11,)
        counted = np.ones(10, bool) if row.counted is None else row.counted
        targets += row.tokens[1:][counted].tolist()
    assert bytes(targets) == bytes(TEXT[1:])


def test_the_embedded_text_is_split() -> None:
    whole, half = opened("embedded:shakespeare"), opened("embedded:shakespeare", validation_fraction=0.5)
    assert isinstance(whole.train, ByteSource)
    assert whole.validation.tokens == int(0.05 * (whole.train.tokens + whole.validation.tokens))
    assert (
        whole.train.row(0)
        .tokens.tobytes()
        .startswith(b"First Citizen" if False else whole.train.row(0).tokens[:8].tobytes())
    )
    assert whole.fingerprint != half.fingerprint


def test_text_files_and_urls(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(TEXT))
    plain, url = opened(tmp_path / "a.txt"), opened(f"file://{tmp_path}/a.txt")
    assert plain.fingerprint == url.fingerprint
    assert plain.train.row(3).tokens.tolist() == url.train.row(3).tokens.tolist()


@pytest.mark.parametrize("source", ["embedded:nothing", "/nowhere/x.txt", "file:///nowhere/x.txt", "/tmp"])
def test_a_missing_text_is_a_config_error(source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.source="):
        opened(source)


def test_too_short_a_text_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    with pytest.raises(ConfigError, match=r"data\.source=.* has 1 bytes"):
        opened(tmp_path / "a.txt")


# ---- datasets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents end to end, in shards of 20,000 tokens."""
    folder = tmp_path_factory.mktemp("dataset")
    make(open_storage(str(folder)), documents(900), shard=20_000)
    return folder


def test_every_token_is_a_target_once_but_the_first_of_a_document(dataset: Path) -> None:
    source = opened(dataset).train
    texts = documents(900)[90:]
    assert source.tokens == sum(map(len, texts))
    targets = []
    for number in range(source.size):
        row = source.row(number)
        assert row.counted is not None
        targets += row.tokens[1:][row.counted].tolist()
    assert targets == [token for text in texts for token in text[1:].tolist()]


def test_documents_of_a_row_are_numbered(dataset: Path) -> None:
    source = opened(dataset).train
    (rows,) = Reader([source], SEQ_LEN, 0, 1).held_out(source, 500, 1, Share())
    assert rows.documents is not None
    assert rows.counted is not None
    follows = rows.documents[:, 1:] == rows.documents[:, :-1]
    assert torch.equal(rows.counted[:, :-1], follows), "a target counts if it is of the document that it is learnt from"
    unmasked = next(iter(Reader([source], SEQ_LEN, 0, 1, masked=False).held_out(source, 500, 1, Share())))
    assert unmasked.documents is None
    assert torch.equal(unmasked.counted, rows.counted)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [False, True])
def test_packed_rows(tmp_path: Path, loss: bool) -> None:
    texts = documents(300, 1)
    make(open_storage(str(tmp_path)), texts, row=SEQ_LEN + 1, loss=loss)
    source = opened(tmp_path).train
    targets = []
    for number in range(source.size):
        row = source.row(number)
        assert row.counted is not None
        targets += row.tokens[1:][row.counted].tolist()
    wanted = [token for text in texts[30:] for token in text[1:].tolist() if not loss or token % 3]
    assert sorted(targets) == sorted(wanted)
    with pytest.raises(ConfigError, match=r"train\.seq_len=64.*packed for sequences of 48"):
        opened(tmp_path, 64)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_batches_are_the_same_for_any_number_of_ranks_and_threads_from_anywhere(
    dataset: Path, threads: int, ranks: int
) -> None:
    source = opened(dataset).train
    whole = read_all(source, 0, Share())
    shares = [read_all(source, threads, Share(rank, ranks), first=4, batches=5) for rank in range(ranks)]
    for number, rows in enumerate(whole[4:]):
        for name in ("tokens", "counted", "documents"):
            parts = [getattr(share[number], name) for share in shares]
            assert torch.equal(torch.cat(parts), getattr(rows, name))


def test_held_out_rows_come_once_and_every_rank_has_equally_many(dataset: Path) -> None:
    source = opened(dataset).validation
    reader = Reader([source], SEQ_LEN, 0, 1)
    whole = list(reader.held_out(source, 16, 10**6, Share()))
    assert sum(int(rows.counted.sum()) for rows in whole if rows.counted is not None) == sum(
        len(text) - 1 for text in documents(900)[:90]
    )
    shares = [list(reader.held_out(source, 16, 10**6, Share(rank, 4))) for rank in range(4)]
    assert [len(rows) for rows in shares[0]] == [len(rows) for rows in shares[3]]
    for number, rows in enumerate(whole):
        together = torch.cat([share[number].tokens for share in shares])
        assert torch.equal(together[: len(rows)], rows.tokens)
        extra = [share[number].counted for share in shares]
        assert int(torch.cat(extra)[len(rows) :].sum()) == 0  # type: ignore[arg-type]


def test_a_file_can_be_mapped(dataset: Path) -> None:
    index = read_index(open_storage(str(dataset)))
    assert index is not None
    shard = index.splits["train"][0]
    mapped = np.memmap(dataset / shard.name, dtype=record(index.dtype, index.loss), mode="r")
    tokens = mapped["tokens"].reshape(-1)[: shard.tokens]
    assert tokens.tolist() == np.concatenate(documents(900)[90:])[: shard.tokens].tolist()
    assert token_type(1 << 16) == "uint16"
    assert token_type((1 << 16) + 1) == "uint32"


# ---- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A dataset to damage."""
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 2 * BLOCK + 5, 2 * BLOCK + BLOCK // 8])  # a token, a document's start, the checksum
def test_a_flipped_bit_is_found(copy: Path, at: int) -> None:
    damage(copy / "train-00000-001.tokens", at)
    source = opened(copy).train
    with pytest.raises(DataError, match=r"train-00000-001\.tokens: block 0 is damaged"):
        read_all(source, 2, Share(), batches=600)


def test_a_shard_cut_off_missing_or_of_another_preparation_is_found(copy: Path, tmp_path: Path) -> None:
    index = read_index(open_storage(str(copy)))
    assert index is not None
    one, two = index.splits["train"][1:3]
    path, whole = copy / one.name, (copy / one.name).read_bytes()

    def read() -> None:
        Blocks(open_storage(str(copy)), index).read(one, 0, 3)

    read()
    path.write_bytes(whole[:-3000])
    with pytest.raises(DataError, match="is cut off: block 2"):
        read()
    path.write_bytes((copy / two.name).read_bytes())
    with pytest.raises(DataError, match="damaged, or the file was written anew"):
        read()
    path.unlink()
    with pytest.raises(DataError, match=rf"{one.name} is missing"):
        read()


def test_a_file_that_changes_under_a_running_job_is_found(copy: Path) -> None:
    source = opened(copy).train
    source.row(0)
    make(open_storage(str(copy)), documents(900, seed=5), shard=20_000)
    with pytest.raises(DataError, match="written anew"):
        list(map(source.row, range(source.size)))


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is no index"), ('{"format": 2}', "is no index"), ('{"format": 1, "splits": {}}', "is no index")],
)
def test_a_damaged_index_is_a_config_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        opened(tmp_path)


def test_a_dataset_without_training_tokens_is_a_config_error(tmp_path: Path) -> None:
    make(open_storage(str(tmp_path)), [])
    with pytest.raises(ConfigError, match="no tokens to train on"):
        opened(tmp_path)


def test_memory_does_not_grow_with_what_is_read(dataset: Path) -> None:
    import tracemalloc

    source = opened(dataset).train
    assert isinstance(source, TokenSource)
    order = order_of(source)
    reader = Reader([source], SEQ_LEN, 2, 3)

    def read(batches: int) -> int:
        for _ in reader.batches(order, all_picks(order, 8, batches), Share()):
            pass
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = read(20)
        assert read(400) - first < 200_000  # bytes; twenty epochs
    finally:
        tracemalloc.stop()


def test_bytes_round_trip() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve ☃\n")) == "naïve ☃\n"
    assert tokenizer.decode([0xFF, 65, 999]) == "\ufffdA"


def test_positions_are_plain_values() -> None:
    assert dataclasses.asdict(Position(3, {"a": 1})) == {"samples": 3, "counts": {"a": 1}}
