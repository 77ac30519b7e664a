"""An answer in pieces (server-sent events) to a client that may go, or not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.types import Message, Receive, Scope, Send

from llm.inference.serving import ServeConfig


async def disconnected(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """Sends ``pieces`` until there are no more, or the client goes, or it takes nothing for ``write_timeout_s``.

    ``release`` is called at the end, whatever it was.
    """

    status_code = 200

    def __init__(self, pieces: AsyncIterator[bytes], release: Callable[[], None], config: ServeConfig) -> None:
        self.pieces, self.release, self.timeout_s = pieces, release, config.write_timeout_s

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.release()
            for task in (sending, gone):
                task.cancel()
            results = await asyncio.gather(sending, gone, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, TimeoutError | OSError):
                raise result

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for piece in self.pieces:
            await self._put(send, {"type": "http.response.body", "body": piece, "more_body": True})
        await self._put(send, {"type": "http.response.body", "body": b""})

    async def _put(self, send: Send, message: Message) -> None:
        async with asyncio.timeout(self.timeout_s):
            await send(message)
