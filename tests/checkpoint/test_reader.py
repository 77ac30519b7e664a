"""Reads of a commit's files: every byte once, and none that is not checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm.checkpoint import reader
from llm.checkpoint.format import DamagedError
from llm.checkpoint.lineage import read_manifest, read_part
from llm.checkpoint.reader import part_spans, read_span, spans, whole
from llm.utils.storage import Storage, open_storage
from tests.checkpoint.maker import make_commit, split_rows

RNG = np.random.default_rng(5)
TENSORS = {
    "model.a": RNG.standard_normal((300, 40)).astype(np.float32),
    "model.b": RNG.integers(0, 99, (77,), np.int16),
    "model.scalar": np.array(2.5),
    "optimizer.a": RNG.standard_normal((300, 40)).astype(np.float32),
}


@pytest.fixture
def memory(memory_url) -> Storage:
    return open_storage(memory_url)


def read_all(storage, commit, part, limit=reader.SPAN):
    for span in part_spans(commit, part, limit):
        read_span(storage, span, memoryview(bytearray(span.end - span.begin)))


@pytest.mark.parametrize("limit", [1, 5000, 20_000, 8 << 20])
def test_spans_have_every_byte_once(memory, limit):
    commit = make_commit(memory, 1, split_rows(TENSORS, 2), file_bytes=30_000)
    manifest = read_manifest(memory, commit)
    for rank in range(2):
        part = read_part(memory, commit, manifest, rank)
        found = list(part_spans(commit, part, limit))
        read_all(memory, commit, part, limit)
        for file in part.files:
            mine = [span for span in found if span.file == file]
            assert [span.begin for span in mine] == [0, *(span.end for span in mine[:-1])]
            assert mine[-1].end == file.bytes
            longest = max(4096, limit)
            assert all(span.end - max(span.begin, file.header) <= longest for span in mine)


def test_reads_join_over_small_gaps_only(memory):
    held = {name: (np.zeros(size, np.uint8), [size], [0]) for name, size in (("a", 64_000), ("b", 1500), ("c", 64_000))}
    commit = make_commit(memory, 1, [held])
    part = read_part(memory, commit, read_manifest(memory, commit), 0)
    (file,), segments = part.files, whole(part, 0)
    around = [each for each in segments if each.tensor != "b"]
    assert len(spans(commit, file, around, 1 << 20)) == 1
    assert len(spans(commit, file, [each for each in segments if each.tensor != "a"], 1 << 20)) == 1
    far = [segments[0]._replace(end=4096), segments[2]]
    assert [span.begin for span in spans(commit, file, far, 1 << 20)] == [0, far[1].piece.begin]


def test_read_into_tells_how_much_there_was(tmp_path: Path, memory, s3_url):
    for storage in (open_storage(str(tmp_path)), memory, open_storage(s3_url)):
        storage.write("some/file", b"0123456789")
        for start, size, expected in (
            (0, 10, b"0123456789"),
            (3, 4, b"3456"),
            (8, 5, b"89"),
            (10, 3, b""),
            (20, 3, b""),
        ):
            buffer = bytearray(size)
            assert storage.read_into("some/file", start, [memoryview(buffer)]) == len(expected)
            assert buffer[: len(expected)] == expected
        with pytest.raises(FileNotFoundError):
            storage.read_into("some/other", 0, [memoryview(bytearray(3))])


def test_every_flipped_bit_is_found_where_it_is(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    commit = make_commit(storage, 1, split_rows(TENSORS, 2))
    part = read_part(storage, commit, read_manifest(storage, commit), 1)
    path = tmp_path / commit.path / part.files[0].name
    good = path.read_bytes()
    for at in sorted(
        {0, 7, 8, part.files[0].header - 1, part.files[0].header, len(good) - 1, *range(0, len(good), 977)}
    ):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        owner = next(
            (name for name, each in part.tensors.items() for piece in each.pieces
             if piece.begin <= at < piece.begin + each.bytes(piece)),
            "header",
        )  # fmt: skip
        with pytest.raises(DamagedError, match=rf"rank00001-000\.safetensors is damaged: .*{owner}"):
            read_all(storage, commit, part)
    path.write_bytes(good)
    read_all(storage, commit, part)


def test_missing_and_short_files_are_damage_and_refusal_is_not(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    commit = make_commit(storage, 1, split_rows(TENSORS, 2))
    part = read_part(storage, commit, read_manifest(storage, commit), 0)
    path = tmp_path / commit.path / part.files[0].name
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(DamagedError, match=r"cut short: it ends at byte \d+ of \d+, in tensor optimizer\.a"):
        read_all(storage, commit, part)
    path.write_bytes(good[:4])
    with pytest.raises(DamagedError, match=r"cut short: it ends at byte 4 .* in tensor model\.a"):
        read_all(storage, commit, part)
    path.unlink()
    with pytest.raises(DamagedError, match=r"rank00000-000\.safetensors is missing .*tensor model\.a"):
        read_all(storage, commit, part)
    path.mkdir()
    with pytest.raises(OSError, match=r"cannot read checkpoints/.*rank00000-000\.safetensors"):
        read_all(storage, commit, part)
