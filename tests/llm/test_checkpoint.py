"""Checkpoints: what a commit guarantees, whatever dies or rots."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from llm.train.checkpoint import Checkpointer, Rows, overlap
from llm.train.dist import World
from llm.train.manifest import CheckpointError, Commit, commits, newest_commit, read_manifest
from llm.utils.sharding import chunk
from llm.utils.storage import LocalStorage, Storage, open_storage

SHAPES = {"model.a": (7, 3), "model.b": (5,), "model.scalar": (), "model.half": (4, 2)}


def world(rank: int = 0, size: int = 1) -> World:
    """A rank whose peers are played by the test, one after the other."""
    return World(rank, size, rank, torch.device("cpu"), grouped=False)


def full(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["model.half"] = made["model.half"].bfloat16()
    return made


def rows(tensors: dict[str, torch.Tensor], rank: int = 0, size: int = 1) -> list[Rows]:
    """The rows that ``rank`` of ``size`` holds, split as FSDP2 would."""
    made = []
    for name, value in tensors.items():
        if value.dim() == 0:
            made.append(Rows(name, value, [], []))
            continue
        begin, end = chunk(len(value), rank, size)
        made.append(Rows(name, value[begin:end].clone(), list(value.shape), [begin, *([0] * (value.dim() - 1))]))
    return made


def save(storage: Storage, step: int, size: int = 1, attempt: int = 0, chain: list[Commit] | None = None) -> Commit:
    """What ``size`` ranks do in :meth:`Checkpointer.save`: all but rank 0 first, since rank 0 commits."""
    commit = Commit(attempt=attempt, generation=0, step=step)
    for rank in range(1, size):
        peer = Checkpointer(storage, world(rank, size), attempt, 0, keep_last=3)
        peer._write_part(commit, [row for row in rows(full(step), rank, size) if row.data.numel()])
    first = Checkpointer(storage, world(0, size), attempt, 0, keep_last=3)
    first.chain = chain if chain is not None else []
    return first.save(step, rows(full(step), 0, size), {"step": step})


def load(storage: Storage, commit: Commit, size: int = 1) -> dict[str, torch.Tensor]:
    """The full tensors, as ``size`` ranks read them together."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for rank in range(size):
        empty = rows({name: torch.full_like(value, 99) for name, value in full(0).items()}, rank, size)
        Checkpointer(storage, world(rank, size), 1, 0, keep_last=3).load(commit, empty)
        for row in empty:
            pieces.setdefault(row.name, []).append(row.data)
    return {name: torch.cat(parts) if parts[0].dim() else parts[0] for name, parts in pieces.items()}


@pytest.mark.parametrize("saved", [1, 2, 3, 8])
@pytest.mark.parametrize("loaded", [1, 2, 5])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, saved: int, loaded: int) -> None:
    storage = open_storage(str(tmp_path))
    found = load(storage, save(storage, 7, saved), loaded)
    for name, value in full(7).items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", ["memory_url", "s3_url"])
def test_object_stores(kind: str, request: pytest.FixtureRequest) -> None:
    storage = open_storage(request.getfixturevalue(kind))
    chain: list[Commit] = []
    for step in (1, 2, 3, 4):
        save(storage, step, size=2, chain=chain)
    assert [commit.step for commit in commits(storage)] == [2, 3, 4]
    found = load(storage, chain[-1], 3)
    assert all(torch.equal(found[name], value) for name, value in full(4).items())
    with pytest.raises(FileExistsError):
        storage.create(f"{chain[-1].path}/manifest.json", b"another")
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")
    assert storage.list("nothing") == []


def test_shards_are_ordinary_safetensors(tmp_path: Path) -> None:
    commit = save(open_storage(str(tmp_path)), 3)
    found = safetensors.torch.load_file(tmp_path / commit.path / "rank00000.safetensors")
    assert found.keys() == full(3).keys()
    assert all(torch.equal(found[name], value) for name, value in full(3).items())


def test_random_generators_continue(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    torch.manual_seed(5)
    commit = save(storage, 1)
    expected = torch.rand(4)
    torch.manual_seed(6)
    load(storage, commit)
    assert torch.equal(torch.rand(4), expected)


def test_a_commit_is_never_overwritten(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    commit = save(storage, 1)
    before = (tmp_path / commit.path / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"cannot save checkpoints/step_00000001/0000-0000"):
        save(storage, 1)
    assert (tmp_path / commit.path / "manifest.json").read_bytes() == before


def test_newest_attempt_wins_over_the_highest_step(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    assert newest_commit(storage) is None
    for attempt, step in ((0, 10), (0, 20), (1, 15), (0, 30)):
        save(storage, step, attempt=attempt)
    assert newest_commit(storage) == Commit(attempt=1, generation=0, step=15)
    assert Commit.parse("checkpoints/step_00000015/0001-0000") == newest_commit(storage)
    with pytest.raises(CheckpointError, match="does not name a checkpoint"):
        Commit.parse("checkpoints/latest")


def test_retention_follows_the_chain_across_attempts(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    chain: list[Commit] = []
    for step in (1, 2, 3):
        save(storage, step, chain=chain)
    save(storage, 9)  # a straggler of attempt 0, past the fork
    after = Checkpointer(storage, world(), 1, 0, keep_last=2)
    after.load(Commit(attempt=0, generation=0, step=3), [])
    assert after.chain == chain
    after.save(4, rows(full(4)), {})
    assert [(commit.attempt, commit.step) for commit in commits(storage)] == [(0, 3), (0, 9), (1, 4)]
    assert read_manifest(storage, after.chain[-1]).parent == "checkpoints/step_00000003/0000-0000"
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000003",
        "step_00000004",
        "step_00000009",
    ]


class Mortal(LocalStorage):
    """Kills its process, as kill -9 does, when its ``life``-th change or piece of data is due."""

    life = 10**9

    def _spend(self) -> None:
        self.life -= 1
        if self.life == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, path: str, pieces: Any) -> None:
        def counted() -> Any:
            for piece in pieces:
                self._spend()
                yield piece
            self._spend()

        super().write(path, counted())
        self._spend()

    def create(self, path: str, data: bytes) -> None:
        self._spend()
        super().create(path, data)
        self._spend()

    def remove(self, path: str) -> None:
        self._spend()
        super().remove(path)
        self._spend()

    def remove_folder(self, path: str, only_empty: bool = False) -> None:
        super().remove_folder(path, only_empty)
        self._spend()


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_killed_at_every_point_of_a_save(tmp_path: Path) -> None:
    survived_at = 0
    for life in range(1, 100):
        root = tmp_path / str(life)
        storage = Mortal(root)
        chain: list[Commit] = []
        for step in (1, 2, 3):
            save(storage, step, chain=chain)
        storage.life = life
        status = in_child(lambda storage=storage, chain=chain: save(storage, 4, chain=chain))
        newest = newest_commit(LocalStorage(root))
        assert newest is not None
        assert newest.step in (3, 4)
        found = load(LocalStorage(root), newest)
        assert all(torch.equal(found[name], value) for name, value in full(newest.step).items())
        for commit in commits(LocalStorage(root)):
            load(LocalStorage(root), commit)
        if status == 0:
            survived_at = life
            break
        assert status == signal.SIGKILL
    assert survived_at > 10


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_with_its_file_and_tensor(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    commit = save(storage, 3, size=2)
    folder = tmp_path / commit.path
    part = json.loads((folder / "rank00001.json").read_text())
    place = part["tensors"]["model.a"]
    damage(folder / "rank00001.safetensors", (place["begin"] + place["end"]) // 2)
    with pytest.raises(CheckpointError, match=r"rank00001\.safetensors is damaged: .* tensor model\.a"):
        load(storage, commit)


def test_other_damage_is_named(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    commits_made = {name: save(storage, step, size=2) for step, name in enumerate("abcdefg", start=1)}
    folders = {name: tmp_path / commit.path for name, commit in commits_made.items()}
    damage(folders["a"] / "rank00001.json", 60)
    (folders["b"] / "rank00001.json").unlink()
    (folders["c"] / "rank00001.safetensors").unlink()
    with (folders["d"] / "rank00001.safetensors").open("r+b") as stream:
        stream.truncate(stream.seek(0, os.SEEK_END) - 1)
    text = (folders["e"] / "manifest.json").read_text()
    (folders["e"] / "manifest.json").write_text(text.replace('"step":5', '"step":6'))
    (folders["f"] / "manifest.json").unlink()
    (folders["g"] / "manifest.json").write_bytes(b'{"format":')
    expected = {
        "a": r"rank00001\.json is damaged",
        "b": r"rank00001\.json is missing",
        "c": r"rank00001\.safetensors is missing .*tensor model\.a",
        "d": r"rank00001\.safetensors is cut short: tensor model\.half",
        "e": r"manifest\.json is damaged",
        "f": "never committed",
        "g": r"manifest\.json is damaged",
    }
    for name, pattern in expected.items():
        with pytest.raises(CheckpointError, match=pattern):
            load(storage, commits_made[name])


def test_another_model_is_refused_by_tensor(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    commit = save(storage, 1)
    checkpointer = Checkpointer(storage, world(), 1, 0, keep_last=3)
    with pytest.raises(CheckpointError, match=r"tensor model\.a is \[7, 3\], the model wants \[7, 4\]"):
        checkpointer.load(commit, [Rows("model.a", torch.zeros(7, 4), [7, 4], [0, 0])])
    with pytest.raises(CheckpointError, match=r"lacks 2 of 2 values of tensor model\.new"):
        checkpointer.load(commit, [Rows("model.new", torch.zeros(2), [2], [0])])


def test_boxes() -> None:
    assert overlap([0, 0], [4, 4], [2, 1], [4, 2]) == [(2, 4), (1, 3)]
    assert overlap([0], [2], [2], [2]) is None
    assert overlap([], [], [], []) == []
    assert [chunk(5, rank, 4) for rank in range(4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]
