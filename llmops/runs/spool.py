"""From the spool on a node's disk to numbered parts in the store: output for stores that cannot append."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llmops.errors import ClusterError, UserError
from llmops.runs.store import Store

PART_BYTES = 1 << 18  # stored at once; less waits until it is old enough
MAX_PART = 1 << 20
FIRST_S, SLOWEST_S = 2.0, 15.0  # the age that less must have: short at first, when somebody looks; later fewer objects


class SpoolReader:
    """One stream. Its spool is a folder of numbered files: the last grows, the others are whole.

    What is stored is removed, and the position is kept beside it, so that a later process can go on.
    """

    def __init__(self, store: Store, name: str, folder: Path) -> None:
        self.store, self.name, self.folder = store, name, folder
        self.part, self.file, self.offset = 0, 0, 0
        self.wait, self.since = FIRST_S, time.monotonic()
        self.troubled = False
        if (folder / "position").exists():
            self.part, self.file, self.offset = json.loads((folder / "position").read_text())

    def tend(self, everything: bool = False) -> bool:
        """Store what is due, or ``everything``. False when the store did not take it: it is tried again later."""
        now = time.monotonic()
        while True:
            data = self._pending()
            due = everything or len(data) >= PART_BYTES or now - self.since >= self.wait
            if not data or not due:
                return True
            if not everything and b"\n" in data:
                data = data[: data.rindex(b"\n") + 1]
            try:
                # Not `create`: after a lost answer or a restart the same part is put again.
                self.store.put(f"{self.name}.{self.part:06d}.log", data)
            except (ClusterError, UserError) as error:
                if not self.troubled:
                    print(f"llmops: output is kept on the node for now: {error}", file=sys.stderr, flush=True)
                self.troubled, self.since, self.wait = True, time.monotonic(), SLOWEST_S
                return False
            if self.troubled:
                print("llmops: output is stored again", file=sys.stderr, flush=True)
            self.troubled, self.since, self.wait = False, time.monotonic(), min(1.5 * self.wait, SLOWEST_S)
            self._advance(len(data))

    def _pending(self) -> bytes:
        """What is next, at most a part; from one file only."""
        while True:
            path = self.folder / f"{self.file:06d}"
            with path.open("rb") as file:
                # Taken before the read: a file that has a successor is whole.
                whole = (self.folder / f"{self.file + 1:06d}").exists()
                file.seek(self.offset)
                data = file.read(MAX_PART)
            if data or not whole:
                return data
            self.file, self.offset = self.file + 1, 0
            self._keep_position()
            path.unlink()

    def _advance(self, count: int) -> None:
        self.part, self.offset = self.part + 1, self.offset + count
        self._keep_position()

    def _keep_position(self) -> None:
        aside = self.folder / ".position"
        aside.write_text(json.dumps([self.part, self.file, self.offset]))
        aside.replace(self.folder / "position")
