"""Verification finds whatever is not as it was saved, says where, and takes a store's silence for no proof."""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array

import msgspec
import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.checkpoint import verify as module
from llm.checkpoint.format import (
    MANIFEST,
    CheckpointError,
    PartManifest,
    Piece,
    Tensor,
    open_part,
    pack_checksums,
    part_name,
    seal,
)
from llm.checkpoint.lineage import read_manifest, read_part
from llm.checkpoint.verify import Coverage, verify
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import open_storage
from tests.checkpoint.maker import make_commit, split_rows

RNG = np.random.default_rng(0)
TENSORS = {
    "embed.weight": RNG.standard_normal((64, 24)).astype(np.float32),
    "head.weight": RNG.integers(0, 255, (30, 100)).astype(np.uint8),
    "step": np.array(7, np.int64),
    "nothing": np.zeros((0, 8), np.float16),
}


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path)


@pytest.fixture
def commit(storage):
    """Two ranks, four files, four tensors: 64 x 24 floats, 30 x 100 bytes, a scalar, and one without values."""
    return make_commit(storage, 100, split_rows(TENSORS, 2), file_bytes=2500)


def found(storage, commit):
    return [(damage.file.removeprefix(commit.path + "/"), damage.tensor) for damage in verify(storage, commit).damage]


def test_nothing_is_wrong_with_what_was_saved(storage, commit):
    seen = []
    report = verify(storage, commit, seen.append)
    assert (report.damage, report.extra, report.tensors) == ([], [], 4)
    assert report.bytes == sum(seen) == read_manifest(storage, commit).bytes


def files(storage, commit):
    folder = storage.path(commit.path)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def tensor_at(storage, commit, name, position):
    """The tensor whose byte this is; None for a header."""
    manifest = read_manifest(storage, commit)
    for rank in range(manifest.world_size):
        part = read_part(storage, commit, manifest, rank)
        for tensor_name, tensor in part.tensors.items():
            for piece in tensor.pieces:
                if part.files[piece.file].name == name and 0 <= position - piece.begin < tensor.bytes(piece):
                    return tensor_name
    return None


def test_a_flipped_bit_anywhere_is_found_and_located(storage, commit):
    for path in files(storage, commit):
        whole = path.read_bytes()
        for position in [*range(0, len(whole), 29), len(whole) - 1]:
            tensor = tensor_at(storage, commit, path.name, position)
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            report = verify(storage, commit)
            assert [damage.file for damage in report.damage] == [str(path.relative_to(storage.root))], position
            assert report.damage[0].tensor == (tensor or ""), position
            if tensor:
                assert "from byte" in report.damage[0].what
            path.write_bytes(whole)
    assert verify(storage, commit).damage == []


def test_each_file_cut_lengthened_emptied_or_lost(storage, commit):
    for path in files(storage, commit):
        whole = path.read_bytes()
        where = str(path.relative_to(storage.root))
        for content in (whole[:-1], whole[: len(whole) // 2], whole[:3], b"", whole + b"\0", None):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            if content is None and path.name == MANIFEST:
                with pytest.raises(CheckpointError, match="no longer, committed"):
                    verify(storage, commit)
            else:
                assert {damage.file for damage in verify(storage, commit).damage} == {where}
            path.write_bytes(whole)
    path = files(storage, commit)[-1]
    path.unlink()
    path.mkdir()
    assert "is a folder" in str(verify(storage, commit).damage[0])


def test_a_missing_file_is_named_with_its_tensors(storage, commit):
    (storage.path(commit.path) / "rank00001-000.safetensors").unlink()
    (damage,) = verify(storage, commit).damage
    assert str(damage) == f"{commit.path}/rank00001-000.safetensors: is missing; it should hold tensors embed.weight"


def test_swapped_files_are_damage(storage, commit):
    """Two files of one rank, of another rank, and of another step: equal in name, and whole in themselves."""
    other = make_commit(
        storage, 200, split_rows({**TENSORS, "head.weight": TENSORS["head.weight"] + 1}, 2), file_bytes=2500
    )
    names = sorted(path.name for path in storage.path(commit.path).glob("*.safetensors"))
    folder = storage.path(commit.path)
    for a, b in itertools.combinations(names, 2):
        one, two = folder / a, folder / b
        contents = one.read_bytes(), two.read_bytes()
        one.write_bytes(contents[1])
        two.write_bytes(contents[0])
        assert {file for file, _ in found(storage, commit)} == {a, b}
        one.write_bytes(contents[0])
        two.write_bytes(contents[1])
    for name in names:
        theirs, ours = (storage.path(each.path) / name for each in (other, commit))
        before = ours.read_bytes()
        ours.write_bytes(theirs.read_bytes())
        assert found(storage, commit) == ([(name, "head.weight")] if theirs.read_bytes() != before else [])
        ours.write_bytes(before)


def rewrite(storage, commit, rank, edit, file_edit=None):
    """A hostile rank: its part manifest, or a file, is changed and every digest and checksum made to fit."""
    manifest = read_manifest(storage, commit)
    entry = manifest.parts[rank]
    record = msgspec.json.decode(storage.read(f"{commit.path}/{part_name(rank, entry.bytes, entry.sha256)}"))
    if file_edit is not None:
        index, change = file_edit
        path = storage.path(f"{commit.path}/{record['files'][index]['name']}")
        header = record["files"][index]["header"]
        content = path.read_bytes()
        new = change(content[:header]) + content[header:]
        path.write_bytes(new)
        record["files"][index]["header_crc32c"] = crc32c(new[:header])
    edit(record)
    data = msgspec.json.encode(record)
    new_entry = msgspec.structs.replace(
        entry, sha256=hashlib.sha256(data).hexdigest(), bytes=sum(file["bytes"] for file in record["files"])
    )
    storage.write(f"{commit.path}/{part_name(rank, new_entry.bytes, new_entry.sha256)}", data)
    parts = [new_entry if each is entry else each for each in manifest.parts]
    storage.replace(f"{commit.path}/{MANIFEST}", seal(msgspec.structs.replace(manifest, parts=parts)))


def header_change(old, new):
    def change(header):
        text = header[8:].replace(old, new)
        assert text != header[8:]
        text = text.rstrip(b" ").ljust(len(header) - 8)
        assert len(text) == len(header) - 8, "the test's replacement is too long"
        return header[:8] + text

    return change


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"F32"', b'"I32"', "is not in the header as F32"),
        (b"[26,24]", b"[24,26]", "is not in the header as F32"),
        (b"[0,2496]", b"[0,2495]", "is not in the header as F32"),
        (b'"embed.weight"', b'"embed"', "is in the header, and in no part manifest"),
        (b'{"', b'["', "not safetensors"),
        (b'"data_offsets"', b'"offsets"', "not safetensors"),
    ],
)
def test_a_header_that_says_something_else_than_the_part(storage, commit, old, new, message):
    rewrite(storage, commit, 0, lambda record: None, (0, header_change(old, new)))
    assert message in "\n".join(map(str, verify(storage, commit).damage))


def test_a_header_with_another_length(storage, commit):
    rewrite(storage, commit, 0, lambda record: None, (0, lambda header: (7).to_bytes(8, "little") + header[8:]))
    assert "whose length" in str(verify(storage, commit).damage[0])


def drop_piece(record):
    del record["tensors"]["embed.weight"]["pieces"][0]


def move_piece(record):
    first, second = record["tensors"]["embed.weight"]["pieces"][:2]
    second["offset"] = [first["offset"][0] + 1, 0]


def other_type(record):
    record["tensors"]["embed.weight"]["dtype"] = "I32"


@pytest.mark.parametrize(
    ("edit", "messages"),
    [
        (drop_piece, ["tensor embed.weight lacks 624 of 1536 values", "belong to no tensor"]),
        (move_piece, ["tensor embed.weight has values twice, and lacks as many others"]),
        (other_type, ["tensor embed.weight is I32 [64, 24], but F32 [64, 24] in part 1"]),
        (lambda record: record["tensors"].pop("step"), ["belong to no tensor"]),
    ],
)
def test_a_part_that_does_not_add_up(storage, commit, edit, messages):
    rewrite(storage, commit, 0, edit)
    text = "\n".join(map(str, verify(storage, commit).damage))
    for message in messages:
        assert message in text


def test_what_both_ranks_saved_is_there_twice(storage):
    box = (np.ones(4, np.float32), [4], [0])
    commit = make_commit(storage, 1, [{"bias": box}, {"bias": box}])
    (damage,) = verify(storage, commit).damage
    assert str(damage) == f"{commit.path}/{MANIFEST}: tensor bias has 8 values where 4 belong"


def test_files_that_are_no_part_of_it_are_told_and_no_damage(storage, commit):
    storage.write(f"{commit.path}/rank00009-000.safetensors", b"left behind")
    report = verify(storage, commit)
    assert (report.damage, report.extra) == ([], ["rank00009-000.safetensors"])


def test_a_giant_size_costs_no_memory(storage, commit):
    """The part says that a file has 2**60 bytes: the file does not, and nothing is read or allocated by that number."""

    def edit(record):
        record["files"][0]["bytes"] = 2**60

    rewrite(storage, commit, 0, edit)
    text = "\n".join(map(str, verify(storage, commit).damage))
    assert "bytes, not 1152921504606846976" in text

    def longer(record):
        record["files"][0]["header"] = 2**60 - 1
        record["tensors"] = {}

    rewrite(storage, commit, 0, longer)
    assert "has a damaged header" in "\n".join(map(str, verify(storage, commit).damage))


def test_another_format_is_no_damage(storage, commit):
    path = storage.path(commit.path) / MANIFEST
    path.write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match="has format 1"):
        verify(storage, commit)


class Silent(LocalStorage):
    """A store that stops to answer after some reads."""

    def __init__(self, root, reads):
        super().__init__(root)
        self.left = reads

    def read(self, path, start=0, end=None):
        self.left -= 1
        if self.left < 0:
            raise TimeoutError(f"read {self.url}/{path}: no answer within 15 s")
        return super().read(path, start, end)


def test_a_store_that_does_not_answer_proves_nothing(storage, commit):
    (storage.path(commit.path) / "rank00000-000.safetensors").write_bytes(b"damaged too")
    for reads in range(6):
        with pytest.raises(OSError, match="no answer"):
            verify(Silent(storage.root, reads), commit)


def test_memory_is_bounded_by_the_chunk_not_by_the_checkpoint(storage, monkeypatch):
    """No read asks for more than a chunk, though the tensor is many; and all of it is read once."""
    monkeypatch.setattr(module, "CHUNK", 1 << 16)
    commit = make_commit(
        storage, 1, [{"w": (RNG.integers(0, 255, (1 << 20,), np.uint8), [1 << 20], [0])}], file_bytes=1 << 21
    )
    asked = []

    class Counting(LocalStorage):
        def read(self, path, start=0, end=None):
            if path.endswith(".safetensors"):
                asked.append(end - start)
            return super().read(path, start, end)

    report = verify(Counting(storage.root), commit)
    assert report.damage == []
    assert max(asked) <= 1 << 16
    assert sum(asked) == report.bytes == read_manifest(storage, commit).bytes


def test_many_bad_blocks_are_one_line_a_tensor(storage):
    commit = make_commit(storage, 1, [{"w": (RNG.integers(0, 255, (1 << 20,), np.uint8), [1 << 20], [0])}])
    path = storage.path(commit.path) / "rank00000-000.safetensors"
    header = len(path.read_bytes()) - (1 << 20)
    path.write_bytes(path.read_bytes()[:header] + bytes(1 << 20))
    (damage,) = verify(storage, commit).damage
    assert str(damage) == f"{commit.path}/{path.name}: tensor w has 64 blocks damaged, from byte {header} on"


def test_on_a_real_s3_server(s3_url):
    storage = open_storage(s3_url)
    commit = make_commit(storage, 100, split_rows(TENSORS, 2), file_bytes=2500)
    assert verify(storage, commit).damage == []
    path = f"{commit.path}/rank00001-001.safetensors"
    whole = bytearray(storage.read(path))
    whole[-1] ^= 1
    storage.replace(path, bytes(whole))
    assert found(storage, commit) == [("rank00001-001.safetensors", "head.weight")]
    storage.replace(path, bytes(whole[:-1]))
    assert {file for file, _ in found(storage, commit)} == {"rank00001-001.safetensors"}
    storage.remove(path)
    assert "is missing; it should hold" in str(verify(storage, commit).damage[0])


# Coverage


def cut(draw, offset, shape, pieces):
    """Cut a box into boxes along lines that ``draw`` chooses."""
    wide = [dimension for dimension, count in enumerate(shape) if count > 1]
    if not wide or not draw(st.booleans()):
        pieces.append((offset, shape))
        return
    dimension = draw(st.sampled_from(wide))
    at = draw(st.integers(1, shape[dimension] - 1))
    for begin, count in ((0, at), (at, shape[dimension] - at)):
        inner, start = list(shape), list(offset)
        inner[dimension], start[dimension] = count, start[dimension] + begin
        cut(draw, start, inner, pieces)


def cover(shape, boxes):
    """What is wrong when these boxes, of two ranks, are all there is of a tensor."""
    coverage = Coverage()
    for rank in range(2):
        pieces = [
            Piece(offset=offset, shape=count, file=0, begin=0, block=4096, crc32c=pack_checksums(array("I")))
            for offset, count in boxes[rank::2]
        ]
        tensor = Tensor(dtype="U8", shape=shape, pieces=pieces)
        coverage.add(PartManifest(format=2, rank=rank, files=[], tensors={"t": tensor}, rng={}))
    return list(coverage.wrong())


def counts(shape, boxes):
    values = np.zeros(shape, int)
    for offset, count in boxes:
        values[tuple(slice(o, o + n) for o, n in zip(offset, count, strict=True))] += 1
    return values


@settings(max_examples=300)
@given(st.data())
def test_coverage_is_exactly_each_value_once(data):
    shape = data.draw(st.lists(st.integers(0, 6), max_size=4))
    boxes = []
    cut(data.draw, [0] * len(shape), shape, boxes)
    boxes = data.draw(st.permutations(boxes))
    assert cover(shape, boxes) == []
    # Change some box: moved, shrunk, doubled or dropped. Sometimes that changes nothing.
    index = data.draw(st.integers(0, len(boxes) - 1))
    count = boxes[index][1]
    changed = [list(each) for each in boxes]
    kind = data.draw(st.sampled_from(["move", "drop", "double", "random"]))
    if kind == "drop":
        del changed[index]
    elif kind == "double":
        changed.append(changed[index])
    else:
        sizes = [data.draw(st.integers(0, n)) for n in shape] if kind == "random" else count
        changed[index] = [[data.draw(st.integers(0, n - k)) for n, k in zip(shape, sizes, strict=True)], sizes]
    good = bool((counts(shape, changed) == 1).all())
    assert (cover(shape, changed) == []) == good


def test_open_part_accepts_what_the_maker_makes(storage, commit):
    """The tests above would prove nothing if the maker made something else than the format."""
    manifest = read_manifest(storage, commit)
    entry = manifest.parts[0]
    data = storage.read(f"{commit.path}/{part_name(0, entry.bytes, entry.sha256)}")
    assert len(open_part(data, commit, 0, entry).files) == 2
