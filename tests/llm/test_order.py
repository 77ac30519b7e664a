"""The order of a stream: every sample once an epoch, whoever asks, wherever a run stops, whatever the mixture."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.order import NOTHING, STRATUM, Order, Picks, Position
from llm.data.permutation import mix, mix_all, permute
from llm.data.reading import Share

sizes = st.dictionaries(st.sampled_from(["web", "code", "books"]), st.integers(1, 40), min_size=1)


def order_of(given: dict[str, int], seed: int = 0, epochs: int | None = None, **weights: float) -> Order:
    return Order(given, {name: [(0, weights.get(name, 1.0))] for name in given}, seed, epochs)


def samples(order: Order, picks: Picks) -> list[tuple[int, int]]:
    """(source, index) of every row; (-1, -1) for one that counts for nothing."""
    found = []
    for source, ordinal in zip(picks.sources.tolist(), picks.ordinals.tolist(), strict=True):
        index = -1 if ordinal == NOTHING else int(order.indices(source, np.array([ordinal]))[0])
        found.append((source if ordinal != NOTHING else -1, index))
    return found


def walk(order: Order, batches: list[int], position: Position | None = None) -> tuple[list[tuple[int, int]], Position]:
    """All samples of batches of these sizes, and the position after them."""
    at, found = position or Position(), []
    for size in batches:
        picks = order.take(at, [(at.samples, at.samples + size)])
        found += samples(order, picks)
        at = picks.after
    return found, at


@settings(max_examples=50)
@given(n=st.integers(1, 700), key=st.integers(0, 2**70))
def test_a_permutation_hits_every_index_once(n: int, key: int) -> None:
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


def test_a_permutation_of_a_huge_range_stays_inside() -> None:
    found = permute(np.arange(200), 10**15 + 7, 3)
    assert len(set(found.tolist())) == 200
    assert 0 <= found.min() <= found.max() < 10**15 + 7
    with pytest.raises(IndexError):
        permute(np.array([7]), 7, 0)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_numbers_are_mixed_alike_one_by_one_and_together(values: list[int]) -> None:
    assert mix_all(np.array(values, np.uint64)).tolist() == [mix(value) for value in values]


@settings(max_examples=40)
@given(sizes, st.integers(0, 3), st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 11))
def test_a_resume_goes_on_as_if_nothing_had_happened(
    given: dict[str, int], seed: int, batches: list[int], stop: int
) -> None:
    order = order_of(given, seed, web=3.0, code=0.5)
    whole, end = walk(order, batches)
    first, position = walk(order, batches[:stop])
    second, resumed_end = walk(order_of(given, seed, web=3.0, code=0.5), batches[stop:], position)
    assert first + second == whole
    assert resumed_end == end
    assert order.position(end.samples) == end
    # Nor does it matter into which batches the same places are divided.
    assert walk(order, [sum(batches)])[0] == whole


@settings(max_examples=40)
@given(sizes, st.integers(0, 3), st.integers(1, 200))
def test_each_epoch_of_a_source_has_each_of_its_samples_once(given: dict[str, int], seed: int, places: int) -> None:
    order = order_of(given, seed, code=2.0)
    found, position = walk(order, [places])
    for number, name in enumerate(order.names):
        own = [index for source, index in found if source == number]
        assert len(own) == position.counts[name]
        epochs = [own[at : at + given[name]] for at in range(0, len(own), given[name])]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert all(set(epoch) == set(range(given[name])) for epoch in epochs if len(epoch) == given[name])


def test_each_epoch_has_an_order_of_its_own() -> None:
    order = order_of({"data": 50})
    found, _ = walk(order, [200])
    epochs = {tuple(index for _, index in found[at : at + 50]) for at in range(0, 200, 50)}
    assert len(epochs) == 4
    assert walk(order_of({"data": 50}, seed=1), [200])[0] != found


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 8), st.integers(1, 3))
def test_a_limited_stream_has_every_sample_exactly_so_often(ranks: int, size: int, rows: int, epochs: int) -> None:
    order = order_of({"data": size}, epochs=epochs)
    position, seen, batches = Position(), Counter[int](), 0
    over = order.over(position)
    while not over:
        picks = order.take(position, [(position.samples, position.samples + ranks * rows)])
        for rank in range(ranks):
            share = Share(rank, ranks)
            own = Picks(share.take(picks.sources), share.take(picks.ordinals), picks.after, picks.over)
            assert len(own.sources) == rows
            seen.update(index for _, index in samples(order, own) if index >= 0)
        position, over, batches = picks.after, picks.over, batches + 1
    assert seen == dict.fromkeys(range(size), epochs)
    assert batches == -(-size * epochs // (ranks * rows))
    assert order.end(10**9) == size * epochs


def test_a_limited_mixture_ends_before_a_source_begins_again() -> None:
    order = order_of({"big": 10_000, "small": 30}, epochs=2, big=0.5, small=0.5)
    found, position, over = [], Position(), False
    while not over:
        picks = order.take(position, [(position.samples, position.samples + 16)])
        found += samples(order, picks)
        position, over = picks.after, picks.over
    count = Counter(source for source, _ in found)
    assert count[1] == 60
    assert 40 < count[0] < 80
    assert order.end(10**9) == count[0] + count[1]
    assert order.end(7) == 7
    assert 0 <= count[-1] < 16


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 5), st.integers(0, 3 * STRATUM))
def test_shares_are_exact_over_a_stratum(weights: list[int], seed: int, first: int) -> None:
    names = "abcd"[: len(weights)]
    order = Order(
        dict.fromkeys(names, 10**6), {name: [(0, w)] for name, w in zip(names, weights, strict=True)}, seed, None
    )
    first = first // STRATUM * STRATUM
    counts = np.bincount(order.sources(first, first + STRATUM), minlength=len(weights))
    wanted = np.array(weights) / sum(weights) * STRATUM
    assert np.abs(counts - wanted).max() <= 1


def test_weights_change_at_their_place_and_nothing_is_lost() -> None:
    weights = {"a": [(0, 1.0), (5000, 0.0)], "b": [(0, 0.0), (5000, 1.0)], "c": [(3000, 1.0)]}
    order = Order(dict.fromkeys(weights, 10**6), weights, 7)
    assert set(order.sources(0, 3000).tolist()) == {0}
    assert set(order.sources(3000, 5000).tolist()) == {0, 2}
    assert set(order.sources(5000, 9000).tolist()) == {1, 2}
    # Other weights after a resume: every source goes on where it was.
    _, position = walk(order, [6000])
    changed = Order(dict.fromkeys(weights, 10**6), {"a": [(0, 1.0)], "b": [(0, 9.0)]} | {"c": [(0, 0.0)]}, 7)
    picks = changed.take(position, [(6000, 6100)])
    for number, name in enumerate(changed.names):
        own = picks.ordinals[picks.sources == number]
        assert own.tolist() == list(range(position.counts[name], position.counts[name] + len(own)))


def test_what_is_left_out_counts_as_gone_past() -> None:
    order = order_of({"a": 100, "b": 100})
    whole, end = walk(order, [40])
    picks = order.take(Position(), [(3, 5), (9, 11)])
    assert samples(order, picks) == [*whole[3:5], *whole[9:11]]
    assert samples(order, order.take(picks.after, [(11, 40)])) == whole[11:]
    assert order.take(picks.after, [(11, 40)]).after == end
