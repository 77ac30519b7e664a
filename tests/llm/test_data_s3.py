"""Datasets in a real object store: what is asked of it, what a node keeps, and what happens when it stumbles."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from llm.data.format import DataError
from llm.data.order import Order, Position
from llm.data.reading import Reader, Share
from llm.data.source import Opened, open_source
from llm.utils.config import ConfigError, DataConfig
from llm.utils.object_storage import ObjectStorage
from llm.utils.storage import open_storage
from tests.checkpoint.proxy import Faults, Proxy, proxy
from tests.llm.datasets import documents, make

SEQ_LEN = 128


@pytest.fixture(scope="module")
def place(s3_server: str) -> str:
    url = "s3://runs/dataset"
    make(open_storage(url), documents(900), shard=30_000)
    return url


@pytest.fixture
def between(s3_server: str, place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that this process reaches the store through."""
    with proxy(s3_server) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield made
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def opened(place: str, **changes: object) -> Opened:
    return open_source("data.source", place, DataConfig(source=place, **changes), SEQ_LEN)  # type: ignore[arg-type]


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited 60 s for {what}"
        time.sleep(0.02)


def files_of(place: str) -> list[str]:
    return [name for name in open_storage(place).list("") if name.startswith("train-")]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/*.tokens"))


def test_a_sample_costs_one_small_request_from_anywhere(place: str, between: Proxy, tmp_path: Path) -> None:
    local = tmp_path / "copy"
    make(open_storage(str(local)), documents(900), shard=30_000)
    near, far = opened(str(local)).train, opened(place, cache_gb=0).train
    assert not far.near
    far.row(0)
    before = between.count("GET .*tokens")
    numbers = np.random.default_rng(0).integers(0, far.size, 20).tolist()
    for number in numbers:
        ours, theirs = far.row(number), near.row(number)
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.counted is not None
        assert theirs.counted is not None
        assert ours.counted.tolist() == theirs.counted.tolist()
    assert between.count("GET .*tokens") - before <= 2 * len(numbers)  # two where a sample crosses shards


def test_reads_go_out_together_and_in_order(place: str) -> None:
    source = opened(place, cache_gb=0).train
    order = Order({"data": source.size}, {"data": [(0, 1.0)]}, 0)
    picks, position = [], Position()
    for _ in range(6):
        picks.append(order.take(position, [(position.samples, position.samples + 8)]))
        position = picks[-1].after
    reader = Reader([source], SEQ_LEN, 2, 3)
    found = [rows.tokens[:, 0].tolist() for _, rows in reader.batches(order, picks, Share())]
    assert found == [
        [int(source.row(index).tokens[0]) for index in order.indices(0, each.ordinals).tolist()] for each in picks
    ]
    reader.close()


def test_a_node_keeps_shards_once_and_needs_the_store_no_more(place: str, between: Proxy, tmp_path: Path) -> None:
    first, second = (opened(place, cache_dir=str(tmp_path)) for _ in range(2))
    assert first.cache is not None
    assert second.cache is not None
    first.cache.fill(0, 2)
    second.cache.fill(1, 2)
    names = [shard.name for shard in first.cache._shards]
    wait_for(lambda: files(tmp_path) == sorted(names), "all shards to be on this node")
    first.cache.close()
    second.cache.close()
    assert between.count("GET .*tokens") <= len(names) + 1, "two ranks brought each of them once"
    between.faults = Faults(refuse=True)
    third = opened_again(place, between, tmp_path)
    assert third.train.row(100).tokens.tolist() == first.train.row(100).tokens.tolist()
    assert not [path for path in tmp_path.glob("*/.*") if path.suffix != ".lock"], "nothing half-written is left"


def test_copies_make_a_source_near(place: str, tmp_path: Path) -> None:
    source = opened(place, cache_dir=str(tmp_path))
    order = Order({"data": source.train.size}, {"data": [(0, 1.0)]}, 0)
    picks = [order.take(Position(), [(0, source.train.size)])]

    def read() -> list[int]:
        reader = Reader([source.train], SEQ_LEN, 2, 3)
        (batch,) = (rows.tokens.sum(1).tolist() for _, rows in reader.batches(order, picks, Share()))
        reader.close()
        return list(batch)

    before = read()
    assert not source.train.near
    assert source.cache is not None
    source.cache.fill(0, 1)
    wait_for(lambda: not source.cache._thread.is_alive(), "the filling to end")  # type: ignore[union-attr]
    assert read() == before
    assert source.train.near
    assert read() == before


def opened_again(place: str, between: Proxy, folder: Path) -> Opened:
    between.faults = Faults()
    made = opened(place, cache_dir=str(folder))
    between.faults = Faults(refuse=True)
    return made


def test_the_bound_holds_and_what_is_unused_goes_first(place: str, s3_url: str, tmp_path: Path) -> None:
    other = make(open_storage(s3_url), documents(900, seed=4), shard=30_000)
    size = opened(place).cache.bytes  # type: ignore[union-attr]
    bound = size * 1.5 / 1e9
    for url in (s3_url, place):
        cache = opened(url, cache_dir=str(tmp_path), cache_gb=bound).cache
        assert cache is not None
        cache.fill(0, 1)
        wait_for(lambda cache=cache: not cache._thread.is_alive(), "the filling to end")
    kept = list(tmp_path.glob("*/*.tokens"))
    assert sum(path.stat().st_size for path in kept) <= bound * 1e9
    old = [path for path in kept if path.parent.name == other.fingerprint()]
    assert 0 < len(old) < len(other.splits["train"])
    assert len(kept) - len(old) == len(files_of(place))
    # A dataset that does not fit whole is read from the store, a sample at a time.
    tight = opened(place, cache_dir=str(tmp_path / "tight"), cache_gb=size / 4e9)
    assert tight.cache is not None
    tight.cache.fill(0, 1)
    wait_for(lambda: not tight.cache._thread.is_alive(), "the filling to end")  # type: ignore[union-attr]
    assert sum(path.stat().st_size for path in (tmp_path / "tight").glob("*/*.tokens")) <= size / 4
    assert len(tight.train.row(5).tokens) == SEQ_LEN + 1


def test_a_damaged_copy_is_dropped_and_the_store_asked(place: str, tmp_path: Path) -> None:
    source = opened(place, cache_dir=str(tmp_path))
    assert source.cache is not None
    expected = source.train.row(0).tokens.tolist()
    source.cache.fill(0, 1)
    wait_for(lambda: not source.cache._thread.is_alive(), "the filling to end")  # type: ignore[union-attr]
    for path in tmp_path.glob("*/*.tokens"):
        data = bytearray(path.read_bytes())
        data[7] ^= 1
        path.write_bytes(data)
    again = opened(place, cache_dir=str(tmp_path))
    assert again.train.row(0).tokens.tolist() == expected
    assert not again.train.near
    assert len(files(tmp_path)) == len(files_of(place)) - 1


def test_hiccups_are_tried_again_and_an_end_to_that_is_an_error(
    place: str, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(place, cache_gb=0).train
    expected = source.row(7).tokens.tolist()
    between.faults = Faults(match="GET .*tokens", refuse=True, first=3)
    assert source.row(7).tokens.tolist() == expected
    between.faults = Faults(match="GET .*tokens", cut_answer=4000, first=2)
    assert source.row(7).tokens.tolist() == expected
    monkeypatch.setattr("llm.utils.object_storage.PATIENCE_S", 2.0)
    between.faults = Faults(match="GET .*tokens", refuse=True)
    with pytest.raises(OSError, match=r"get s3://runs/dataset/train-00000-000\.tokens failed for"):
        source.row(7)


def test_a_shard_that_is_gone_is_named(s3_url: str) -> None:
    index = make(open_storage(s3_url), documents(50), shard=3_000)
    source = opened(s3_url, cache_gb=0).train
    storage = open_storage(s3_url)
    assert isinstance(storage, ObjectStorage)
    storage.remove(index.splits["train"][0].name)
    with pytest.raises(DataError, match=rf"{s3_url}/train-00000-000\.tokens is missing"):
        source.row(0)


def test_a_cache_that_cannot_be_made_is_a_config_error(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.* cannot be made"):
        opened(place, cache_dir=str(tmp_path / "file" / "below"))
    assert os.environ["AWS_ENDPOINT_URL"]
