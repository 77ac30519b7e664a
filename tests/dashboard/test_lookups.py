"""Reading on threads: once for all who ask, never for too long, and not at all for nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from llmops.dashboard import lookups
from llmops.dashboard.hub import Hub, Rows
from llmops.dashboard.lookups import Lookups
from llmops.errors import ClusterError

WAIT_S = 10.0


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
        await asyncio.sleep(0.01)


def test_all_who_ask_at_the_same_time_get_one_look():
    looks = 0
    released = threading.Event()

    def fetch() -> bytes:
        nonlocal looks
        looks += 1
        assert released.wait(WAIT_S)
        return b"%d" % looks

    async def ask() -> list[bytes]:
        shared = Lookups()
        waiting = [asyncio.create_task(shared.get("key", fetch)) for _ in range(50)]
        await until(lambda: looks == 1, "the look")
        released.set()
        first = await asyncio.gather(*waiting)
        kept = await shared.get("key", fetch)
        other = await shared.get("other", fetch)
        return [*first, kept, other]

    assert asyncio.run(ask()) == [b"1"] * 51 + [b"2"]


def test_a_look_that_was_too_late_for_one_serves_the_next():
    released, looks = threading.Event(), []

    def fetch() -> bytes:
        looks.append(1)
        assert released.wait(WAIT_S)
        return b"late"

    async def ask() -> bytes:
        shared = Lookups(timeout_s=0.05)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await shared.get("key", fetch)
        released.set()
        return await shared.get("key", fetch, timeout_s=WAIT_S)

    assert asyncio.run(ask()) == b"late"
    assert looks == [1]


def test_threads_that_hang_are_not_joined_by_a_queue_without_end(monkeypatch):
    monkeypatch.setattr(lookups, "MOST", 5)
    released = threading.Event()
    looked: list[int] = []

    def fetch(number: int) -> Callable[[], bytes]:
        def look() -> bytes:
            looked.append(number)
            released.wait(WAIT_S)
            return b""

        return look

    async def ask() -> None:
        shared = Lookups(timeout_s=0.05, threads=2)
        for number in range(5):
            with pytest.raises(TimeoutError):
                await shared.get(number, fetch(number))
        with pytest.raises(ClusterError, match="too much"):
            await shared.get(5, fetch(5))
        released.set()
        await until(lambda: all(entry.ended is not None for entry in shared._entries.values()), "the queue to be empty")

    asyncio.run(ask())
    assert sorted(looked) == [0, 1], "nobody waits for the others any more"


def test_nobody_watching_means_nothing_is_looked_up():
    looks = 0

    def fetch() -> Rows:
        nonlocal looks
        looks += 1
        return Rows({"a": b"{}"})

    async def watch() -> None:
        hub = Hub(fetch, 0.02, idle_s=0.1)
        running = asyncio.create_task(hub.run())
        await until(lambda: looks > 3, "looks")
        await until(lambda: hub._feed is None, "the end of looking")
        seen = looks
        await asyncio.sleep(0.2)
        assert looks <= seen + 1
        events = hub.events()
        assert (await _soon(anext(events))).startswith(b"event: runs\n"), "what is known is told at once"
        await until(lambda: looks > seen + 3, "looks again")
        hub.close()
        await _soon(running)
        await events.aclose()

    asyncio.run(watch())


def test_a_defect_is_trouble_and_does_not_end_the_looking(capfd):
    answers: list[Callable[[], Rows]] = [
        lambda: {}["no such key"],
        lambda: {}["no such key"],
        lambda: Rows({"a": b"{}"}),
    ]

    async def watch() -> tuple[str, int]:
        hub = Hub(lambda: answers.pop(0)() if len(answers) > 1 else answers[0](), 0.05)
        running = asyncio.create_task(hub.run())
        first = await hub.first(WAIT_S)
        await until(lambda: hub.snapshot.taken > 0, "a look that works")
        hub.close()
        await _soon(running)
        return first.trouble, len(hub.snapshot.rows.rows)

    trouble, rows = asyncio.run(watch())
    assert "defect of llmops: KeyError" in trouble
    assert rows == 1
    assert capfd.readouterr().err.count("Traceback") == 1


async def _soon(awaited: Awaitable[Any]) -> Any:
    async with asyncio.timeout(WAIT_S):
        return await awaited
