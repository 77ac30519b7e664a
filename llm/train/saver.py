"""One rank's side of an asynchronous save: its staging buffer, its writer process, and the save in flight."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from torch import Tensor

from llm.checkpoint.format import CheckpointError
from llm.checkpoint.messages import Abandon, Committed, Failed, Forget, Keep, Layout, Reply, Save, Wanted, Written
from llm.checkpoint.process import WriterProcess
from llm.train.staging import Staging

GRACE_S = 5.0  # a writer reports its own time-out; one that is stuck in a system call is killed this much later


class Saver:
    """At most one save is in flight. A writer that is lost is replaced at the next save."""

    def __init__(self, url: str, rank: int, staging: Staging) -> None:
        if url.startswith("memory://"):
            raise CheckpointError(f"{url}: memory:// is seen by one process alone, checkpoints are written by another")
        self.url, self.rank, self.staging = url, rank, staging
        self.layout = Layout(size=0, boxes=[], files=[])
        self._writer: WriterProcess | None = None
        self._told = False  # does the writer know the layout?
        self._save: Save | None = None
        self._sent = False
        self._until = 0.0
        self._backlog: list[Reply] = []  # what the writer has said while nobody asked
        self._kept: int | None = None  # the slot of the newest snapshot
        self._unsent: Keep | None = None  # a snapshot that the writer does not know of yet
        self._start()

    @property
    def busy(self) -> bool:
        """Is there a save in flight?"""
        return self._save is not None

    @property
    def writer_pid(self) -> int | None:
        """Process id of the writer."""
        return self._writer.pid if self._writer else None

    def set_layout(self, layout: Layout) -> None:
        """What the saves from now on hold."""
        self.layout, self._told = layout, False
        self._kept = None
        self.staging.prepare(layout.boxes, layout.files, layout.slots)

    def begin(self, save: Save, data: Sequence[Tensor]) -> None:
        """Copy ``data``, one tensor per box of the layout, and have it written. The last save must have ended."""
        assert self._save is None, "two saves at once"
        self.staging.wait()
        self._backlog += self._poll()  # a snapshot whose copy has ended by now is told of
        slot = self._free_slot()
        if not self._forget(slot):
            self._discard()
        self.staging.copy(data, slot)
        save = msgspec.structs.replace(save, slot=slot)
        self._save, self._sent, self._until = save, False, time.monotonic() + save.limit_s + GRACE_S

    def keep(self, save: Save, world_size: int, data: Sequence[Tensor]) -> None:
        """Copy ``data`` as :meth:`begin` does, to be written only if this process vanishes. Needs two slots.

        A save that is in flight goes on. Nothing is kept while the copy for it has not ended, or the writer is stuck.
        """
        self._backlog += self._poll()
        if (self.busy and not self._sent) or self._unsent is not None:
            return
        slot = self._free_slot()
        if not self._forget(slot):
            return
        self.staging.copy(data, slot)
        self._unsent = Keep(save=msgspec.structs.replace(save, slot=slot), world_size=world_size)
        self._backlog += self._poll()

    def _free_slot(self) -> int:
        """A slot that is not being written: if there is a choice, not that of the newest snapshot."""
        taken = self._save.slot if self._save is not None else self._kept
        return next((each for each in range(self.layout.slots) if each != taken), 0)

    def _forget(self, slot: int) -> bool:
        """Tell the writer, which may outlive this process, that a slot is about to change. False when it is stuck."""
        return self.layout.slots == 1 or self._writer is None or self._writer.send(Forget(slot=slot))

    def _send_kept(self) -> None:
        """Tell the writer of a snapshot whose copy is complete by now."""
        if (kept := self._unsent) is not None:
            self.staging.wait()
            self._introduce().send(kept)
            self._kept, self._unsent = kept.save.slot, None

    def poll(self, wait_s: float = 0.0) -> list[Reply]:
        """What the writer says, or what has to be said for it. A failure ends the save, and nothing is raised."""
        replies = self._backlog + self._poll(wait_s)
        self._backlog = []
        return replies

    def _poll(self, wait_s: float = 0.0) -> list[Reply]:
        save = self._save
        try:
            if self._unsent is not None and self.staging.done():
                self._send_kept()
            replies = self._listen(wait_s) if save is None else self._exchange(save, wait_s)
        except (CheckpointError, OSError) as error:  # OSError: no process can be started
            self._discard()
            replies = [] if save is None else [Failed(commit=save.commit, reason=str(error))]
        if save is None:
            return replies
        for reply in replies:
            if isinstance(reply, Failed | Committed) or (isinstance(reply, Written) and save.order is None):
                self._save = None
        return replies

    def wait(self) -> list[Reply]:
        """Poll until no save is in flight: at most its limit and a little more."""
        replies: list[Reply] = []
        while self.busy:
            if not self._sent:
                self.staging.wait()
            replies += self.poll(wait_s=0.2)
        return replies

    def abandon(self, reason: str) -> None:
        """Another rank could not write its part: the save in flight cannot be committed."""
        if self._save is not None and self._sent and self._writer is not None:
            self._writer.send(Abandon(commit=self._save.commit, reason=reason))

    def close(self) -> None:
        """Let the writer leave. What is in flight has until its limit."""
        if self._writer is not None:
            self._writer.close(max(self._until - time.monotonic(), 0) if self.busy else GRACE_S)
            self._writer = None

    def _exchange(self, save: Save, wait_s: float) -> list[Reply]:
        if not self._sent:
            if not self.staging.done():
                return []
            self._introduce().send(save)
            self._sent = True
        replies = [each for each in self._listen(wait_s) if isinstance(each, Wanted) or each.commit == save.commit]
        if not replies and time.monotonic() > self._until:
            raise CheckpointError(f"the writer process did not end within {save.limit_s:.0f} s and was killed")
        return replies

    def _listen(self, wait_s: float) -> list[Reply]:
        return self._writer.replies(wait_s) if self._writer is not None else []

    def _introduce(self) -> WriterProcess:
        """A writer that knows the layout."""
        writer = self._start()
        if not self._told:
            writer.send(self.layout)
            self._told = True
        return writer

    def _start(self) -> WriterProcess:
        if self._writer is not None and not self._writer.alive:
            self._discard()
        if self._writer is None:
            self._writer, self._told = WriterProcess(self.url, self.rank, self.staging.descriptor), False
        return self._writer

    def _discard(self) -> None:
        if self._writer is not None:
            self._writer.close(wait_s=0)
            self._writer = None
        self._kept = None
