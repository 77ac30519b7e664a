"""Saving: what is staged is what is committed, who saves what, and what becomes of a save that fails."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from llm.checkpoint.format import CheckpointError, Commit
from llm.checkpoint.lineage import commits, newest_commit, read_manifest, read_part
from llm.checkpoint.requests import ask
from llm.checkpoint.retention import Retention
from llm.train.checkpoint import Checkpointer
from llm.train.pieces import DTYPES, local_pieces
from llm.train.world import World
from llm.utils.storage import open_storage


def state(seed: int) -> dict[str, Tensor]:
    """A tensor of every type, tied ones, one without values and one without dimensions."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        f"model.{name}": torch.randint(0, 120, (7, 3), generator=generator).to(dtype) for name, dtype in DTYPES.items()
    }
    made["model.scalar"] = torch.tensor(float(seed))
    made["model.empty"] = torch.empty(0, 4)
    made["model.tied"] = made["model.F32"]
    made["model.strided"] = torch.randn(6, 4, generator=generator).t()
    return made


class Single(Checkpointer):
    """A run of one rank."""

    def __init__(
        self, url: str, attempt: int = 0, keep: int | None = None, limit_s: float = 60, snapshots: bool = False
    ) -> None:
        world = World(0, 1, 0, torch.device("cpu"), grouped=False)
        super().__init__(open_storage(url), world, attempt, 0, Retention(keep_last=keep), limit_s, snapshots=snapshots)

    def commit(self, step: int) -> Commit:
        commit = self.save(step, {"step": step})
        assert [event.committed for event in self.wait()] == [True]
        return commit


@pytest.fixture
def single(tmp_path: Path) -> Iterator[Single]:
    made = Single(str(tmp_path))
    yield made
    made.close()


def equal(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and a.contiguous().view(-1).tolist() == b.contiguous().view(-1).tolist()


def loaded(url: str, commit: Commit) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(value) for name, value in state(0).items()}
    reader = Single(url, attempt=99)
    try:
        reader.attach(found)
        assert reader.load(commit) == {"step": commit.step}
    finally:
        reader.close()
    return found


@pytest.mark.parametrize("kind", ["tmp_path", "s3_url"])
def test_every_type_comes_back_bit_by_bit(kind: str, request: pytest.FixtureRequest) -> None:
    url = str(request.getfixturevalue(kind))
    writer = Single(url)
    values = state(3)
    writer.attach(values)
    commit = writer.commit(3)
    writer.close()
    found = loaded(url, commit)
    assert all(equal(found[name], value) for name, value in values.items())


def test_a_store_that_only_one_process_sees_is_refused(memory_url: str) -> None:
    with pytest.raises(CheckpointError, match="memory:// is seen by one process alone"):
        Single(memory_url)


def test_files_are_ordinary_safetensors(single: Single, tmp_path: Path) -> None:
    values = {name: value for name, value in state(3).items() if "F8_E8M0" not in name}
    single.attach(values)
    commit = single.commit(3)
    found = safetensors.torch.load_file(tmp_path / commit.path / "rank00000-000.safetensors")
    assert found.keys() == {name for name, value in values.items()}
    assert all(equal(found[name], value) for name, value in values.items())


def test_what_changes_after_the_request_is_not_saved(single: Single, tmp_path: Path) -> None:
    values = {"model.w": torch.full((1 << 20,), 1.0)}
    single.attach(values)
    for step in range(1, 6):
        values["model.w"].fill_(step)
        single.fence()
        single.save(step, {})
        values["model.w"].fill_(-1)
    assert [event.commit.step for event in single.wait() if event.committed] == [1, 2, 3, 4, 5]
    for commit in commits(single.storage):
        found = {"model.w": torch.zeros(1 << 20)}
        reader = Single(str(tmp_path), attempt=9)
        reader.attach(found)
        reader.load(commit)
        reader.close()
        assert (found["model.w"] == commit.step).all()
    assert len(commits(single.storage)) == 5


def test_big_tensors_are_cut_into_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.train.checkpoint.LOCAL_FILE", 1000)
    writer = Single(str(tmp_path))
    values = {"model.rows": torch.randn(100, 7), "model.row": torch.randn(3, 900), "model.small": torch.randn(3)}
    writer.attach(values)
    commit = writer.commit(1)
    writer.close()
    part = read_part(writer.storage, commit, read_manifest(writer.storage, commit), 0)
    assert len(part.files) > 10
    assert max(file.bytes - file.header for file in part.files) <= 1000
    for file in part.files:
        assert safetensors.torch.load_file(tmp_path / commit.path / file.name)
    found = {name: torch.zeros_like(value) for name, value in values.items()}
    reader = Single(str(tmp_path), attempt=1)
    reader.attach(found)
    reader.load(commit)
    reader.close()
    assert all(equal(found[name], value) for name, value in values.items())


def test_random_generators_continue(single: Single, tmp_path: Path) -> None:
    torch.manual_seed(5)
    single.attach(state(0))
    commit = single.commit(1)
    expected = torch.rand(4)
    torch.manual_seed(6)
    loaded(str(tmp_path), Commit(attempt=0, generation=0, step=1))
    assert torch.equal(torch.rand(4), expected)
    assert commit.step == 1


def test_a_step_that_is_saved_again_is_a_new_generation(single: Single) -> None:
    single.attach(state(0))
    made = [single.commit(step) for step in (10, 20, 10, 20, 30)]
    assert [(commit.generation, commit.step) for commit in made] == [(0, 10), (0, 20), (1, 10), (1, 20), (1, 30)]
    assert newest_commit(single.storage) == made[-1]
    assert read_manifest(single.storage, made[2]).parent == made[1].path


def test_newest_attempt_wins_over_the_highest_step(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    assert newest_commit(storage) is None
    for attempt, step in ((0, 10), (0, 20), (1, 15), (0, 30)):
        writer = Single(str(tmp_path), attempt)
        writer.attach({"w": torch.zeros(2)})
        writer.commit(step)
        writer.close()
    assert newest_commit(storage) == Commit(attempt=1, generation=0, step=15)
    assert Commit.parse("checkpoints/step_00000015/0001-0000") == newest_commit(storage)
    with pytest.raises(CheckpointError, match="does not name a checkpoint"):
        Commit.parse("checkpoints/latest")


def test_retention_follows_the_chain_across_attempts(tmp_path: Path) -> None:
    writer = Single(str(tmp_path))
    writer.attach(state(0))
    for step in (1, 2, 3):
        writer.commit(step)
    writer.commit(9)  # a straggler of attempt 0, past the fork
    writer.close()
    after = Single(str(tmp_path), attempt=1, keep=2)
    after.attach(state(0))
    after.load(Commit(attempt=0, generation=0, step=3))
    assert [commit.step for commit in after.chain] == [1, 2, 3]
    after.commit(4)
    after.close()
    assert [(commit.attempt, commit.step) for commit in commits(after.storage)] == [(0, 3), (0, 9), (1, 4)]
    assert [commit.step for commit in after.chain] == [3, 4]
    assert read_manifest(after.storage, after.chain[-1]).parent == "checkpoints/step_00000003/0000-0000"


def test_files_before_the_commit_are_there_with_it(single: Single, tmp_path: Path) -> None:
    single.attach(state(0))
    single.save(1, {}, {"metrics/0000/000000.jsonl": b"{}\n"})
    single.wait()
    assert (tmp_path / "metrics/0000/000000.jsonl").read_bytes() == b"{}\n"


def test_a_save_that_fails_is_an_event_and_the_next_one_works(single: Single, tmp_path: Path) -> None:
    single.attach(state(0))
    blocked = tmp_path / "checkpoints"
    blocked.write_text("in the way")
    single.save(1, {})
    with pytest.raises(CheckpointError, match=r"cannot save checkpoints/step_00000001/0000-0000 in .*Not a directory"):
        single.wait()
    single.save(2, {})
    single.save(3, {})  # waits for the one before, and goes on
    events = single.poll()
    assert [(event.commit.step, event.committed) for event in events] == [(2, False)]
    assert "Not a directory" in (events[0].reason or "")
    with pytest.raises(CheckpointError):
        single.wait()
    blocked.unlink()
    single.commit(4)


def test_a_writer_that_dies_is_reported_and_replaced(single: Single) -> None:
    single.attach(state(0))
    single.commit(1)
    stop_writer(single, signal.SIGSTOP)
    single.save(2, {})
    stop_writer(single, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="writer process of this rank has ended with code -9"):
        single.wait()
    single.commit(3)
    stop_writer(single, signal.SIGKILL)  # with nothing to do: nothing is lost
    os.waitid(os.P_PID, single.saver.writer_pid or 0, os.WEXITED | os.WNOWAIT)
    single.commit(4)
    assert [commit.step for commit in commits(single.storage)] == [1, 3, 4]


def stop_writer(checkpointer: Checkpointer, number: int) -> None:
    assert checkpointer.saver.writer_pid is not None
    os.kill(checkpointer.saver.writer_pid, number)


def test_a_checkpoint_that_somebody_asks_for(single: Single) -> None:
    single.attach(state(0))
    path = ask(single.storage, "ada")
    until = time.monotonic() + 30
    while not single.wanted:
        single.poll()
        assert time.monotonic() < until, "the request was not seen"
    with pytest.raises(FileNotFoundError):
        single.storage.read(path)
    single.commit(1)
    assert not single.wanted


def test_another_rank_that_never_delivers_is_named(tmp_path: Path) -> None:
    alone = World(0, 3, 0, torch.device("cpu"), grouped=False)
    first = Checkpointer(open_storage(str(tmp_path)), alone, 0, 0, Retention(), limit_s=0.5)
    first.attach({"w": torch.zeros(3)})
    first.save(1, {})
    with pytest.raises(CheckpointError, match="no part of rank 1, 2 after 0 s"):
        first.wait()
    first.limit_s = 60
    first.save(2, {})
    while not first.saver.poll(wait_s=10):  # its own part is written
        pass
    first.abandon("another rank could not write its part")
    with pytest.raises(CheckpointError, match="another rank could not write its part"):
        first.wait()
    first.close()
    assert commits(first.storage) == []


def test_the_manifest_says_what_it_is(single: Single, tmp_path: Path) -> None:
    single.attach(state(0))
    commit = single.commit(1)
    text = json.loads((tmp_path / commit.path / "manifest.json").read_text())
    assert {key: text[key] for key in ("format", "step", "attempt", "generation", "world_size", "mesh", "parent")} == {
        "format": 2, "step": 1, "attempt": 0, "generation": 0, "world_size": 1, "mesh": {"ranks": 1}, "parent": None,
    }  # fmt: skip
    assert text["state"] == {"step": 1}
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]


class Doubled(Tensor):
    """A tensor subclass as quantised optimizer states are: two plain tensors inside."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} computes with the values")


def test_names_are_canonical_and_subclasses_fall_into_their_parts() -> None:
    codes, scale = torch.zeros(4, dtype=torch.uint8), torch.ones(1)
    pieces = local_pieces(
        {
            "model._orig_mod.layers.0._checkpoint_wrapped_module.w": torch.zeros(2, 3),
            "optim.exp_avg.w": Doubled(codes, scale),
        }
    )
    assert [(piece.name, piece.shape) for piece in pieces] == [
        ("model.layers.0.w", [2, 3]),
        ("optim.exp_avg.w:codes", [4]),
        ("optim.exp_avg.w:scale", [1]),
    ]
    assert pieces[1].data.data_ptr() == codes.data_ptr()
    with pytest.raises(ValueError, match="two tensors of the state are called w"):
        local_pieces({"w": torch.zeros(1), "_orig_mod.w": torch.zeros(1)})
    with pytest.raises(TypeError, match="complex128"):
        local_pieces({"w": torch.zeros(1, dtype=torch.complex128)})


def test_snapshots_hide_no_commit(tmp_path: Path) -> None:
    """A snapshot that is staged while a save ends does not swallow the news: the next commit descends from it."""
    writer = Single(str(tmp_path), snapshots=True)
    writer.attach(state(0))
    seen = []
    for step in range(1, 40, 3):
        first = writer.save(step, {})
        until = time.monotonic() + 30
        while writer.saver.busy:
            writer.snapshot(step + 1, {})
            assert time.monotonic() < until, "the save did not end"
        seen += [event.commit for event in writer.poll() if event.committed]
        assert seen[-1] == first
    writer.close()
    assert writer.chain == seen
    assert commits(writer.storage) == seen
