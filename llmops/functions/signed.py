"""Pickles that only their user can have written: a line of JSON and a pickle, signed with the user's own key.

The key is made once, with mode 0600, in the user's home, and never leaves it: jobs read it there, as they run as the
same user. What is signed names the place it was written for, so that nothing can be passed off as something else: an
old result as a new one, or one run's as another's.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, NamedTuple

from llmops.errors import UserError
from llmops.runs.store import PosixStore

MAGIC = b"llmops-function-1"
NAME = "functions.key"


class Forged(Exception):
    """Not what this user wrote for this place. It must not be unpickled. One line."""


class Signed(NamedTuple):
    """What was signed: plain JSON, and a pickle that may be loaded now."""

    header: dict[str, Any]
    payload: bytes


def key_file() -> Path:
    """Where the user's key is: in the folder for the user's data, which ``XDG_DATA_HOME`` moves."""
    import platformdirs

    return Path(platformdirs.user_data_dir("llmops", appauthor=False)) / NAME


def load_key(make: bool = False) -> bytes:
    """The user's key. ``make``: a new one, where there is none.

    Raises :class:`UserError` for one that others can read or may have written.
    """
    path = key_file()
    if make and not path.exists():
        PosixStore(path.parent).create(path.name, secrets.token_hex(32).encode(), mode=0o600)
    try:
        found = path.stat()
        key = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not there: functions need a home folder that is the same where they are submitted and where "
            "they run"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: the key of this user's functions cannot be read: {error.strerror}") from error
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{path} must be this user's alone, as others could forge results with it: chmod 600 it")
    if len(key) < 32:
        raise UserError(f"{path} is damaged; remove it (results of earlier runs cannot be fetched then)")
    return key


def seal(key: bytes, place: str, header: dict[str, Any], payload: bytes) -> bytes:
    """``payload`` as it is stored at ``place``, ``RUN_ID/PATH``."""
    head = json.dumps(header, sort_keys=True).encode()
    return b"\n".join((MAGIC, _sign(key, place, head, payload), head, payload))


def unseal(key: bytes, place: str, data: bytes) -> Signed:
    """What was sealed for ``place``. Raises :class:`Forged` for anything else."""
    parts = data.split(b"\n", 3)
    if len(parts) != 4 or parts[0] != MAGIC:
        raise Forged(f"{place} is damaged, or no llmops wrote it; it is not unpickled")
    _, signature, head, payload = parts
    if not hmac.compare_digest(signature, _sign(key, place, head, payload)):
        raise Forged(
            f"{place} was not signed with this user's key for this place: somebody else wrote it, or it was copied or "
            "changed; it is not unpickled"
        )
    return Signed(json.loads(head), payload)


def _sign(key: bytes, place: str, head: bytes, payload: bytes) -> bytes:
    # Neither a place nor JSON on one line holds a newline: nothing can move from one part into the next.
    return hmac.new(key, b"\n".join((place.encode(), head, payload)), hashlib.sha256).hexdigest().encode()
