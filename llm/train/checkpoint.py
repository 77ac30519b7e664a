"""Sharded, asynchronous checkpoints of one attempt: every rank writes its own files, one small file commits them all.

    checkpointer.attach(tensors)        once: what a checkpoint holds, and which rank saves what
    checkpointer.load(commit)           fill it
    checkpointer.save(step, state)      copy it to the staging buffer, and on with the training
    checkpointer.poll()                 once a step: what became of the save
    checkpointer.fence()                before the weights change

No collective runs in the background, and none in ``save``: ranks acknowledge by their part manifests in the store, and
rank 0's writer process commits when all are there.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from llm.checkpoint.format import CheckpointError, Commit, DamagedError, Manifest, open_manifest
from llm.checkpoint.image import Box, lay_out, owners, staging_bytes
from llm.checkpoint.lineage import before, read_manifest
from llm.checkpoint.messages import CommitOrder, Committed, Failed, Layout, Reply, Save, Wanted, Written
from llm.checkpoint.probe import probe
from llm.checkpoint.retention import Retention, chain
from llm.train.pieces import NAMES, LocalPiece, local_pieces
from llm.train.resharding import load, together
from llm.train.saver import Saver
from llm.train.staging import Staging
from llm.train.world import World
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import Storage
from llm.utils.structs import ready

# An object is sent in one request: small enough to be sent again, and enough of them to fill all connections.
FILE, MIN_FILE, MAX_FILE = 12 << 20, 1 << 20, 64 << 20
FILES = 8  # as many as a writer sends at the same time, and a multiple of that: no connection is left over
LOCAL_FILE = 1 << 30  # on a file system each file costs an fsync


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a save on this rank; on rank 0 ``committed`` means that all of it counts."""

    commit: Commit
    committed: bool = False
    reason: str | None = None  # why it failed
    warning: str | None = None
    seconds: float = 0.0  # since the request
    bytes: int = 0  # of all ranks


class _Holding(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells the others of what it holds."""

    alone: int  # bytes that nobody else holds
    shared: list[Box]


class Checkpointer:
    """Saves and loads. All ranks call ``attach``, ``save``, ``load`` and ``wait`` together."""

    def __init__(
        self,
        storage: Storage,
        world: World,
        attempt: int,
        generation: int,
        keep: Retention,
        limit_s: float,
        code: str = "",
        snapshots: bool = False,
    ) -> None:
        self.storage, self.world, self.keep, self.limit_s, self.code = storage, world, keep, limit_s, code
        self.attempt, self.generation = attempt, generation
        self.slots = 2 if snapshots else 1
        self.mesh = {"ranks": world.size}  # how the ranks are laid out, for those who read the manifest
        self.chain: list[Commit] = []  # rank 0: the commits that lead to the present state, oldest first
        self.blocked_s = 0.0  # what the last save cost the training: waiting for the one before, and copying
        self.waited_s = 0.0  # of that, waiting
        self.bytes = 0  # of a checkpoint
        self.pieces: list[LocalPiece] = []
        self.saver = Saver(storage.url, world.rank, Staging(world.device))
        self._saved: list[Tensor] = []  # what this rank writes of its pieces: replicated ones are shared out
        self._last_step = -1
        self._events: list[Event] = []
        self.wanted = False  # rank 0: somebody has asked for a checkpoint since the last one

    def attach(self, tensors: Mapping[str, Tensor]) -> None:
        """Say what a checkpoint holds: tensors that stay where they are, sharded (DTensor) or the same everywhere."""
        self.pieces = local_pieces(tensors)
        boxes = [
            Box(
                name=piece.name,
                dtype=NAMES[piece.data.dtype],
                shape=piece.shape,
                offset=piece.offset,
                local_shape=list(piece.data.shape),
                placement=piece.placement,
            )
            for piece in self.pieces
        ]
        # What is sharded over all ranks nobody else holds: only the rest is told to everyone.
        shared = [index for index, piece in enumerate(self.pieces) if piece.spread < self.world.size]
        alone = sorted(set(range(len(boxes))).difference(shared))
        holding = _Holding(sum(boxes[index].bytes for index in alone), [boxes[index] for index in shared])
        everyone = [
            msgspec.json.decode(each, type=_Holding)
            for each in self.world.all_gather_bytes(msgspec.json.encode(holding))
        ]
        load = {rank: each.alone for rank, each in enumerate(everyone)}
        saves = owners(((rank, each.shared) for rank, each in enumerate(everyone)), load)
        self.bytes = sum(load.values()) + sum(
            everyone[rank].shared[index].bytes for rank, indices in saves.items() for index in indices
        )
        mine = sorted([*alone, *(shared[index] for index in saves.get(self.world.rank, ()))])
        self._saved = [self.pieces[index].data for index in mine]
        boxes = [boxes[index] for index in mine]
        limit, count = LOCAL_FILE, 1
        if not isinstance(self.storage, LocalStorage):
            limit, count = MAX_FILE, _files(sum(box.bytes for box in boxes))
        files = lay_out(boxes, self.world.rank, limit, count)
        self.saver.set_layout(Layout(size=staging_bytes(files), slots=self.slots, boxes=boxes, files=files))

    def check_store(self) -> None:
        """Find out whether a checkpoint can be saved at all. Raises CheckpointError on every rank."""
        failure = None
        if self.world.rank == 0:
            try:
                probe(self.storage, self.bytes)
            except CheckpointError as error:
                failure = error
        self.world.raise_together(failure)

    # --- saving ----------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any], files_before: Mapping[str, bytes] | None = None) -> Commit:
        """Stage the state after ``step`` and begin to write it; ``state`` is JSON, and the same on every rank.

        ``files_before`` (rank 0) are put into the run directory before the commit is. A save that is still in flight
        is waited for. What becomes of this one, :meth:`poll` tells.
        """
        began = time.perf_counter()
        self._note(self.saver.wait())
        self.waited_s = time.perf_counter() - began
        if step <= self._last_step:  # a rollback, or a save that failed: what is there is never written again
            self.generation += 1
        self._last_step = step
        self.wanted = False
        save = self._request(step, state, files_before)
        self.saver.begin(save, self._saved)
        self._note(self.saver.poll())
        self.blocked_s = time.perf_counter() - began
        return save.commit

    def snapshot(self, step: int, state: dict[str, Any], files_before: Mapping[str, bytes] | None = None) -> None:
        """Stage the state after ``step``, to be committed only if ranks die before the next one.

        It outlives this process in the memory of its writer. It counts where the writers of all ranks still have it.
        """
        self.saver.keep(self._request(step, state, files_before), self.world.size, self._saved)

    def _request(self, step: int, state: dict[str, Any], files_before: Mapping[str, bytes] | None) -> Save:
        commit = Commit(attempt=self.attempt, generation=self.generation, step=step)
        order = None
        if self.world.rank == 0:
            order = CommitOrder(
                world_size=self.world.size,
                mesh=self.mesh,
                code=self.code,
                chain=self.chain,
                keep=self.keep,
                state=state,
                files_before=dict(files_before or {}),
            )
        rng = capture_rng(self.world.device)
        return Save(commit=commit, began=time.time(), limit_s=self.limit_s, rng=rng, order=order)

    def poll(self) -> list[Event]:
        """What became of earlier saves, without waiting for any."""
        self._note(self.saver.poll())
        events, self._events = self._events, []
        return events

    def wait(self) -> list[Event]:
        """Wait until the save in flight has ended on every rank. If it failed anywhere, all raise CheckpointError."""
        self._note(self.saver.wait())
        events = self.poll()
        failed = [event for event in events if event.reason is not None]
        last = failed[-1] if failed and failed[-1].commit.step == self._last_step else None
        complaint = None if last is None else f"cannot save {last.commit.path} in {self.storage.url}: {last.reason}"
        if (reason := self.world.failure(complaint)) is not None:
            raise CheckpointError(reason)
        return events

    def fence(self) -> None:
        """Call it before the weights change: they may still be on their way to the staging buffer."""
        self.saver.staging.fence()

    def abandon(self, reason: str) -> None:
        """Rank 0: another rank has failed to write its part."""
        self.saver.abandon(reason)

    def close(self) -> None:
        """Let the writer process leave; a save in flight is finished first."""
        self.saver.close()

    def _note(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            if isinstance(reply, Committed):
                self.chain = reply.chain
                done = Event(commit=reply.commit, committed=True, seconds=reply.seconds, bytes=reply.bytes)
                self._events.append(msgspec.structs.replace(done, warning=reply.warning))
            elif isinstance(reply, Wanted):
                self.wanted = True
            elif isinstance(reply, Failed):
                self._events.append(Event(commit=reply.commit, reason=reply.reason))
            elif isinstance(reply, Written) and self.world.rank:
                self._events.append(Event(commit=reply.commit, seconds=reply.seconds, bytes=reply.bytes))

    # --- loading ---------------------------------------------------------------------------------------------------

    def load(self, commit: Commit) -> dict[str, Any]:
        """Fill what is attached from ``commit``, saved by any number of ranks in any layout, and return its state.

        The random generators continue where they were when the number of ranks is the same. Raises DamagedError on
        every rank when the checkpoint is proven damaged, CheckpointError when it cannot be read or does not fit.
        """
        manifest = self._manifest(commit)
        rng = load(self.storage, commit, manifest, self.pieces, self.world)
        if rng is not None:
            restore_rng(rng, self.world.device)
        complaint = f"cannot list the checkpoints before {commit.path} in {self.storage.url}"
        together(self.world, complaint, lambda: self._find_chain(commit))
        return manifest.state

    def _find_chain(self, commit: Commit) -> None:
        if self.world.rank == 0:
            self.chain = chain(self.storage, commit)

    def load_newest(self, commit: Commit) -> tuple[Commit, dict[str, Any]]:
        """Load ``commit``, or the newest before it that is not damaged. Raises CheckpointError when there is none.

        A store that does not answer is an error, never a reason to go further back.
        """
        while True:
            try:
                return commit, self.load(commit)
            except DamagedError as error:
                if (earlier := self._before(commit)) is None:
                    raise CheckpointError(f"{error}; there is no earlier checkpoint") from error
                if self.world.rank == 0:
                    print(f"warning: {error}; going back to {earlier.path}", flush=True)
                commit = earlier

    def _manifest(self, commit: Commit) -> Manifest:
        """Rank 0 reads; all get the same, or the same error."""
        data, failure = b"", None
        if self.world.rank == 0:
            try:
                manifest = read_manifest(self.storage, commit)
                data = msgspec.json.encode(manifest)
            except (OSError, CheckpointError) as error:
                failure = error
        self.world.raise_together(failure, f"cannot load {commit.path} from {self.storage.url}")
        return open_manifest(self.world.bytes_from_first(data), commit)

    def _before(self, commit: Commit) -> Commit | None:
        """Rank 0 looks for the commit before; all get the same."""
        data, failure = b"", None
        if self.world.rank == 0:
            try:
                earlier = before(self.storage, commit)
                data = b"" if earlier is None else earlier.path.encode()
            except (OSError, CheckpointError) as error:
                failure = error
        self.world.raise_together(failure, f"cannot look for an earlier checkpoint in {self.storage.url}")
        path = self.world.bytes_from_first(data).decode()
        return Commit.parse(path) if path else None


def _files(size: int) -> int:
    """How many objects ``size`` bytes become."""
    file = min(max(size // (2 * FILES), FILE), MAX_FILE)
    return max(min(-(-size // (file * FILES)) * FILES, size // MIN_FILE), 1)


def capture_rng(device: torch.device) -> dict[str, str]:
    """State of the generators that this rank may draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def restore_rng(rng: dict[str, str], device: torch.device) -> None:
    """The inverse of :func:`capture_rng`; a generator of another kind of device is left as it is."""
    for name, text in rng.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == device.type:
            torch.cuda.set_rng_state(state, device)


ready(_Holding)
