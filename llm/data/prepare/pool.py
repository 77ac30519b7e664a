"""Processes of this machine that do items. One that dies is replaced and its item done again, three times at most.

The pool's own: concurrent.futures gives all work up when one process dies.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import msgspec

from llm.data.prepare.plan import Plan
from llm.utils.config import ConfigError, PrepareConfig

DEATHS = 3  # of processes with the same item in hand
POLL_S = 0.25
TELL_S = 0.2  # between two messages about progress
LEAVE_S = 5.0


class WorkError(Exception):
    """An item that cannot be done. One line."""


class Stop(Protocol):
    """Whether to go on."""

    def asked(self) -> bool:
        """Begin nothing more."""

    def late(self) -> bool:
        """Leave at once: there is no time to finish anything."""


@dataclass
class Seen:
    """What happened: bytes of input and tokens, and the items that are done."""

    bytes: int = 0
    tokens: int = 0
    done: list[int] = field(default_factory=list)


@dataclass
class _Worker:
    process: Any
    connection: Connection
    item: int | None = None
    bytes: int = 0  # of the item in hand, and of which nothing counts if it dies
    tokens: int = 0


def run(
    config: PrepareConfig, plan: Plan, stage: str, items: Iterable[int], workers: int, stop: Stop
) -> Iterator[Seen]:
    """Do ``items`` of ``stage`` by ``workers`` processes; tells several times a second how far they are.

    After a request to stop the items in hand are finished if there is time, and no other is begun. Raises WorkError or
    ConfigError.
    """
    todo = list(items)
    deaths: dict[int, int] = {}
    context = multiprocessing.get_context("spawn")
    encoded = msgspec.json.encode(plan)

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, config, encoded, stage), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    pool: list[_Worker] = []
    try:
        while True:
            if stop.asked():
                todo = []
            if stop.late():
                return
            pool += [start() for _ in range(min(workers - len(pool), len(todo) - sum(w.item is None for w in pool)))]
            for worker in pool:
                if worker.item is None and todo:
                    worker.item = todo.pop(0)
                    with contextlib.suppress(OSError):  # it has died, which is seen below
                        worker.connection.send(worker.item)
            busy = [worker for worker in pool if worker.item is not None]
            if not busy:
                return
            seen = Seen()
            ready = wait([worker.connection for worker in busy], POLL_S)
            for worker in busy:
                if worker.connection in ready and not _hear(worker, seen):
                    pool.remove(worker)
                    if worker.item is not None:  # else it had just finished
                        todo.insert(0, _died(worker, stage, deaths, seen))
            yield seen
    finally:
        for worker in pool:
            worker.connection.close()  # who waits for an item leaves
            if worker.item is not None:
                worker.process.kill()
        for worker in pool:
            worker.process.join(LEAVE_S)
            worker.process.kill()


def _hear(worker: _Worker, seen: Seen) -> bool:
    """Take what a worker says; False when it is dead."""
    try:
        while worker.connection.poll():
            message = worker.connection.recv()
            if isinstance(message, tuple):
                worker.bytes += message[0]
                worker.tokens += message[1]
                seen.bytes += message[0]
                seen.tokens += message[1]
            elif message is None:
                assert worker.item is not None
                seen.done.append(worker.item)
                worker.item, worker.bytes, worker.tokens = None, 0, 0
            else:
                raise message
    except (EOFError, OSError):
        return False
    return True


def _died(worker: _Worker, stage: str, deaths: dict[int, int], seen: Seen) -> int:
    assert worker.item is not None
    worker.process.join(LEAVE_S)
    seen.bytes -= worker.bytes
    seen.tokens -= worker.tokens
    deaths[worker.item] = deaths.get(worker.item, 0) + 1
    if deaths[worker.item] >= DEATHS:
        code = worker.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        raise WorkError(
            f"item {worker.item} of {stage} has ended {DEATHS} processes ({how}); if memory is short, lower "
            "prepare.workers or prepare.unit_mb"
        )
    return worker.item


def _serve(connection: Connection, config: PrepareConfig, encoded: bytes, stage: str) -> None:
    """A worker: items come in, what is done goes out. The parent decides when it is over, not a terminal's signal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    from llm.data.prepare.stages import STAGES
    from llm.data.prepare.unit import Job

    job = Job(config, msgspec.json.decode(encoded, type=Plan))
    tell = _Teller(connection)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        while True:
            item = connection.recv()
            try:
                STAGES[stage](job, item, tell)
            except ConfigError as error:
                connection.send(ConfigError(str(error)))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except OSError as error:
                connection.send(WorkError(str(error)))
            else:
                tell.now()
                connection.send(None)


class _Teller:
    """Sends sums, not every single one."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.bytes, self.tokens, self.last = connection, 0, 0, time.monotonic()

    def __call__(self, size: int, tokens: int) -> None:
        self.bytes += size
        self.tokens += tokens
        if time.monotonic() - self.last >= TELL_S:
            self.now()

    def now(self) -> None:
        """Send what there is."""
        self.connection.send((self.bytes, self.tokens))
        self.bytes, self.tokens, self.last = 0, 0, time.monotonic()
