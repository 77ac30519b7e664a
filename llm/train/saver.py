"""One rank's side of an asynchronous save: its staging buffer, its writer process, and the save in flight."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from llm.checkpoint.format import CheckpointError
from llm.checkpoint.messages import Abandon, Committed, Failed, Layout, Reply, Save, Wanted, Written
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
        self.staging.prepare(layout.boxes, layout.files)

    def begin(self, save: Save, data: Sequence[Tensor]) -> None:
        """Copy ``data``, one tensor per box of the layout, and have it written. The last save must have ended."""
        assert self._save is None, "two saves at once"
        self.staging.copy(data)
        self._save, self._sent, self._until = save, False, time.monotonic() + save.limit_s + GRACE_S

    def poll(self, wait_s: float = 0.0) -> list[Reply]:
        """What the writer says, or what has to be said for it. A failure ends the save, and nothing is raised."""
        save = self._save
        try:
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
            writer = self._start()
            if not self._told:
                writer.send(self.layout)
                self._told = True
            writer.send(save)
            self._sent = True
        replies = [each for each in self._listen(wait_s) if isinstance(each, Wanted) or each.commit == save.commit]
        if not replies and time.monotonic() > self._until:
            raise CheckpointError(f"the writer process did not end within {save.limit_s:.0f} s and was killed")
        return replies

    def _listen(self, wait_s: float) -> list[Reply]:
        return self._writer.replies(wait_s) if self._writer is not None else []

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
