"""The stream: which windows a global batch holds, whoever asks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.permutation import permute
from llm.data.source import load_text
from llm.data.streaming import Ranges, Windows, batches, held_out_batches
from llm.data.tokenizer import ByteTokenizer
from llm.utils.config import ConfigError

TEXT = memoryview(bytes(range(256)) * 5)  # 127 windows of 10


def global_batch(batch: int, ranks: int, seed: int = 0) -> torch.Tensor:
    return torch.cat([Windows(TEXT, 10, seed, rank, ranks)[rows_of(batch)] for rank in range(ranks)])


def rows_of(batch: int) -> Ranges:
    return ((8 * batch, 8 * batch + 8),)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 700), key=st.integers(0, 2**70))
def test_a_permutation_hits_every_index_once(n: int, key: int) -> None:
    assert sorted(permute(index, n, key) for index in range(n)) == list(range(n))


def test_a_permutation_of_a_huge_range_stays_inside() -> None:
    assert {permute(index, 10**15 + 7, 3) < 10**15 + 7 for index in range(200)} == {True}
    with pytest.raises(IndexError):
        permute(7, 7, 0)


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    for batch in (0, 3, 15, 16, 1000):
        for ranks in (2, 4, 8):
            assert torch.equal(global_batch(batch, 1), global_batch(batch, ranks))


def test_every_window_comes_once_an_epoch_in_another_order() -> None:
    windows = Windows(TEXT, 10, seed=0)
    assert windows.count == 127
    rows = [windows.window(sequence) for sequence in range(3 * 127)]
    epochs = [rows[start : start + 127] for start in range(0, len(rows), 127)]
    assert all(sorted(epoch) == list(range(127)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_windows_hold_the_text_and_the_next_byte() -> None:
    windows = Windows(TEXT, 10, seed=0)
    for row, values in enumerate(windows[rows_of(5)].tolist()):
        start = windows.window(40 + row) * 10
        assert bytes(values) == bytes(TEXT[start : start + 11])


def test_a_batch_goes_around_what_is_left_out() -> None:
    whole = Windows(TEXT, 10, seed=0)
    rows = torch.cat([Windows(TEXT, 10, 0, rank, 2)[((3, 5), (9, 11))] for rank in range(2)])
    assert torch.equal(rows, torch.cat((whole[((3, 5),)], whole[((9, 11),)])))


def test_seeds_differ() -> None:
    assert not torch.equal(global_batch(0, 1, seed=0), global_batch(0, 1, seed=1))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_processes_keep_the_order_from_any_position(workers: int) -> None:
    windows = Windows(TEXT, 10, seed=0, rank=1, world_size=2)
    found = list(batches(windows, map(rows_of, range(20, 31)), workers))
    assert len(found) == 11
    assert all(torch.equal(rows, windows[rows_of(20 + index)]) for index, rows in enumerate(found))


def test_held_out_batches_are_in_order_and_equal_on_all_ranks() -> None:
    whole = torch.cat(list(held_out_batches(TEXT, 10, 8, 100, 0, 1)))
    assert len(whole) == 127
    shares = [list(held_out_batches(TEXT, 10, 8, 100, rank, 2)) for rank in range(2)]
    assert [len(rows) for rows in shares[0]] == [len(rows) for rows in shares[1]] == [4] * 15 + [3]
    assert list(held_out_batches(TEXT[:5], 10, 8, 4, 0, 1)) == []


def test_the_embedded_text_is_split() -> None:
    text = load_text("embedded:shakespeare", 0.05)
    assert len(text.held_out) == int(0.05 * (len(text.train) + len(text.held_out)))
    assert b"To be, or not to be" in bytes(text.train)
    assert text.fingerprint == load_text("embedded:shakespeare", 0.1).fingerprint


def test_text_files_and_urls(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(TEXT))
    plain, url = load_text(str(tmp_path / "a.txt"), 0.5), load_text(f"file://{tmp_path}/a.txt", 0.5)
    assert bytes(plain.train) + bytes(plain.held_out) == bytes(TEXT) == bytes(url.train) + bytes(url.held_out)
    assert plain.fingerprint == url.fingerprint


@pytest.mark.parametrize("source", ["embedded:nothing", "/nowhere/x.txt", "file:///nowhere/x.txt"])
def test_a_missing_text_is_a_config_error(source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.source="):
        load_text(source, 0.1)


def test_too_short_a_text_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"train\.seq_len=10"):
        Windows(TEXT[:10], 10, 0)


def test_bytes_round_trip() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve ☃\n")) == "naïve ☃\n"
    assert tokenizer.decode([0xFF, 65, 999]) == "\ufffdA"
