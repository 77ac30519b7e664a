"""What one rank of many does for a checkpoint apart from moving bytes, with the parts of the others simulated."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from llm.checkpoint.format import (
    FORMAT,
    MANIFEST,
    PARTS,
    Commit,
    DataFile,
    Manifest,
    PartEntry,
    PartManifest,
    Piece,
    Tensor,
    block_size,
    open_part,
    parse_part_name,
    part_name,
    seal,
)
from llm.checkpoint.image import Box, lay_out
from llm.checkpoint.lineage import read_manifest
from llm.checkpoint.messages import Layout
from llm.checkpoint.plan import Want, alone, plan
from llm.utils.storage import open_storage

COLUMNS = 1024  # of each tensor, in float32; every rank has a row
FILE = 64 << 20
COMMIT = Commit(attempt=0, generation=0, step=1)


def boxes(tensors: int, rank: int, ranks: int) -> list[Box]:
    """What a rank of ``ranks`` has of ``tensors`` sharded tensors."""
    shape = [ranks, COLUMNS]
    return [
        Box(name=f"model.blocks.{n}.weight", dtype="F32", shape=shape, offset=[rank, 0], local_shape=[1, COLUMNS])
        for n in range(tensors)
    ]


def part(tensors: int, rank: int, ranks: int) -> PartManifest:
    """The part manifest of a rank, with checksums of nothing."""
    held = boxes(tensors, rank, ranks)
    files = lay_out(held, rank, FILE)
    made = {}
    for number, file in enumerate(files):
        for slot in file.slots:
            box = held[slot.box]
            block = block_size(box.bytes)
            sums = base64.b64encode(b"\0\0\0\0" * -(-box.bytes // block)).decode()
            piece = Piece(offset=box.offset, shape=slot.shape, file=number, begin=slot.begin, block=block, crc32c=sums)
            made[box.name] = Tensor(dtype="F32", shape=box.shape, pieces=[piece], placement="S0")
    described = [DataFile(name=file.name, bytes=file.size, header=len(file.header), header_crc32c=0) for file in files]
    return PartManifest(format=FORMAT, rank=rank, files=described, tensors=made, rng={})


def measure(tensors: int, ranks: int, folder: Path) -> dict[str, float]:
    """What is done -> seconds."""
    times: dict[str, float] = {}

    def clock(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        times[name] = time.perf_counter() - began
        return result

    held = boxes(tensors, 0, ranks)
    files = clock("once: lay out the files of a rank", lambda: lay_out(held, 0, FILE))
    layout = Layout(size=0, boxes=held, files=files)
    line = clock("once: tell the writer, encode", lambda: msgspec.json.encode(layout))
    clock("once: tell the writer, decode", lambda: msgspec.json.decode(line, type=Layout))

    parts = [part(tensors, rank, ranks) for rank in range(2)]
    encoded = clock("save: encode the part manifest, digest", lambda: _encode(parts[0]))
    data, entry = encoded
    times["(bytes of a part manifest)"] = len(data)
    clock("load: decode and validate a part", lambda: open_part(data, COMMIT, 0, entry))

    storage = open_storage(str(folder))
    for rank in range(ranks):
        name = part_name(rank, entry.bytes, hashlib.sha256(str(rank).encode()).hexdigest())
        path = folder / COMMIT.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    clock(f"save: rank 0 lists {ranks} parts, writes the manifest", lambda: _commit(storage, ranks))
    clock("load: read and check the manifest", lambda: read_manifest(storage, COMMIT))

    same = [(number, _want(each, 1)) for number, each in enumerate(held)]
    clock("load: plan, as many ranks as saved", lambda: _plan(parts[:1], same))
    fewer = [(number, _want(each, 2)) for number, each in enumerate(held)]
    clock("load: plan, half as many ranks", lambda: _plan(parts, fewer))
    return times


def _encode(made: PartManifest) -> tuple[bytes, PartEntry]:
    data = msgspec.json.encode(made)
    size = sum(file.bytes for file in made.files)
    return data, PartEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=size)


def _commit(storage: Any, ranks: int) -> None:
    listed = (parse_part_name(name) for name in storage.list(f"{COMMIT.path}/{PARTS}"))
    found = dict(each for each in listed if each is not None)
    manifest = Manifest(
        format=FORMAT,
        step=COMMIT.step,
        attempt=COMMIT.attempt,
        generation=COMMIT.generation,
        time=0.0,
        seconds=0.0,
        world_size=ranks,
        mesh={"ranks": ranks},
        parent=None,
        code="",
        parts=[found[rank] for rank in range(ranks)],
        state={},
    )
    storage.create(f"{COMMIT.path}/{MANIFEST}", seal(manifest))


def _want(box: Box, rows: int) -> Want:
    return Want(box.name, box.dtype, box.shape, box.offset, [rows, COLUMNS])


def _plan(parts: list[PartManifest], wants: list[tuple[int, Want]]) -> None:
    assert len(alone(parts, [want for _, want in wants])) == len(wants)
    plan(COMMIT, parts, {0: wants}, 0, 1, True)
