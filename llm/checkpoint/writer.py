"""``python -m llm.checkpoint.writer URL RANK DESCRIPTOR``: writes what a rank has staged, beside the training.

A process of its own, so that neither Python's lock nor the SDK of an object store slows a step, and a stuck system call
holds up nobody. The staging buffer is shared memory that the rank fills; requests come in on standard input, replies
go out on standard output (llm.checkpoint.messages). When the rank dies, a save that was fully staged is still finished.
"""

from __future__ import annotations

import signal

for _number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_number, signal.SIG_IGN)  # the end of standard input is what ends this process

import contextlib  # noqa: E402
import hashlib  # noqa: E402
import math  # noqa: E402
import mmap  # noqa: E402
import os  # noqa: E402
import queue  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from array import array  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402

import msgspec  # noqa: E402
from crc32c import crc32c  # noqa: E402

from llm.checkpoint import retention  # noqa: E402
from llm.checkpoint.format import (  # noqa: E402
    FORMAT,
    ITEMSIZE,
    MANIFEST,
    PARTS,
    CheckpointError,
    Commit,
    DataFile,
    Manifest,
    PartEntry,
    PartManifest,
    Piece,
    Tensor,
    block_size,
    pack_checksums,
    parse_part_name,
    part_name,
    seal,
)
from llm.checkpoint.image import FileImage  # noqa: E402
from llm.checkpoint.messages import Abandon, Committed, Failed, Layout, Reply, Request, Save, Wanted, Written  # noqa: E402
from llm.checkpoint.requests import take  # noqa: E402
from llm.utils.storage import Storage, open_storage  # noqa: E402

LOOK_S = 5.0  # between looks for somebody who asks for a checkpoint
NICE = 5  # training comes first
POLL_S, POLL_MAX_S = 0.005, 1.0  # between looks for the other ranks' parts
CONNECTIONS = 8  # files of an object store that are sent at the same time
DISK_FILES = 2  # written at the same time
_speaking = threading.Lock()
REQUESTS = msgspec.json.Decoder(Request)


class Writer:
    """One rank's writer. ``run`` returns when the rank closes the pipe."""

    def __init__(self, storage: Storage, rank: int, descriptor: int) -> None:
        self.storage, self.rank, self.descriptor = storage, rank, descriptor
        self.remote = hasattr(storage, "within")
        self.requests: queue.Queue[Request | None] = queue.Queue()
        self.layout = Layout(size=0, boxes=[], files=[])
        self.buffer = memoryview(b"")
        self.pool = ThreadPoolExecutor(CONNECTIONS if self.remote else DISK_FILES)
        self.sums = ThreadPoolExecutor(1)
        self.ended = threading.Event()  # the rank has closed the pipe

    def run(self) -> None:
        """Serve requests, one save at a time."""
        threading.Thread(target=self._listen, daemon=True).start()
        if self.rank == 0:
            threading.Thread(target=self._watch_requests, daemon=True).start()
        while (request := self.requests.get()) is not None:
            if isinstance(request, Layout):
                self.layout = request
                self.buffer = memoryview(mmap.mmap(self.descriptor, request.size)) if request.size else memoryview(b"")
            elif isinstance(request, Save):
                self._save(request)

    def _listen(self) -> None:
        for line in sys.stdin.buffer:
            self.requests.put(REQUESTS.decode(line))
        self.requests.put(None)
        self.ended.set()

    def _watch_requests(self) -> None:
        """Rank 0: tell the rank when somebody wants a checkpoint. What cannot be looked up now, is the next time."""
        storage = open_storage(self.storage.url)  # a save's time limit is not for this
        while not self.ended.wait(LOOK_S):
            with contextlib.suppress(OSError):
                if take(storage):
                    reply(Wanted())

    def _save(self, save: Save) -> None:
        until = time.monotonic() + save.limit_s
        try:
            with self.storage.within(save.limit_s) if self.remote else contextlib.nullcontext():  # type: ignore[attr-defined]
                written = self._write_part(save)
                reply(written)
                if save.order is not None:
                    reply(self._commit(save, until))
        except (OSError, CheckpointError) as error:
            reply(Failed(commit=save.commit, reason=" ".join(str(error).split())))

    def _write_part(self, save: Save) -> Written:
        tensors: dict[str, Tensor] = {}
        done = list(self.pool.map(lambda file: self._write_file(save.commit, file), self.layout.files))
        for _, pieces in done:
            for name, tensor in pieces:
                if name in tensors:
                    tensors[name].pieces.extend(tensor.pieces)
                else:
                    tensors[name] = tensor
        part = PartManifest(
            format=FORMAT, rank=self.rank, files=[file for file, _ in done], tensors=tensors, rng=save.rng
        )
        data = msgspec.json.encode(part)
        size = sum(file.bytes for file in part.files)
        name = part_name(self.rank, size, hashlib.sha256(data).hexdigest())
        self.storage.create(f"{save.commit.path}/{name}", data)
        return Written(commit=save.commit, seconds=time.time() - save.began, bytes=size)

    def _write_file(self, commit: Commit, image: FileImage) -> tuple[DataFile, list[tuple[str, Tensor]]]:
        """Write one file, and describe it. The checksums are taken from the very memory that is written."""
        self.buffer[image.position : image.position + len(image.header)] = image.header
        data = self.buffer[image.position : image.position + image.size]
        sums = self.sums.submit(lambda: list(self._pieces(image, data)))
        self.storage.write(f"{commit.path}/{image.name}", data)
        described, size = sums.result(), len(image.header)
        return (
            DataFile(name=image.name, bytes=image.size, header=size, header_crc32c=crc32c(image.header)),
            described,
        )

    def _pieces(self, image: FileImage, data: memoryview) -> Iterator[tuple[str, Tensor]]:
        index = self.layout.files.index(image)
        for slot in image.slots:
            box = self.layout.boxes[slot.box]
            size = math.prod(slot.shape) * ITEMSIZE[box.dtype]
            block = block_size(size)
            end = slot.begin + size
            checksums = array("I", (crc32c(data[at : min(at + block, end)]) for at in range(slot.begin, end, block)))
            piece = Piece(
                offset=[a + b for a, b in zip(box.offset, slot.within, strict=True)],
                shape=slot.shape,
                file=index,
                begin=slot.begin,
                block=block,
                crc32c=pack_checksums(checksums),
            )
            yield box.name, Tensor(dtype=box.dtype, shape=box.shape, pieces=[piece], placement=box.placement)

    def _commit(self, save: Save, until: float) -> Committed:
        """Rank 0: when every part is durable, make the checkpoint count; then let retention remove older ones."""
        order, commit = save.order, save.commit
        assert order is not None
        for path, content in order.files_before.items():
            self.storage.create(path, content)
        parts = self._all_parts(save, order.world_size, until)
        manifest = Manifest(
            format=FORMAT,
            step=commit.step,
            attempt=commit.attempt,
            generation=commit.generation,
            time=time.time(),
            seconds=time.time() - save.began,
            world_size=order.world_size,
            mesh=order.mesh,
            parent=order.chain[-1].path if order.chain else None,
            code=order.code,
            parts=parts,
            state=order.state,
        )
        self.storage.create(f"{commit.path}/{MANIFEST}", seal(manifest))
        chain, warning = [*order.chain, commit], None
        try:
            chain = retention.apply(self.storage, chain, order.keep)
        except (OSError, CheckpointError) as error:  # costs space, not the run
            warning = f"older checkpoints could not be removed: {' '.join(str(error).split())}"
        return Committed(commit=commit, seconds=manifest.seconds, bytes=manifest.bytes, chain=chain, warning=warning)

    def _all_parts(self, save: Save, world_size: int, until: float) -> list[PartEntry]:
        """The part of every rank, from their names in the store: which proves that all ranks write to one place."""
        pause = POLL_S
        while True:
            listed = (parse_part_name(name) for name in self.storage.list(f"{save.commit.path}/{PARTS}"))
            found = dict(each for each in listed if each is not None)
            if len(found) >= world_size:
                return [found[rank] for rank in range(world_size)]
            left = until - time.monotonic()
            if left <= 0:
                missing = [str(rank) for rank in range(world_size) if rank not in found]
                names = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
                raise CheckpointError(f"{save.commit.path}: no part of rank {names} after {save.limit_s:.0f} s")
            self._heed(save.commit, min(pause, left))
            pause = min(pause * 1.5, POLL_MAX_S)

    def _heed(self, commit: Commit, seconds: float) -> None:
        """Wait for the rank to say that another has failed, at most ``seconds``."""
        try:
            request = self.requests.get(timeout=seconds)
        except queue.Empty:
            return
        if request is None:  # the rank has gone: finish this, then find the pipe closed
            self.requests.put(None)
            time.sleep(seconds)
        elif isinstance(request, Abandon):
            if request.commit == commit:
                raise CheckpointError(request.reason)
        else:
            raise CheckpointError(f"{commit.path}: another request came before this save ended")


def reply(message: Reply) -> None:
    """Tell the rank, if it is still there."""
    with contextlib.suppress(BrokenPipeError), _speaking:
        sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
        sys.stdout.buffer.flush()


def main() -> None:
    """Serve one rank."""
    url, rank, descriptor = sys.argv[1:]
    os.nice(NICE)
    Writer(open_storage(url), int(rank), int(descriptor)).run()


if __name__ == "__main__":
    main()
