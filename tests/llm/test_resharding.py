"""Loading into any number of ranks and any layout, by real processes joined over gloo."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm.checkpoint.boxes import Box
from llm.checkpoint.format import CheckpointError, Commit, DamagedError
from llm.checkpoint.lineage import read_manifest, read_part
from llm.train.pieces import DTYPES, NAMES, LocalPiece, local_pieces
from llm.train.resharding import _Target, load
from llm.train.world import World
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import Storage, open_storage
from tests.checkpoint.maker import make_commit
from tests.llm.layouts import SHAPES, assert_filled, cut, full, raw, save, set_limits, targets
from tests.llm.ranks import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("stores"))
    yield started
    started.close()


# --- any number of ranks, any layout ---------------------------------------------------------------------------------

SAVED = [
    (1, "rows"),
    (2, "rows"),
    (2, "columns"),
    (3, "rows"),
    (3, "strips"),
    (3, "replicated"),
    (4, "grid"),
    (8, "rows"),
]


def load_every_layout(world: World, root: str, commits: list[Commit], small: bool) -> int:
    set_limits(small)
    storage, count = open_storage(root), 0
    for commit in commits:
        manifest = read_manifest(storage, commit)
        for layout in ("rows", "columns", "grid", "strips", "replicated"):
            pieces = targets(layout, world.rank, world.size)
            rng = load(storage, commit, manifest, pieces, world)
            assert (rng is not None) == (manifest.world_size == world.size)
            if rng is not None:
                assert rng == read_part(storage, commit, manifest, world.rank).rng
            assert_filled(pieces)
            count += 1
        if world.size > 1:
            count += load_dtensors(world, storage, commit)
    return count


def load_dtensors(world: World, storage: Storage, commit: Commit) -> int:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    plans = [((world.size,), [Shard(0)]), ((world.size,), [Replicate()])]
    if world.size % 2 == 0 and world.size > 2:
        half = (2, world.size // 2)
        plans += [(half, [Replicate(), Shard(0)]), (half, [Shard(0), Shard(1)]), (half, [Shard(0), Shard(0)])]
    for shape, placements in plans:
        mesh = init_device_mesh("cpu", shape)
        state: dict[str, torch.Tensor] = {}
        for name, (whole, dtype) in SHAPES.items():
            usable = [each if not each.is_shard() or each.dim < len(whole) else Replicate() for each in placements]
            extent, _ = compute_local_shape_and_global_offset(whole, mesh, usable)
            local, stride = torch.zeros(extent, dtype=dtype), torch.empty(whole).stride()
            state[name] = DTensor.from_local(
                local, mesh, usable, run_check=False, shape=torch.Size(whole), stride=stride
            )
        pieces = local_pieces(state)
        load(storage, commit, read_manifest(storage, commit), pieces, world)
        assert_filled(pieces)
        assert {piece.name for piece in local_pieces(state)} >= {"model.one", "model.empty"}
    return len(plans)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_any_layout_becomes_any_other(tmp_path: Path, ranks: Ranks, size: int) -> None:
    storage = open_storage(str(tmp_path))
    commits = [save(storage, step, *saved) for step, saved in enumerate(SAVED)]
    few = commits[:: 2 if size > 3 else 1]
    counts = ranks(size, load_every_layout, str(tmp_path), few[::2], False)
    counts += ranks(size, load_every_layout, str(tmp_path), few[1::2], True)
    assert min(counts) >= 5 * len(few) // 2


# --- S3 --------------------------------------------------------------------------------------------------------------


class Counted:
    """A store that counts the bytes it gives."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.bytes, self.paths = storage, 0, set[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        data = self._storage.read(path, start, end)
        self.bytes += len(data)
        return data

    def read_into(self, path: str, start: int, buffers: Sequence[memoryview]) -> int:
        count = self._storage.read_into(path, start, buffers)
        self.bytes += count
        self.paths.add(path.rsplit("/", 1)[1])
        return count


WIDE, TALL = {f"l{i}": (512, 640) for i in range(12)}, {"embedding": (2048, 640)}


def load_counted(world: World, url: str, commit: Commit, axis: int | None) -> int:
    storage = Counted(open_storage(url))
    manifest = read_manifest(storage, commit)
    pieces = []
    for number, (name, shape) in enumerate({**WIDE, **TALL}.items()):
        offset, extent = [0, 0], list(shape)
        if axis is not None:
            width = -(-shape[axis] // world.size)
            offset[axis], extent[axis] = world.rank * width, min(width, shape[axis] - world.rank * width)
        pieces.append(LocalPiece(name, torch.zeros(extent), list(shape), offset))
        load_expected(number, shape)
    load(storage, commit, manifest, pieces, world)
    for number, piece in enumerate(pieces):
        expected = cut(load_expected(number, tuple(piece.shape)), piece.offset, list(piece.data.shape))
        assert torch.equal(piece.data, expected), piece.name
    return storage.bytes


def load_expected(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) + number


def test_s3_gives_each_byte_about_once(ranks: Ranks, s3_url: str) -> None:
    storage = open_storage(s3_url)
    held: list[dict[str, Any]] = [{}, {}]
    for number, (name, shape) in enumerate({**WIDE, **TALL}.items()):
        values, half = load_expected(number, shape).numpy(), shape[0] // 2
        for rank in range(2):
            held[rank][name] = (values[rank * half : (rank + 1) * half], list(shape), [rank * half, 0])
    commit = make_commit(storage, 5, held, file_bytes=16 << 20)
    state = read_manifest(storage, commit).bytes
    for size, axis in ((3, 0), (2, 1), (2, None)):
        fetched = sum(ranks(size, load_counted, s3_url, commit, axis))
        assert state <= fetched <= 1.05 * state, (size, axis)


# --- parts of a state ------------------------------------------------------------------------------------------------


def alone() -> World:
    return World(0, 1, 0, torch.device("cpu"), grouped=False)


def load_model_alone(world: World, root: str, commit: Commit) -> set[str]:
    storage = Counted(LocalStorage(Path(root)))
    pieces = targets("columns", world.rank, world.size, only="model.")
    manifest = read_manifest(storage, commit)
    load(storage, commit, manifest, pieces, world, prefixes=("model.",))
    assert_filled(pieces)
    with pytest.raises(CheckpointError, match=r"3 unexpected in the checkpoint: optimizer\.moment, optimizer\.quant"):
        load(storage, commit, manifest, pieces, world)
    few = targets("rows", world.rank, world.size, only="model.h")
    load(storage, commit, manifest, few, world, strict=False)
    assert_filled(few)
    return storage.paths


def test_a_subset_by_prefix(tmp_path: Path, ranks: Ranks) -> None:
    held = [{}, {}]
    for part, prefix in enumerate(("model.", "optimizer.")):
        for name, (shape, dtype) in SHAPES.items():
            if name.startswith(prefix):
                data = np.frombuffer(raw(full(name)), f"V{dtype.itemsize}").reshape(shape)
                held[part][name] = (data, list(shape), [0] * len(shape), NAMES[dtype])
    commit = make_commit(LocalStorage(tmp_path), 1, held)
    for size in (1, 2, 3):
        paths = set().union(*ranks(size, load_model_alone, str(tmp_path), commit))
        assert paths
        assert all(path.startswith("rank00000") for path in paths), "it read what nobody needs"


def test_targets_of_any_memory(tmp_path: Path) -> None:
    """Transposed, strided, tied, overlapping in memory with what must not change."""
    storage = LocalStorage(tmp_path)
    commit = save(storage, 1, 2, "rows")
    manifest = read_manifest(storage, commit)
    values = full("model.weight")
    transposed = torch.zeros(96, 700).t()
    surrounded = torch.full((702, 100), 7.0)
    strided = torch.zeros(700, 200)[:, ::2][:, :96]
    parameter = torch.nn.Parameter(torch.zeros(700, 96))
    byte = torch.zeros(33, 130, dtype=torch.float8_e4m3fn).t().contiguous().t()
    held = [transposed, surrounded[1:701, 2:98], strided, parameter, parameter]
    pieces = [LocalPiece("model.weight", data, [700, 96], [0, 0]) for data in held]
    pieces.append(LocalPiece("model.float8", byte, [33, 130], [0, 0]))
    load(storage, commit, manifest, pieces, alone(), strict=False)
    for data in held:
        assert raw(data.detach()) == raw(values)
    assert raw(byte) == raw(full("model.float8"))
    surrounded[1:701, 2:98] = 7.0
    assert torch.all(surrounded == 7.0)


def test_a_tensor_on_a_device_is_filled_through_a_copy() -> None:
    """The way of a GPU's memory, here without one: torch copies, numpy does not see it."""
    tensor = torch.zeros(4, 6, dtype=torch.bfloat16)
    target = _Target(tensor[:, 1:5])
    target.array = None
    values = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    target.put(Box((1, 2), (2, 6)), values.view(torch.uint8).numpy())
    expected = torch.zeros(4, 6, dtype=torch.bfloat16)
    expected[1:3, 2:5] = values
    assert torch.equal(tensor, expected)


def test_every_type_that_a_checkpoint_may_have(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    held, pieces, expected = {}, [], {}
    for name, dtype in DTYPES.items():
        data = torch.randint(0, 2 if name == "BOOL" else 256, (15 * dtype.itemsize,), generator=generator)
        expected[name] = data.to(torch.uint8)
        array = np.frombuffer(expected[name].numpy().tobytes(), f"V{dtype.itemsize}").reshape(3, 5)
        held[name] = (array, [3, 5], [0, 0], name)
        pieces.append(LocalPiece(name, torch.zeros(2, 3, dtype=dtype), [3, 5], [1, 2]))
    commit = make_commit(LocalStorage(tmp_path), 1, [held])
    load(LocalStorage(tmp_path), commit, read_manifest(LocalStorage(tmp_path), commit), pieces, alone())
    for piece in pieces:
        whole = expected[piece.name].view(piece.data.dtype).reshape(3, 5)
        assert raw(piece.data) == raw(whole[1:, 2:]), piece.name


# --- what does not fit, what is damaged, what cannot be read ---------------------------------------------------------


def outcome(world: World, storage: Storage, commit: Commit, pieces: list[LocalPiece]) -> tuple[str, str]:
    try:
        load(storage, commit, read_manifest(storage, commit), pieces, world)
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return "none", ""


def load_misfits(world: World, root: str, commit: Commit) -> list[tuple[str, str]]:
    storage = Counted(LocalStorage(Path(root)))
    found = []
    for change in ("missing", "unexpected", "shape", "dtype"):
        pieces = targets("rows", world.rank, world.size)
        if change == "unexpected":
            pieces = [piece for piece in pieces if piece.name != "model.head"]
        elif world.rank == world.size - 1:  # only one of them has another model
            if change == "missing":
                pieces += [LocalPiece(f"model.new{i}", torch.zeros(2), [2], [0]) for i in range(11)]
            elif change == "shape":
                pieces.append(LocalPiece("model.norm", torch.zeros(4), [4], [0]))
            else:
                pieces.append(LocalPiece("model.norm", torch.zeros(3).double(), [3], [0]))
        found.append(outcome(world, storage, commit, pieces))
    assert not storage.paths, "data was read before it was known to fit"
    return found


@pytest.mark.parametrize("saved", [1, 2])
def test_misfits_are_the_same_error_on_every_rank(tmp_path: Path, ranks: Ranks, saved: int) -> None:
    commit = save(LocalStorage(tmp_path), 1, saved, "rows")
    for size in (1, 2):
        results = ranks(size, load_misfits, str(tmp_path), commit)
        assert all(result == results[0] for result in results)
        assert {kind for kind, _ in results[0]} == {"CheckpointError"}
        missing, unexpected, shape, dtype = (text for _, text in results[0])
        assert "11 missing in the checkpoint: model.new0, model.new1, model.new10, model.new2" in missing
        assert "model.new8 and 1 more" in missing
        assert "1 unexpected in the checkpoint: model.head" in unexpected
        assert "1 of another shape or type: model.norm is F32 [3], wanted is F32 [4]" in shape
        assert "1 of another shape or type: model.norm is F32 [3], wanted is F64 [3]" in dtype


class Refusing(LocalStorage):
    """A file system that refuses one file."""

    refused = "nothing"

    def read_into(self, path: str, start: int, buffers: Sequence[memoryview]) -> int:
        if path.endswith(self.refused):
            raise PermissionError(13, "Permission denied", path)
        return super().read_into(path, start, buffers)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def damages(folder: Path) -> list[tuple[str, Callable[[], object], str]]:
    """(name, what to do to a commit of two ranks, what the error must say)."""
    files = sorted(folder.glob("rank00001-*.safetensors"))
    (part,) = folder.glob("parts/00001.*")
    last = files[-1]

    def swap(a: Path, b: Path) -> None:
        a.rename(folder / "aside")
        b.rename(a)
        (folder / "aside").rename(b)

    return [
        ("header", lambda: flip(last, 20), f"{last.name} is damaged: .* header .*optimizer"),
        ("header length", lambda: flip(files[0], 0), f"{files[0].name} is damaged: .* header .*model"),
        ("first value", lambda: flip(last, len(header(last))), f"{last.name} is damaged: .*tensor optimizer"),
        ("last value", lambda: flip(last, last.stat().st_size - 1), f"{last.name} is damaged: .*tensor optimizer"),
        ("cut", lambda: os.truncate(last, last.stat().st_size - 1), f"{last.name} is cut short: .*tensor optimizer"),
        ("cut to nothing", lambda: os.truncate(last, 0), f"{last.name} is cut short: .*tensor optimizer"),
        ("no file", last.unlink, f"{last.name} is missing .*tensor optimizer"),
        ("swapped", lambda: swap(*files[:2]), r"rank00001-00.\.safetensors is .*tensor (model|optimizer)"),
        ("part", lambda: flip(part, 300), f"{part.name} is damaged"),
        ("cut part", lambda: os.truncate(part, 100), f"{part.name} is damaged"),
        ("no part", part.unlink, f"{part.name} is missing"),
    ]


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def load_damaged(world: World, roots: list[str], commit: Commit, small: bool) -> list[list[tuple[str, str]]]:
    set_limits(small)
    return [
        [
            outcome(world, LocalStorage(Path(root)), commit, targets(layout, world.rank, world.size))
            for layout in ("rows", "columns")
        ]
        for root in roots
    ]


@pytest.mark.parametrize(("size", "small"), [(1, False), (2, False), (3, True)])
def test_damage_is_found_and_named_on_every_rank(tmp_path: Path, ranks: Ranks, size: int, small: bool) -> None:
    commit, roots, expected = None, [], []
    for number in range(len(damages_of(tmp_path / "example"))):
        root = tmp_path / f"{number}"
        commit = save(LocalStorage(root), 1, 2, "rows")
        name, spoil, pattern = damages(root / commit.path)[number]
        spoil()
        roots.append(str(root))
        expected.append((name, pattern))
    results = ranks(size, load_damaged, roots, commit, small)
    for number, (name, pattern) in enumerate(expected):
        for layout in range(2):
            found = {tuple(result[number][layout]) for result in results}
            assert len(found) == 1, "the ranks do not agree"
            kind, text = found.pop()
            assert kind == "DamagedError", (name, kind, text)
            assert re.search(pattern, text), (name, text)


def damages_of(root: Path) -> list[Any]:
    return damages(root / save(LocalStorage(root), 1, 2, "rows").path)


def load_refused(world: World, root: str, commit: Commit) -> list[tuple[str, str]]:
    found = []
    for layout in ("rows", "replicated"):
        storage = Refusing(Path(root))
        storage.refused = "rank00000-000.safetensors"
        found.append(outcome(world, storage, commit, targets(layout, world.rank, world.size)))
    return found


def test_a_refusal_is_no_damage_and_damage_outranks_it(tmp_path: Path, ranks: Ranks) -> None:
    commit = save(LocalStorage(tmp_path), 1, 2, "rows")
    for size in (1, 2, 3):
        for result in ranks(size, load_refused, str(tmp_path), commit):
            for kind, text in result:
                assert kind == "CheckpointError"
                assert "rank00000-000.safetensors: [Errno 13] Permission denied" in text
                assert f"cannot load {commit.path} from {tmp_path}" in text
    last = sorted((tmp_path / commit.path).glob("rank00001-*"))[0]
    flip(last, len(header(last)))
    for kind, text in [each[0] for each in ranks(2, load_refused, str(tmp_path), commit)]:
        assert kind == "DamagedError"
        assert f"{last.name} is damaged" in text


def test_the_manifest_of_another_number_of_files_is_not_trusted(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    one, two = save(storage, 1, 2, "rows"), save(storage, 2, 2, "columns")
    (part,) = (tmp_path / one.path / "parts").glob("00000.*")
    (other,) = (tmp_path / two.path / "parts").glob("00000.*")
    part.write_bytes(other.read_bytes())
    with pytest.raises(DamagedError, match="is damaged"):
        load(storage, one, read_manifest(storage, one), targets("rows", 0, 1), alone())


# --- memory ----------------------------------------------------------------------------------------------------------

BIG = (48 << 10, 1024)  # 192 MiB of float32


def load_big(world: World, root: str, commit: Commit, axis: int | None) -> int:
    offset, extent = [0, 0], list(BIG)
    if axis is not None:
        extent[axis] //= world.size
        offset[axis] = extent[axis] * world.rank
    data = torch.ones(extent)
    storage = open_storage(root)
    manifest = read_manifest(storage, commit)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    load(storage, commit, manifest, [LocalPiece("w", data, list(BIG), offset)], world)
    assert float(data.sum()) == 0
    return peak() - before


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, ranks: Ranks) -> None:
    held = [{"w": (np.zeros((BIG[0] // 2, BIG[1]), np.float32), list(BIG), [rank * BIG[0] // 2, 0])} for rank in (0, 1)]
    commit = make_commit(LocalStorage(tmp_path), 1, held, file_bytes=1 << 30)
    for size, axis, most in ((1, 0, 48 << 20), (2, 1, 160 << 20), (2, None, 160 << 20)):
        for extra in ranks(size, load_big, str(tmp_path), commit, axis):
            assert extra <= most, (size, axis)
