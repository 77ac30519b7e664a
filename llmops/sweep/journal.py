"""Optuna's journal as objects of a store: one part for each append, numbered without gaps.

::

    00000000.json …       one append each: {"id": …, "logs": […]}, made exclusively
    chunk-00000000.json   the 256 parts from that number on, as a list; saves readers their round trips

Optuna's own file backend takes a lock that a killed process keeps, and a torn line makes its file unreadable. Here a
part is there whole or not at all, and who finds its number taken reads what is new and takes the next one. A store has
no delete, so parts stay beside their chunk; no reader lists them.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from llmops.errors import ClusterError, UserError
from llmops.runs.records import read_many
from llmops.runs.store import Store

CHUNK = 256
AT_ONCE = 16  # objects asked for in parallel, once it is known that there is something new
TRIES = 6  # of an append that the store does not answer
FIRST_PAUSE_S = 0.2  # between the first two of them; doubles
APPEND_S = 120.0  # for the others that may take a number first
VISIBLE_S = 60.0  # how long a client may show an old picture of a folder in which a number was just taken


class StoreJournal(BaseJournalBackend):
    """Reads on from where it was. Raises ``ClusterError`` and ``UserError`` as the store does.

    Logs that a reader has passed are dropped, so one journal serves one ``JournalStorage``.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._start()

    def _start(self) -> None:
        self._part = 0  # the next number
        self._raw: list[bytes] = []  # parts since the last chunk boundary, as they are stored
        self._first = 0  # the number of the first log that is held
        self._logs: list[dict[str, Any]] = []
        self._new = True  # until everything was read once

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """Logs from that number on. Never with a gap: reading ends before the first part that is missing."""
        if log_number_from < self._first:
            self._start()
        self._catch_up()
        del self._logs[: log_number_from - self._first]
        self._first = log_number_from
        return list(self._logs)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Returns once the logs are in the store, exactly once.

        After ``ClusterError`` they may be, or come to be, there or not.
        """
        mine = secrets.token_hex(16)
        data = json.dumps({"id": mine, "logs": logs}).encode()
        deadline = time.monotonic() + APPEND_S
        self._catch_up()
        while not self._claim(data, mine):
            self._catch_up()
            if time.monotonic() > deadline:
                raise ClusterError(f"{self._store.url}: others were faster for {APPEND_S:.0f} s; try again later")
        self._take(data)
        if len(self._raw) == CHUNK:
            self._write_chunk()

    def _claim(self, data: bytes, mine: str) -> bool:
        """Make the next part. It is left for the one after only when it is there and somebody else's: a put whose
        answer was lost may still arrive, and must find its number taken.
        """
        path = _part(self._part)
        for tried in range(TRIES):
            try:
                if self._store.create(path, data):
                    return True
                break
            except ClusterError:
                if tried == TRIES - 1:
                    raise
                time.sleep(FIRST_PAUSE_S * 2**tried)
        return bool(self._decode(path, self._visible(path))["id"] == mine)

    def _visible(self, path: str) -> bytes:
        """An object that exists, though the client of a shared file system may still remember that it does not."""
        deadline = time.monotonic() + VISIBLE_S
        while True:
            with contextlib.suppress(FileNotFoundError):
                return self._store.get(path)
            if time.monotonic() > deadline:
                raise ClusterError(f"{self._store.url}/{path} is taken, but cannot be read for {VISIBLE_S:.0f} s")
            self._store.list()  # has the client look again
            time.sleep(FIRST_PAUSE_S)

    def _catch_up(self) -> None:
        """Take everything that is there."""
        if self._new:
            while self._take_chunks():
                pass
        count = AT_ONCE if self._new and self._store.local_path is None else 1
        while True:
            found = read_many(self._store, [_part(self._part + index) for index in range(count)])
            for data in found:
                if data is None:
                    self._new = False
                    return
                self._take(data)
                # Its last writer should have made the chunk; where that one was killed, who starts next does.
                if self._new and len(self._raw) == CHUNK:
                    self._write_chunk()
            count = AT_ONCE

    def _take_chunks(self) -> bool:
        """Read the next chunks; whether there may be more."""
        count = 1 if self._store.local_path is not None else AT_ONCE
        names = [f"chunk-{_part(self._part + CHUNK * index)}" for index in range(count)]
        for name, data in zip(names, read_many(self._store, names), strict=True):
            if data is None:
                return False
            for batch in self._decode(name, data):
                self._logs += batch["logs"]
            self._part += CHUNK
        return True

    def _take(self, data: bytes) -> None:
        self._logs += self._decode(_part(self._part), data)["logs"]
        if len(self._raw) == CHUNK:
            self._raw = []
        self._raw.append(data)
        self._part += 1

    def _write_chunk(self) -> None:
        """The parts' own bytes, so that whoever writes it writes the same."""
        with contextlib.suppress(ClusterError):  # it only saves time, and the next process that starts makes it
            self._store.create(f"chunk-{_part(self._part - CHUNK)}", b"[" + b",\n".join(self._raw) + b"]\n")

    def _decode(self, path: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise UserError(f"{self._store.url}/{path} is damaged: {error}; restore it from a backup") from error


def _part(number: int) -> str:
    return f"{number:08d}.json"
