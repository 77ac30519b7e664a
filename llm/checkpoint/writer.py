"""``python -m llm.checkpoint.writer URL RANK DESCRIPTOR``: writes what a rank has staged, beside the training.

A process of its own, so that neither Python's lock nor the SDK of an object store slows a step, and a stuck system call
holds up nobody. The staging buffer is shared memory that the rank fills; requests come in on standard input, replies
go out on standard output (llm.checkpoint.messages). When the rank dies, a save that was fully staged is still finished,
and a newer snapshot that all writers of the attempt hold is committed.
"""

from __future__ import annotations

import signal

for _number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_number, signal.SIG_IGN)  # the end of standard input is what ends this process

import contextlib  # noqa: E402
import mmap  # noqa: E402
import os  # noqa: E402
import queue  # noqa: E402
import select  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait  # noqa: E402

import msgspec  # noqa: E402

from llm.checkpoint import retention  # noqa: E402
from llm.checkpoint.format import (  # noqa: E402
    FORMAT,
    MANIFEST,
    PARTS,
    CheckpointError,
    Commit,
    Manifest,
    PartEntry,
    parse_part_name,
    seal,
)
from llm.checkpoint.image import FileImage  # noqa: E402
from llm.checkpoint.lineage import delete  # noqa: E402
from llm.checkpoint.messages import (  # noqa: E402
    Abandon,
    CommitOrder,
    Committed,
    Failed,
    Forget,
    Keep,
    Layout,
    Leave,
    Reply,
    Request,
    Save,
    Wanted,
    Written,
)
from llm.checkpoint.part import Described, describe, write_manifest  # noqa: E402
from llm.checkpoint.requests import take  # noqa: E402
from llm.checkpoint.rescue import agree  # noqa: E402
from llm.utils.local_storage import LocalStorage  # noqa: E402
from llm.utils.storage import Storage, open_storage  # noqa: E402

LOOK_S = 5.0  # between looks for somebody who asks for a checkpoint
NICE = 5  # training comes first
POLL_S, POLL_MAX_S = 0.005, 1.0  # between looks for the other ranks' parts
CONNECTIONS = 8  # files of an object store that are sent at the same time
DISK_FILES = 2  # written at the same time
ORPHAN_S = 1.0  # between looks whether the rank is still there
_speaking = threading.Lock()
REQUESTS = msgspec.json.Decoder(Request)


class Writer:
    """One rank's writer. ``run`` returns when the rank says so, closes the pipe, or is gone."""

    def __init__(self, storage: Storage, rank: int, descriptor: int, replies: int) -> None:
        self.storage, self.rank, self.descriptor, self.replies = storage, rank, descriptor, replies
        self.remote = not isinstance(storage, LocalStorage)
        self.requests: queue.Queue[Request | None] = queue.Queue()
        self.layout = Layout(size=0, boxes=[], files=[])
        self.memory = memoryview(b"")  # all slots
        self.kept: dict[int, Keep] = {}  # snapshots, by slot
        self.left = False  # the rank has said that it leaves
        self.chain: list[Commit] = []  # rank 0: after the last commit
        self.pool = ThreadPoolExecutor(CONNECTIONS if self.remote else DISK_FILES)
        self.sums = ThreadPoolExecutor(1)
        self.ended = threading.Event()  # no more requests will come

    def run(self) -> None:
        """Serve requests, one save at a time."""
        threading.Thread(target=self._listen, daemon=True).start()
        if self.rank == 0:
            threading.Thread(target=self._watch_requests, daemon=True).start()
        while (request := self.requests.get()) is not None:
            if isinstance(request, Layout):
                self.layout, size = request, request.size * request.slots
                self.memory = memoryview(mmap.mmap(self.descriptor, size)) if size else memoryview(b"")
            elif isinstance(request, Save):
                self._save(request)
            else:
                self._remember(request)
        if self.kept and not self.left:
            self._rescue()

    def _remember(self, request: Request) -> None:
        if isinstance(request, Keep):
            self.kept[request.save.slot] = request
        elif isinstance(request, Forget):
            self.kept.pop(request.slot, None)

    def _rescue(self) -> None:
        """The rank has vanished: commit the newest snapshot that all ranks have."""
        held = {keep.save.commit: keep for keep in self.kept.values()}
        any_one = next(iter(held.values()))
        limit_s = any_one.save.limit_s
        try:
            storage = self.storage.within(limit_s)
            commit = agree(storage, self.rank, any_one.world_size, sorted(held), limit_s)
        except (OSError, CheckpointError, msgspec.DecodeError) as error:
            print(f"the snapshot of rank {self.rank} is lost: {_line(error)}", file=sys.stderr, flush=True)
            return
        if commit is None:
            return
        save = held[commit].save
        order = save.order
        if order is not None and self.chain:  # something was committed since
            order = msgspec.structs.replace(order, chain=self.chain)
        failed = self._save(msgspec.structs.replace(save, began=time.time(), order=order))
        if failed is None:
            print(f"rank {self.rank} wrote the snapshot of step {commit.step}", file=sys.stderr, flush=True)
        else:
            print(f"the snapshot of rank {self.rank} is lost: {failed.reason}", file=sys.stderr, flush=True)

    def _listen(self) -> None:
        try:
            for line in _lines(sys.stdin.fileno()):
                request = REQUESTS.decode(line)
                if isinstance(request, Leave):
                    self.left = True
                    break
                self.requests.put(request)
        finally:  # whatever happened here, nobody waits for another request
            self.requests.put(None)
            self.ended.set()

    def _watch_requests(self) -> None:
        """Rank 0: tell the rank when somebody wants a checkpoint. What cannot be looked up now, is the next time."""
        storage = open_storage(self.storage.url)  # a save's time limit is not for this
        while not self.ended.wait(LOOK_S):
            with contextlib.suppress(OSError):
                if take(storage):
                    self._reply(Wanted())

    def _save(self, save: Save) -> Failed | None:
        """Write this rank's part and, on rank 0, commit them all. Tells the rank how it went; returns what failed."""
        until = time.monotonic() + save.limit_s
        storage = self.storage.within(save.limit_s)
        try:
            self._reply(self._write_part(storage, save))
            if save.order is None:
                return None
            manifest = self._manifest(storage, save, save.order, until)
        except (OSError, CheckpointError) as error:
            if save.order is not None:  # what rank 0 does not commit, nobody does: the space can be used again
                with contextlib.suppress(OSError):
                    delete(storage, save.commit)
            return self._fail(save.commit, error)
        try:
            self._reply(self._commit(storage, save.order, manifest))
        except OSError as error:  # whether it counts is not known, if the answer was lost: nothing is removed
            return self._fail(save.commit, error)
        return None

    def _fail(self, commit: Commit, error: Exception) -> Failed:
        failed = Failed(commit=commit, reason=_line(error))
        self._reply(failed)
        return failed

    def _write_part(self, storage: Storage, save: Save) -> Written:
        files = self._write_files(storage, save.commit, self._slot(save.slot))
        entry = write_manifest(storage, save.commit, self.rank, files, save.rng)
        return Written(commit=save.commit, seconds=time.time() - save.began, bytes=entry.bytes)

    def _slot(self, number: int) -> memoryview:
        """The staged state in one of the slots of the shared memory."""
        size = self.layout.size
        return self.memory[number * size : (number + 1) * size]

    def _write_files(self, storage: Storage, commit: Commit, staged: memoryview) -> list[Described]:
        """Write all files. When one fails the others have ended too before it is raised: the buffer is free again."""
        images = enumerate(self.layout.files)
        files = [self.pool.submit(self._write_file, storage, commit, staged, *each) for each in images]
        try:
            wait(files, return_when=FIRST_EXCEPTION)  # the rank bounds this: it kills a writer that takes too long
            return [file.result() for file in files if file.done()]
        except OSError:
            for file in files:
                file.cancel()
            wait(files)
            if not self.remote:  # nobody knows of them yet, and the disk may be full
                for image in self.layout.files:
                    with contextlib.suppress(OSError):
                        storage.remove(f"{commit.path}/{image.name}")
            raise

    def _write_file(
        self, storage: Storage, commit: Commit, staged: memoryview, index: int, image: FileImage
    ) -> Described:
        """Write one file, and describe it. The checksums are taken from the very memory that is written."""
        staged[image.position : image.position + len(image.header)] = image.header
        data = staged[image.position : image.position + image.size]
        described = self.sums.submit(describe, self.layout.boxes, image, index, data)
        storage.write(f"{commit.path}/{image.name}", data)
        return described.result()

    def _manifest(self, storage: Storage, save: Save, order: CommitOrder, until: float) -> Manifest:
        """Rank 0: what to commit, once every part is durable. Raises CheckpointError when that takes too long."""
        commit = save.commit
        for path, content in order.files_before.items():
            storage.create(path, content)
        parts = self._all_parts(storage, save, order.world_size, until)
        if time.monotonic() > until:  # this process was stopped for a while: its rank may have given up
            raise CheckpointError(f"{commit.path} was not complete within {save.limit_s:.0f} s")
        return Manifest(
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

    def _commit(self, storage: Storage, order: CommitOrder, manifest: Manifest) -> Committed:
        """Make the checkpoint count; then let retention remove older ones."""
        commit = manifest.commit
        storage.create(f"{commit.path}/{MANIFEST}", seal(manifest))
        chain, warning = [*order.chain, commit], None
        try:
            chain = retention.apply(storage, chain, order.keep)
        except (OSError, CheckpointError) as error:  # costs space, not the run
            warning = f"older checkpoints could not be removed: {_line(error)}"
        self.chain = chain
        return Committed(commit=commit, seconds=manifest.seconds, bytes=manifest.bytes, chain=chain, warning=warning)

    def _all_parts(self, storage: Storage, save: Save, world_size: int, until: float) -> list[PartEntry]:
        """The part of every rank, from their names in the store: which proves that all ranks write to one place."""
        pause = POLL_S
        while True:
            listed = (parse_part_name(name) for name in storage.list(f"{save.commit.path}/{PARTS}"))
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
        elif isinstance(request, Keep | Forget):
            self._remember(request)
        else:
            raise CheckpointError(f"{commit.path}: another request came before this save ended")

    def _reply(self, message: Reply) -> None:
        """Tell the rank, if it is still there."""
        data = msgspec.json.encode(message) + b"\n"
        with contextlib.suppress(BrokenPipeError), _speaking:
            while data:
                data = data[os.write(self.replies, data) :]


def _lines(descriptor: int) -> Iterator[bytes]:
    """Whole lines of a pipe, as long as the rank is there: its end alone may not say so, as what the rank has forked
    keeps the pipe open. What a rank that died had not sent completely is left out.
    """
    rank, rest = os.getppid(), bytearray()
    while True:
        if select.select([descriptor], [], [], ORPHAN_S)[0]:
            data = os.read(descriptor, 1 << 20)
            if not data:
                return
            *lines, last = data.split(b"\n")
            for line in lines:
                yield bytes(rest) + line
                rest.clear()
            rest += last
        elif os.getppid() != rank:
            return


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def main() -> None:
    """Serve one rank."""
    url, rank, descriptor = sys.argv[1:]
    os.nice(NICE)
    replies = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no reply
    Writer(open_storage(url), int(rank), int(descriptor), replies).run()


if __name__ == "__main__":
    main()
