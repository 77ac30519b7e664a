"""Writing a checkpoint that is not in memory, one file after the other, as one rank."""

from __future__ import annotations

import contextlib
import math
import mmap
import queue
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint.format import (
    FORMAT,
    ITEMSIZE,
    MANIFEST,
    CheckpointError,
    Commit,
    Manifest,
    PartEntry,
    seal,
)
from llm.checkpoint.image import Box, FileImage, lay_out
from llm.checkpoint.lineage import delete, folders, is_committed
from llm.checkpoint.part import Described, describe, write_manifest
from llm.tools.source import Item
from llm.train.pieces import DTYPES
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import Storage

# Bytes of a file, and how many are in memory at a time: one is filled while the others are written.
FILE, FILES = 64 << 20, 4
LOCAL_FILE, LOCAL_FILES = 256 << 20, 2
MARK = "importing"  # only one import writes to a folder


def next_commit(storage: Storage, step: int) -> tuple[Commit, Commit | None]:
    """(name for a checkpoint that comes from elsewhere, its parent): what the run would resume from then.

    The parent is the newest commit, if it is older by its step; nobody follows a lineage that goes back in time.
    """
    taken = folders(storage)
    if not taken:
        return Commit(attempt=0, generation=0, step=step), None
    commit = Commit(attempt=taken[-1].attempt, generation=taken[-1].generation + 1, step=step)
    newest = next((each for each in reversed(taken) if is_committed(storage, each)), None)
    return commit, newest if newest is not None and newest.step < step else None


def write_commit(
    storage: Storage,
    commit: Commit,
    parent: Commit | None,
    items: Sequence[Item],
    state: dict[str, Any],
    advance: Callable[[int], None],
) -> Manifest:
    """Write and commit what ``items`` give when they are asked. ``advance`` is told the bytes that were read.

    Memory: 512 MiB of files (256 MiB for a store) and the largest item. When it fails, nothing was committed and what
    was written is removed. Raises CheckpointError and OSError, also those of the items.
    """
    began, token = time.time(), secrets.token_bytes(16)
    try:
        storage.create(f"{commit.path}/{MARK}", token)
        part = _write_part(storage, commit, items, advance)
        manifest = Manifest(
            format=FORMAT,
            step=commit.step,
            attempt=commit.attempt,
            generation=commit.generation,
            time=time.time(),
            seconds=time.time() - began,
            world_size=1,
            mesh={"ranks": 1},
            parent=None if parent is None else parent.path,
            code="",
            parts=[part],
            state=state,
        )
        storage.create(f"{commit.path}/{MANIFEST}", seal(manifest))
        storage.remove(f"{commit.path}/{MARK}")
    except BaseException as error:
        with contextlib.suppress(OSError):  # what is left has no manifest, and `llmops ckpt gc` removes it
            _undo(storage, commit, token)
        if isinstance(error, FileExistsError):
            raise CheckpointError(f"somebody else is writing {commit.path} in {storage.url}") from None
        raise
    return manifest


def _undo(storage: Storage, commit: Commit, token: bytes) -> None:
    """Remove what was written; not what another import has written, which came first."""
    try:
        ours = storage.read(f"{commit.path}/{MARK}") == token
    except FileNotFoundError:
        ours = False
    if ours:
        delete(storage, commit)
    for path in (commit.path, commit.path.rpartition("/")[0]):
        storage.remove_folder(path, only_empty=True)


def _write_part(storage: Storage, commit: Commit, items: Sequence[Item], advance: Callable[[int], None]) -> PartEntry:
    local = isinstance(storage, LocalStorage)
    boxes = [item.box for item in items]
    images = lay_out(boxes, 0, LOCAL_FILE if local else FILE)
    count = min(LOCAL_FILES if local else FILES, len(images))
    size = max((image.size for image in images), default=0)
    free: queue.Queue[mmap.mmap] = queue.Queue()
    for _ in range(count):
        free.put(mmap.mmap(-1, size))
    values = _Values(items)
    with ThreadPoolExecutor(max(count, 1)) as pool:
        written: list[Future[Described]] = []
        for index, image in enumerate(images):
            buffer = free.get()  # every write gives its buffer back, and the store bounds every write
            _check(written)
            advance(_fill(buffer, boxes, image, values))
            data = memoryview(buffer)[: image.size]
            future = pool.submit(_write_file, storage, commit, boxes, image, index, data)
            future.add_done_callback(lambda _, buffer=buffer: free.put(buffer))  # type: ignore[misc]
            written.append(future)
        return write_manifest(storage, commit, 0, [future.result() for future in written], rng={})


def _check(written: Sequence[Future[Any]]) -> None:
    """Raise what a write has failed with."""
    for future in written:
        if future.done():
            future.result()


class _Values:
    """The values of items. The last one is kept: a tensor larger than a file is asked for several times in a row."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.number, self.last = -1, torch.empty(0)

    def get(self, number: int) -> Tensor:
        if number != self.number:
            self.last = torch.empty(0)  # before the next is read
            self.last, self.number = self.items[number].read(), number
        return self.last


def _fill(buffer: mmap.mmap, boxes: Sequence[Box], image: FileImage, values: _Values) -> int:
    """Put a file together; returns the bytes of its values."""
    buffer[: len(image.header)] = image.header
    for slot in image.slots:
        dtype = boxes[slot.box].dtype
        size = math.prod(slot.shape) * ITEMSIZE[dtype]
        if not size:
            continue
        cut = tuple(slice(at, at + count) for at, count in zip(slot.within, slot.shape, strict=True))
        target = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=slot.begin)
        target.view(DTYPES[dtype]).view(slot.shape).copy_(values.get(slot.box)[cut])
    return image.size - len(image.header)


def _write_file(
    storage: Storage, commit: Commit, boxes: Sequence[Box], image: FileImage, index: int, data: memoryview
) -> Described:
    described = describe(boxes, image, index, data)
    storage.write(f"{commit.path}/{image.name}", data)
    return described
