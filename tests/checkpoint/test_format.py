"""Manifests are read as if somebody hostile had written them: whatever they say, nothing outside the rules gets in."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.checkpoint.format import (
    FORMAT,
    MAX_BLOCK,
    MIN_BLOCK,
    CheckpointError,
    Commit,
    DamagedError,
    Manifest,
    PartEntry,
    PartManifest,
    block_size,
    open_manifest,
    open_part,
    parse_part_name,
    part_name,
    seal,
)
from llm.checkpoint.lineage import read_manifest, read_part
from llm.checkpoint.retention import chain
from llm.utils.local_storage import LocalStorage
from tests.checkpoint.maker import make_commit, split_rows

COMMIT = Commit(attempt=2, generation=1, step=100)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a commit's manifest, and of the part of its rank 1: files, pieces, an empty one."""
    storage = LocalStorage(tmp_path_factory.mktemp("run"))
    tensors = {"w": np.arange(3000, dtype=np.float32).reshape(100, 30), "b": np.zeros((0, 4), np.int8)}
    held = split_rows(tensors, 2)
    held[1]["empty"] = (np.zeros((0, 4), np.int8), [0, 4], [0, 0])
    make_commit(
        storage, 100, held, attempt=2, generation=1, file_bytes=4000, parent="checkpoints/step_00000050/0001-0000"
    )
    entry = read_manifest(storage, COMMIT).parts[1]
    folder = storage.path(COMMIT.path)
    part = (folder / part_name(1, entry.bytes, entry.sha256)).read_bytes()
    return (folder / "manifest.json").read_bytes(), part


def reseal(manifest: bytes, **changes: Any) -> bytes:
    """The manifest with other values, and a digest that fits: somebody who knows the format."""
    record = {**msgspec.json.decode(manifest), **changes, "sha256": ""}
    order = [field.encode_name for field in msgspec.structs.fields(Manifest)]
    bare = {name: record[name] for name in order if name in record}
    digest = hashlib.sha256(msgspec.json.encode(bare)).hexdigest()
    return msgspec.json.encode({**bare, "sha256": digest})


def test_reseal_reseals(good):
    assert reseal(good[0]) == good[0]
    assert open_manifest(good[0], COMMIT).step == 100


@settings(max_examples=200)
@given(st.data())
def test_a_manifest_cut_or_flipped_anywhere_is_damaged(good, data):
    manifest, part = good
    at = data.draw(st.integers(0, len(manifest) - 1))
    with pytest.raises(DamagedError, match=r"step_00000100/0002-0001/manifest\.json"):
        open_manifest(manifest[:at], COMMIT)
    flipped = bytearray(manifest)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        open_manifest(bytes(flipped), COMMIT)
    entry = PartEntry(sha256=hashlib.sha256(part).hexdigest(), bytes=12345)
    cut = data.draw(st.integers(0, len(part) - 1))
    with pytest.raises(DamagedError, match=r"parts/00001\.12345"):
        open_part(part[:cut], COMMIT, 1, entry)


def test_every_cut_of_a_manifest_is_damaged(good):
    for length in range(len(good[0])):
        with pytest.raises(DamagedError):
            open_manifest(good[0][:length], COMMIT)


DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 101}, "belongs to another checkpoint"),
        ({"attempt": 0}, "belongs to another checkpoint"),
        ({"generation": 7}, "belongs to another checkpoint"),
        ({"step": -1}, "is damaged"),
        ({"step": 2**70}, "is damaged"),
        ({"step": "100"}, "is damaged"),
        ({"world_size": 0}, "is damaged"),
        ({"world_size": 3}, "2 parts for 3 ranks"),
        ({"world_size": 10**12}, "is damaged"),
        ({"parts": []}, "0 parts for 2 ranks"),
        ({"parts": [{"sha256": "../../../etc/passwd", "bytes": 1}] * 2}, "digest of a part"),
        ({"parts": [{"sha256": "A" * 64, "bytes": 1}] * 2}, "digest of a part"),
        ({"parts": [{"sha256": "0" * 64 + "\n", "bytes": 1}] * 2}, "digest of a part"),
        ({"parts": [{"sha256": "0" * 64, "bytes": -1}] * 2}, "is damaged"),
        ({"parent": "/etc"}, "descends from"),
        ({"parent": "checkpoints/step_00000050/../0001-0000"}, "descends from"),
        ({"parent": "checkpoints/step_00000100/0002-0001"}, "descends from"),
        ({"parent": "checkpoints/step_00000001/0003-0000"}, "descends from"),
        ({"parent": f"checkpoints/step_{'9' * 5000}/0001-0000"}, "descends from"),
        ({"state": []}, "is damaged"),
        ({"format": 1}, "has format 1"),
        ({"format": "2"}, "is damaged"),
    ],
)
def test_a_manifest_that_lies(good, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_manifest(reseal(good[0], **changes), COMMIT)
    assert isinstance(caught.value, DamagedError) or "format" in changes


def test_a_state_may_be_as_odd_as_it_likes(good):
    state = {"": None, "deep": DEEP, "big": 2**70, "../..": "/etc/passwd", "\x1b[2J": "\n"}
    assert open_manifest(reseal(good[0], state=state), COMMIT).state == state


def test_nesting_without_end_is_damage(good):
    depth = 100_000
    text = good[0].replace(b'"state":{', b'"state":{"a":' + b"[" * depth + b"]" * depth + b",")
    with pytest.raises(DamagedError, match="nested"):
        open_manifest(text, COMMIT)


def change(part: bytes, edit: Any) -> tuple[bytes, PartEntry]:
    """The part manifest after ``edit`` of its decoded JSON, with the entry that a hostile commit would have for it."""
    record = msgspec.json.decode(part)
    edit(record)
    data = msgspec.json.encode(record)
    total = sum(file["bytes"] for file in record["files"] if isinstance(file["bytes"], int))
    return data, PartEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=total)


def put(*keys: Any, value: Any) -> Any:
    def edit(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return edit


PIECE = ("tensors", "w", "pieces", 0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("rank", value=0), "belongs to rank 0"),
        (put("format", value=3), "has format 3"),
        (put("files", 0, "name", value="/etc/passwd"), "is not the name of file 0"),
        (put("files", 0, "name", value="../../../rank00001-000.safetensors"), "is not the name of file 0"),
        (put("files", 0, "name", value="rank00000-000.safetensors"), "is not the name of file 0"),
        (put("files", 0, "name", value="rank00001-001.safetensors"), "is not the name of file 0"),
        (put("files", 0, "header", value=10**9), "header"),
        (put("files", 0, "header", value=7), "header"),
        (put("files", 0, "header", value=-8), "is damaged"),
        (put("files", 0, "header_crc32c", value=2**32), "is damaged"),
        (put("files", 0, "bytes", value=2**62), "is damaged"),
        (put("files", value=[]), "in file 0 of 0"),
        (put("tensors", "w", "dtype", value="F31"), "unknown type"),
        (put("tensors", "w", "dtype", value="F64"), "at bytes"),
        (put("tensors", "w", "shape", value=[100]), "dimensions"),
        (put("tensors", "w", "shape", value=[50, 30]), "reaches outside"),
        (put("tensors", "w", "shape", value=[100, -30]), "is damaged"),
        (put("tensors", "w", "shape", value=[1] * 17), "is damaged"),
        (put(*PIECE, "shape", value=[2**40, 2**40]), "reaches outside"),
        (put(*PIECE, "offset", value=[2**61, 0]), "reaches outside"),
        (put(*PIECE, "offset", value=[90, 0]), "reaches outside"),
        (put(*PIECE, "offset", value=[0]), "dimensions"),
        (put(*PIECE, "file", value=99), "in file 99"),
        (put(*PIECE, "begin", value=0), "at bytes"),
        (put(*PIECE, "begin", value=2**61), "at bytes"),
        (put(*PIECE, "block", value=0), "blocks of 0"),
        (put(*PIECE, "block", value=MIN_BLOCK // 2), "blocks of"),
        (put(*PIECE, "block", value=MAX_BLOCK * 2), "blocks of"),
        (put(*PIECE, "crc32c", value=""), "0 checksums"),
        (put(*PIECE, "crc32c", value="AAAA"), "not base64"),
        (put(*PIECE, "crc32c", value="\u00e4"), "not base64"),
        (put(*PIECE, "crc32c", value="AAAAAAAAAAA="), "2 checksums"),
        (put(*PIECE, "file", value=1), "at bytes|overlap"),
        (put("tensors", value=[]), "is damaged"),
    ],
)
def test_a_part_that_lies(good, edit, message):
    data, entry = change(good[1], edit)
    with pytest.raises(CheckpointError, match=message):
        open_part(data, COMMIT, 1, entry)


def test_a_file_of_giant_size_is_not_believed_but_costs_nothing(good):
    """Only the file can tell. Nothing is allocated by this number, and whoever reads it finds the file too short."""
    data, entry = change(good[1], put("files", 0, "bytes", value=2**61))
    assert open_part(data, COMMIT, 1, entry).files[0].bytes == 2**61


def test_pieces_that_overlap_are_damage(good):
    def twice(record: Any) -> None:
        first, second = record["tensors"]["w"]["pieces"][:2]
        second["file"], second["begin"] = first["file"], first["begin"] + 4

    # The second piece moves into the first one's bytes; what it leaves behind is no concern of this check.
    data, entry = change(good[1], twice)
    with pytest.raises(DamagedError, match="overlap in rank00001-000"):
        open_part(data, COMMIT, 1, entry)


def test_a_part_of_another_size_or_digest_is_damage(good):
    data, entry = change(good[1], lambda record: None)
    assert open_part(data, COMMIT, 1, entry).rank == 1
    with pytest.raises(DamagedError, match="the commit says 1"):
        open_part(data, COMMIT, 1, PartEntry(sha256=entry.sha256, bytes=1))
    with pytest.raises(DamagedError, match="sha256 differ"):
        open_part(data, COMMIT, 1, PartEntry(sha256="0" * 64, bytes=entry.bytes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["..", "/etc", "F32", "", "AAAA"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, inner in items for path in paths(inner, (*at, key)))]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_anything_anywhere_is_refused_or_obeys_the_rules(good, data):
    """Whatever value stands wherever: either it is refused, or every range lies where it must."""
    record = msgspec.json.decode(good[1])
    path = data.draw(st.sampled_from([each for each in paths(record) if each]))
    put(*path, value=data.draw(JSON))(record)
    part = msgspec.json.encode(record)
    total = data.draw(st.sampled_from([sum(file.bytes for file in opened(good[1]).files), 0, 1, 2**61]))
    entry = PartEntry(sha256=hashlib.sha256(part).hexdigest(), bytes=total)
    with contextlib.suppress(CheckpointError):
        check_rules(open_part(part, COMMIT, 1, entry), entry)
    manifest = msgspec.json.decode(good[0])
    path = data.draw(st.sampled_from([each for each in paths(manifest) if each]))
    put(*path, value=data.draw(JSON))(manifest)
    with contextlib.suppress(CheckpointError):
        changed = open_manifest(reseal(msgspec.json.encode(manifest)), COMMIT)
        assert changed.commit == COMMIT
        assert len(changed.parts) == changed.world_size


def opened(part: bytes) -> PartManifest:
    return msgspec.json.decode(part, type=PartManifest)


def check_rules(part: PartManifest, entry: PartEntry) -> None:
    assert part.rank == 1
    assert sum(file.bytes for file in part.files) == entry.bytes
    used: dict[int, set[int]] = {}
    for tensor in part.tensors.values():
        for piece in tensor.pieces:
            file, size = part.files[piece.file], tensor.bytes(piece)
            assert "/" not in file.name
            assert file.header <= piece.begin <= piece.begin + size <= file.bytes
            where = set(range(piece.begin, piece.begin + size))
            assert not where & used.setdefault(piece.file, set())
            used[piece.file] |= where
            assert all(o + n <= limit for o, n, limit in zip(piece.offset, piece.shape, tensor.shape, strict=True))
            assert len(piece.checksums()) * piece.block >= size


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "checkpoints",
        "checkpoints/step_100/0000-0000",
        "checkpoints/step_000000100/0000-0000",
        "checkpoints/step_00000100/00000-0000",
        "checkpoints/step_00000100/0000-0000/..",
        "checkpoints/../step_00000100/0000-0000",
        "checkpoints/step_00000100/0000-0000\n",
        "checkpoints/step_٠٠٠٠٠١٠٠/0000-0000",
        f"checkpoints/step_{'1' * 5000}/0000-0000",
        "step_00000100/0000-0000",
    ],
)
def test_what_does_not_name_a_checkpoint(path):
    with pytest.raises(CheckpointError, match="does not name a checkpoint"):
        Commit.parse(path)


@given(st.integers(0, 10**12), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_name_is_what_it_was_made_of(step, attempt, generation):
    commit = Commit(attempt=attempt, generation=generation, step=step)
    assert Commit.parse(commit.path) == commit


@given(st.integers(0, 10**7), st.integers(0, 10**15))
def test_a_part_has_one_name(rank, size):
    name = part_name(rank, size, "ab" * 32).removeprefix("parts/")
    assert parse_part_name(name) == (rank, PartEntry(sha256="ab" * 32, bytes=size))
    for other in (f"0{name}", name.replace(".json", ".json\n"), name.replace(".", ".0", 1), f"../{name}"):
        assert parse_part_name(other) is None, other


@given(st.integers(0, 2**45))
def test_blocks_are_small_beside_their_piece(size):
    block = block_size(size)
    assert MIN_BLOCK <= block <= MAX_BLOCK
    assert block == MIN_BLOCK or block <= size // 32


def test_parents_in_a_circle_end(tmp_path):
    """Manifests that name each other: each is refused, so nobody walks in circles."""
    storage = LocalStorage(tmp_path)
    tensors = [{"x": (np.zeros(1, np.float32), [1], [0])}]
    first = make_commit(storage, 10, tensors, attempt=0, parent="checkpoints/step_00000020/0001-0000")
    second = make_commit(storage, 20, tensors, attempt=1, parent=first.path)
    with pytest.raises(DamagedError, match="descends from"):
        read_manifest(storage, first)
    assert chain(storage, second)[-1] == second


def test_a_commit_is_read_only_as_itself(tmp_path):
    """A manifest and a part that lie in another checkpoint's folder are not that checkpoint's."""
    storage = LocalStorage(tmp_path)
    held = [{"x": (np.arange(4, dtype=np.float32), [4], [0])}]
    one, two = (make_commit(storage, step, held, state={"n": step}) for step in (10, 20))
    manifests = [read_manifest(storage, each) for each in (one, two)]
    data = [storage.read(f"{each.path}/manifest.json") for each in (one, two)]
    storage.replace(f"{one.path}/manifest.json", data[1])
    with pytest.raises(DamagedError, match="belongs to another checkpoint"):
        read_manifest(storage, one)
    entry = manifests[0].parts[0]
    storage.replace(f"{one.path}/{part_name(0, entry.bytes, entry.sha256)}", b"{}")
    with pytest.raises(DamagedError, match="sha256 differ"):
        read_part(storage, one, manifests[0], 0)
    storage.remove(f"{one.path}/{part_name(0, entry.bytes, entry.sha256)}")
    with pytest.raises(DamagedError, match="missing from a committed"):
        read_part(storage, one, manifests[0], 0)


def test_the_format_is_two():
    assert FORMAT == 2
    assert seal(
        Manifest(
            format=2, step=1, attempt=0, generation=0, time=0.0, seconds=0.0, world_size=1, mesh={}, parent=None,
            code="", parts=[PartEntry(sha256="0" * 64, bytes=0)], state={},
        )
    ).endswith(b'"}')  # fmt: skip
