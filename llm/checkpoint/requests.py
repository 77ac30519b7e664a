"""Asking a run for a checkpoint: a file in ``requests/`` of its run directory, which rank 0's writer takes away.

The file is gone as soon as it is seen; the commit that follows is the answer.
"""

from __future__ import annotations

import json
import secrets
import time

from llm.utils.storage import Storage

FOLDER = "requests"


def ask(storage: Storage, by: str) -> str:
    """Ask for a checkpoint; returns the path that disappears when the run has heard."""
    path = f"{FOLDER}/save-{secrets.token_hex(8)}.json"
    storage.create(path, json.dumps({"by": by, "time": time.time()}).encode())
    return path


def take(storage: Storage) -> bool:
    """Has anybody asked? Each request is told of once."""
    asked = [name for name in storage.list(FOLDER) if name.startswith("save-")]
    for name in asked:
        storage.remove(f"{FOLDER}/{name}")
    return bool(asked)
