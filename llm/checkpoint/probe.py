"""Can checkpoints be saved here? Asked before any training: a wrong key or a full disk shows now, not later."""

from __future__ import annotations

import os
import secrets
import shutil

from llm.checkpoint.format import CheckpointError
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import Storage

ANSWER_S = 30.0  # a store that has not answered by then is not there


def probe(storage: Storage, needed: int) -> None:
    """Write, read back and remove a few bytes; on a file system see that a checkpoint of ``needed`` bytes fits.

    Raises CheckpointError: one line with what was tried, and what to do.
    """
    path = f"probe/{secrets.token_hex(8)}"
    data = os.urandom(16)
    bounded = storage.within(ANSWER_S)
    try:
        bounded.create(path, data)
        if (found := bounded.read(path)) != data:
            raise CheckpointError(f"{storage.url} gives back {len(found)} other bytes than were written to {path}")
        bounded.remove(path)
        bounded.remove_folder("probe", only_empty=True)
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be saved in {storage.url}: {error}") from error
    if isinstance(storage, LocalStorage):
        free = shutil.disk_usage(storage.root).free
        if free < needed:
            raise CheckpointError(
                f"checkpoints cannot be saved in {storage.url}: one needs {_mb(needed)}, and {_mb(free)} are free: "
                "make room, or set runs_url to another file system"
            )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
