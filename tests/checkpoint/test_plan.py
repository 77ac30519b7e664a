"""The plan of a load: every wanted byte is read, checked, and delivered once."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.checkpoint import plan as planning
from llm.checkpoint import reader
from llm.checkpoint.format import CheckpointError, DamagedError
from llm.checkpoint.lineage import read_manifest, read_part
from llm.checkpoint.plan import Want, alone, check, incoming, outgoing, plan
from llm.checkpoint.reader import read_span
from llm.utils.storage import Storage, open_storage
from tests.checkpoint.maker import NAMES, make_commit

RNG = np.random.default_rng(5)


@pytest.fixture
def memory(memory_url) -> Storage:
    return open_storage(memory_url)


@st.composite
def cuts(draw, shape, size):
    """A box, cut again and again: (rank, offset, extent), together the whole, in any layout."""
    done, waiting = [], [((0,) * len(shape), tuple(shape))]
    while waiting:
        offset, extent = waiting.pop()
        axes = [axis for axis, n in enumerate(extent) if n > 1]
        if not axes or len(done) + len(waiting) >= 8 or draw(st.booleans()):
            done.append((draw(st.integers(0, size - 1)), list(offset), list(extent)))
            continue
        axis = draw(st.sampled_from(axes))
        at = draw(st.integers(1, extent[axis] - 1))
        for begin, n in ((0, at), (at, extent[axis] - at)):
            waiting.append(
                (
                    (*offset[:axis], offset[axis] + begin, *offset[axis + 1 :]),
                    (*extent[:axis], n, *extent[axis + 1 :]),
                )
            )
    return done


TYPES = [np.dtype(name) for name in ("bool", "uint8", "float16", "float32", "int64")]


@st.composite
def jobs(draw):
    """(tensors, what each saved rank holds, what each loading rank wants)."""
    saved, loading = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    tensors, held, wants = {}, [{} for _ in range(saved)], {rank: [] for rank in range(loading)}
    for number in range(draw(st.integers(1, 3))):
        name, dtype = f"t{number}", draw(st.sampled_from(TYPES))
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 31, 90]), max_size=3)))
        data = RNG.integers(0, 255, math.prod(shape) * dtype.itemsize, np.uint8)
        tensors[name] = (data & 1 if dtype.kind == "b" else data).view(dtype).reshape(shape)
        for rank, offset, extent in draw(cuts(shape, saved)):
            place = tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))
            held[rank].setdefault(name, []).append((tensors[name][place], list(shape), offset))
        if draw(st.booleans()):
            for rank in range(loading):
                wants[rank].append(Want(name, NAMES[dtype.name], list(shape), [0] * len(shape), list(shape)))
        else:
            for rank, offset, extent in draw(cuts(shape, loading)):
                wants[rank].append(Want(name, NAMES[dtype.name], list(shape), offset, extent))
    return tensors, held, wants


class Delivery:
    """The targets of all ranks, filled as the plan says; counts how often each byte is."""

    def __init__(self, wants):
        self.data = {(rank, i): np.zeros(want.box.shape, np.uint8) for rank, w in wants.items() for i, want in w}
        self.count = {key: np.zeros(target.shape, int) for key, target in self.data.items()}

    def put(self, copy, source):
        where = tuple(slice(o, o + n) for o, n in zip(copy.offset, copy.inside.shape, strict=True))
        self.data[copy.rank, copy.target][where] = source
        self.count[copy.rank, copy.target][where] += 1


def source_of(copy, data):
    slab = data[copy.at : copy.at + math.prod(copy.slab)].reshape(copy.slab)
    return slab[tuple(slice(o, o + n) for o, n in zip(copy.inside.offset, copy.inside.shape, strict=True))]


def fetch(storage, read):
    data = np.zeros(read.span.end - read.span.begin, np.uint8)
    read_span(storage, read.span, data.data)
    return data


@settings(max_examples=150, deadline=None)
@given(
    jobs(),
    st.booleans(),
    st.fixed_dictionaries(
        {
            "ROUND": st.sampled_from([1, 1000, 32 << 20]),
            "SPAN": st.sampled_from([1, 6000, 8 << 20]),
            "LOCAL_SPAN": st.sampled_from([1, 6000, 8 << 20]),
            "MAX_BLOCK": st.sampled_from([1, 1 << 20]),
            "DIRECT_READ": st.sampled_from([0, 4 << 20]),
            "LOCAL_DIRECT_READ": st.sampled_from([0, 64 << 10]),
            "DIRECT_WASTE": st.sampled_from([0.5, 1.02]),
        }
    ),
)
def test_every_wanted_byte_is_delivered_once(job, remote, constants):
    tensors, held, asked = job
    storage = open_storage(f"memory://{secrets.token_hex(8)}")
    commit = make_commit(storage, 1, held, file_bytes=20_000)
    manifest = read_manifest(storage, commit)
    parts = [read_part(storage, commit, manifest, rank) for rank in range(len(held))]
    wants = {rank: list(enumerate(listed)) for rank, listed in asked.items()}
    check(commit, parts, wants, [])
    size = len(wants)
    delivery, fetched, rounds_of = Delivery(wants), 0, []
    with ExitStack() as patched:
        for name, value in constants.items():
            patched.enter_context(patch.object(planning, name, value))
        for me in range(size):
            own, rounds = plan(commit, parts, wants, me, size, remote)
            rounds_of.append(rounds)
            for read in own:
                data = fetch(storage, read)
                fetched += len(data)
                for copy in read.copies:
                    assert copy.rank == me
                    delivery.put(copy, source_of(copy, data))
    assert all(rounds == rounds_of[0] for rounds in rounds_of), "the ranks do not agree"
    for turn in rounds_of[0]:
        messages = {}
        for me in range(size):
            reads = turn.get(me, [])
            sizes, places = outgoing(reads, me, size)
            message = np.zeros(sum(sizes), np.uint8)
            for read, row in zip(reads, places, strict=True):
                data = fetch(storage, read)
                fetched += len(data)
                for copy, place in zip(read.copies, row, strict=True):
                    if place < 0:
                        delivery.put(copy, source_of(copy, data))
                    else:
                        message[place : place + copy.inside.size] = source_of(copy, data).ravel()
            alone_too_big = max((sum(copy.inside.size for copy in read.copies) for read in reads), default=0)
            assert len(message) <= constants["ROUND"] + alone_too_big
            begins = np.cumsum([0, *sizes])
            messages[me] = [message[begins[to] : begins[to + 1]] for to in range(size)]
        for me in range(size):
            expected, copies = incoming(turn, me, size)
            assert expected == [len(messages[other][me]) for other in range(size)]
            received = np.concatenate([messages[other][me] for other in range(size)])
            for at, copy in copies:
                delivery.put(copy, received[at : at + copy.inside.size].reshape(copy.inside.shape))
    for rank, listed in wants.items():
        for number, want in listed:
            place = tuple(slice(o, o + n) for o, n in zip(want.offset, want.extent, strict=True))
            values = tensors[want.name][place]
            assert delivery.data[rank, number].tobytes() == np.ascontiguousarray(values).tobytes()
            assert np.all(delivery.count[rank, number] == 1)
    if constants["DIRECT_WASTE"] < 1 and remote and size > 1:  # all by exchange: no byte is read twice
        assert fetched <= 1.05 * manifest.bytes


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_what_is_loaded_alone_needs_no_other_rank(job):
    """Each rank has the parts of its neighbours among the saved ranks; what it calls its own, it gets from them."""
    _, held, asked = job
    storage = open_storage(f"memory://{secrets.token_hex(8)}")
    commit = make_commit(storage, 1, held)
    manifest = read_manifest(storage, commit)
    parts = [read_part(storage, commit, manifest, rank) for rank in range(len(held))]
    fetched = 0
    for rank, listed in asked.items():
        mine = parts[rank * len(parts) // len(asked) : (rank + 1) * len(parts) // len(asked)]
        names = alone(mine, listed)
        wants = {rank: [(i, want) for i, want in enumerate(listed) if want.name in names]}
        own, rounds = plan(commit, mine, wants, rank, 1, True)
        assert not rounds
        fetched += sum(read.span.end - read.span.begin for read in own)
    assert fetched <= manifest.bytes


def layouts(shape, size, axis):
    n = -(-shape[axis] // size)
    for rank in range(size):
        offset, extent = [0] * len(shape), list(shape)
        offset[axis] = min(rank * n, shape[axis])
        extent[axis] = min(n, shape[axis] - offset[axis])
        if extent[axis]:
            yield rank, offset, extent


@pytest.mark.parametrize(("saved", "axis"), [(2, 0), (3, 0), (1, 0), (8, 0), (2, 1)])
@pytest.mark.parametrize(("loading", "onto"), [(3, 0), (2, 0), (1, 0), (8, 0), (4, 1), (4, None)])
def test_bytes_fetched_from_a_store(saved, axis, loading, onto):
    """At most 1.05 times the state, whatever the layouts; large tensors and many small ones."""
    shapes = {"big": (6000, 1024), **{f"l{i}": (500, 512) for i in range(20)}, **{f"n{i}": (512, 1) for i in range(40)}}
    held, wants = [{} for _ in range(saved)], {rank: [] for rank in range(loading)}
    for name, shape in shapes.items():
        for rank, offset, extent in layouts(shape, saved, axis if shape[1] > 1 else 0):
            held[rank][name] = (np.zeros(extent, np.float32), list(shape), offset)
        for rank in range(loading):
            target = layouts(shape, 1, 0) if onto is None else layouts(shape, loading, onto if shape[1] > 1 else 0)
            for other, offset, extent in target:
                if onto is None or other == rank:
                    wants[rank].append((len(wants[rank]), Want(name, "F32", list(shape), offset, extent)))
    storage = open_storage(f"memory://{secrets.token_hex(8)}")
    commit = make_commit(storage, 1, held, file_bytes=64 << 20)
    manifest = read_manifest(storage, commit)
    parts = [read_part(storage, commit, manifest, rank) for rank in range(saved)]
    reads, by_rank = [], Counter()
    for me in range(loading):
        own, rounds = plan(commit, parts, wants, me, loading, True)
        reads += own
        for read in [*own, *(read for turn in rounds for read in turn.get(me, ()))]:
            by_rank[me] += read.span.end - read.span.begin
    reads += [read for turn in rounds for listed in turn.values() for read in listed]
    assert sum(by_rank.values()) <= 1.05 * manifest.bytes
    assert max(by_rank.values()) <= 1.1 * manifest.bytes / loading + 2 * reader.SPAN
    assert len(reads) <= manifest.bytes / reader.SPAN * 1.5 + 6 * saved + 2 * loading
    storage.remove_folder("checkpoints")


def test_a_checkpoint_with_holes_or_overlaps_is_damaged(memory):
    values = np.arange(60, dtype=np.float32).reshape(10, 6)
    wants = {0: [(0, Want("w", "F32", [10, 6], [0, 0], [10, 6]))]}

    def planned(step, *held):
        commit = make_commit(memory, step, [{"w": box} for box in held])
        manifest = read_manifest(memory, commit)
        parts = [read_part(memory, commit, manifest, rank) for rank in range(len(held))]
        check(commit, parts, wants, [])
        return plan(commit, parts, wants, 0, 1, False)

    top, bottom = (values[:5], [10, 6], [0, 0]), (values[5:], [10, 6], [5, 0])
    assert planned(1, top, bottom)
    with pytest.raises(DamagedError, match="24 wanted bytes of tensor w are in no file"):
        planned(2, top, (values[6:], [10, 6], [6, 0]))
    with pytest.raises(DamagedError, match=r"pieces of tensor w in rank00000-000.* and rank00001-000.* overlap"):
        planned(3, top, (values[4:], [10, 6], [4, 0]))
    (read,) = planned(4, top, bottom, top)[0][:1]  # saved twice alike: one of them is read
    assert read.span.path.endswith("rank00000-000.safetensors")
    with pytest.raises(DamagedError, match="disagree about its shape"):
        planned(5, top, (values[5:], [11, 6], [5, 0]))


def test_ten_misfits_are_listed(memory):
    commit = make_commit(memory, 1, [{name: (np.zeros(3, np.float32), [3], [0]) for name in "abcdefghijklmnop"}])
    parts = [read_part(memory, commit, read_manifest(memory, commit), 0)]
    wants = {0: [(i, Want(f"x{i}", "F32", [3], [0], [3])) for i in range(12)]}
    wants[1] = [
        (0, Want("a", "F32", [4], [0], [4])),
        (1, Want("b", "F64", [3], [0], [3])),
        (2, Want("c", "F32", [3], [2], [2])),
        (3, Want("d", "F32", [3], [1], [2])),
    ]
    with pytest.raises(CheckpointError) as caught:
        check(commit, parts, wants, ["o", "p"])
    assert not isinstance(caught.value, DamagedError)
    text = str(caught.value)
    assert "12 missing in the checkpoint: x0, x1, x10, x11, x2, x3, x4, x5, x6, x7 and 2 more" in text
    assert "2 unexpected in the checkpoint: o, p" in text
    assert "3 of another shape or type: a is F32 [3], wanted is F32 [4], b is F32 [3], wanted is F64 [3], c has" in text
