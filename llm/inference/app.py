"""The HTTP side of the server: OpenAI's API over an engine, as an ASGI application. See docs/serving.md."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from llm.data.chat import encode_prompt, turn_end
from llm.data.tokenizer import Tokenizer
from llm.inference.batching import Busy, Engine, Request, Update
from llm.inference.event_stream import EventStream, disconnected
from llm.inference.generate import prompt_tokens
from llm.inference.http_answers import broken, event, http_error, json_answer, refusal
from llm.inference.openai_answers import Answer, ChatAnswer, CompletionAnswer, Piece
from llm.inference.openai_types import (
    ChatBody,
    CompletionBody,
    Refused,
    StreamOptions,
    chat_messages,
    chat_sampling,
    completion_prompts,
    completion_sampling,
    parse,
)
from llm.inference.readers import Reader, Readers
from llm.inference.sampling import Sampling
from llm.inference.serving import ServeConfig
from llm.inference.serving_metrics import ServingMetrics
from llm.utils.config import ConfigError

TEXT = "text/plain; version=0.0.4; charset=utf-8"
BUSIEST_S = 60  # the longest that a client is told to wait
GONE = 499  # nginx's status for a client that went before its answer
_T = TypeVar("_T")


class Service:
    """A model that is served. Make it on the event loop on which its ``app`` runs."""

    def __init__(
        self, make_engine: Callable[[Callable[[list[Update]], None]], Engine], config: ServeConfig, name: str,
        key: str | None = None,
    ) -> None:  # fmt: skip
        self.config, self.name, self.key = config, name, key
        self.metrics = ServingMetrics()
        self.readers = Readers(self.metrics)
        self.draining = False
        self.created = int(time.time())
        loop = asyncio.get_running_loop()

        def deliver(updates: list[Update]) -> None:
            loop.call_soon_threadsafe(self.readers.spread, updates)

        self.engine = make_engine(deliver)
        self.tokenizer: Tokenizer = self.engine.tokenizer
        # Long prompts take long to cut into tokens: on a thread, one at a time.
        self.encoder = ThreadPoolExecutor(1, "encoder")
        self.app = self._app()
        self._gauges()

    def close(self) -> None:
        """End the engine and all threads. Whoever still waits is told."""
        self.draining = True
        self.engine.close()
        self.encoder.shutdown()

    @property
    def ready(self) -> bool:
        """Are requests taken?"""
        return not self.draining and self.engine.failed is None

    def _app(self) -> Starlette:
        routes = [
            Route("/v1/completions", self._answered(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self._answered(self.chat), methods=["POST"]),
            Route("/v1/models", self._answered(self.models)),
            Route("/v1/models/{name:path}", self._answered(self.models)),
            Route("/healthz", self.health),
            Route("/readyz", self.readiness),
            Route("/metrics", self.told),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: http_error, Exception: broken})

    def _gauges(self) -> None:
        engine, gauge = self.engine, self.metrics.gauge
        gauge("waiting", "Texts that wait to be begun", lambda: len(engine.waiting))
        gauge("running", "Texts that are being written", lambda: len(engine.running))
        gauge("cache_blocks", "Blocks of the cache", lambda: engine.blocks.count)
        gauge("cache_blocks_free", "Those that nobody uses", lambda: engine.blocks.free)
        gauge("preemptions", "How often a text gave way to another", lambda: engine.preemptions)
        gauge("readers", "Clients that wait for texts", lambda: len(self.readers))
        gauge("tasks", "Tasks of the event loop", lambda: len(asyncio.all_tasks()))

    def _answered(
        self, work: Callable[[HttpRequest], Awaitable[Response | EventStream]]
    ) -> Callable[[HttpRequest], Awaitable[Response | EventStream]]:
        """``work`` for those who may, with errors as OpenAI's clients read them."""

        async def endpoint(request: HttpRequest) -> Response | EventStream:
            path = request.scope["route"].path
            try:
                self._authorise(request)
                answer = await work(request)
            except Refused as refused:
                answer = refusal(refused)
            except ClientDisconnect:
                answer = Response(status_code=GONE)
            self.metrics.answered(path, answer.status_code)
            return answer

        return endpoint

    def _authorise(self, request: HttpRequest) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self.key is not None and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    async def completions(self, http: HttpRequest) -> Response | EventStream:
        """``POST /v1/completions``."""
        body = parse(await self._body(http), CompletionBody, self.config)
        self._known(body.model)
        asked = completion_prompts(body)
        if len(asked) * body.choices > self.config.max_choices:
            raise Refused(400, f"{len(asked)} prompts with n={body.choices}: at most {self.config.max_choices} texts "
                          "in one request", "prompt")  # fmt: skip
        sampling = completion_sampling(body)
        prompts = await self._on_thread(lambda: [self._encoded(each) for each in asked])
        tell = bool(body.echo) and body.logprobs is not None
        requests = [
            each for prompt in prompts for each in self._requests(prompt, sampling, body.choices, "prompt", tell)
        ]
        spelled = None
        if body.echo:
            spelled = [
                each if isinstance(each, str) else self.tokenizer.decode(each)
                for each in asked
                for _ in range(body.choices)
            ]
        answer = CompletionAnswer(self.name, self.tokenizer, requests, body.logprobs is not None, spelled)
        return await self._answer(http, answer, body.stream, body.stream_options)

    async def chat(self, http: HttpRequest) -> Response | EventStream:
        """``POST /v1/chat/completions``."""
        body = parse(await self._body(http), ChatBody, self.config)
        self._known(body.model)
        messages = chat_messages(body)
        try:
            prompt = await self._on_thread(lambda: encode_prompt(self.tokenizer, messages))
            end = turn_end(self.tokenizer)
        except ValueError as error:
            raise Refused(400, str(error), "messages") from error
        except ConfigError as error:
            raise Refused(400, f"this model has no chat template: {error}", "messages", "no_chat_template") from error
        sampling = chat_sampling(body, self.engine.limit, () if end is None else (end,))
        requests = self._requests(prompt, sampling, body.choices, "messages")
        answer = ChatAnswer(self.name, self.tokenizer, requests, bool(body.logprobs))
        return await self._answer(http, answer, body.stream, body.stream_options)

    async def models(self, http: HttpRequest) -> Response:
        """``GET /v1/models``, and ``/v1/models/NAME``."""
        own = {"id": self.name, "object": "model", "created": self.created, "owned_by": "llm",
               "max_model_len": self.engine.limit}  # fmt: skip
        if (name := http.path_params.get("name")) is not None:
            self._known(name)
            return json_answer(own)
        return json_answer({"object": "list", "data": [own]})

    async def health(self, _: HttpRequest) -> Response:
        """``GET /healthz``: does it work at all?"""
        failed = self.engine.failed
        return Response("ok\n" if failed is None else f"the engine failed: {failed}\n", 503 if failed else 200)

    async def readiness(self, _: HttpRequest) -> Response:
        """``GET /readyz``: does it take requests?"""
        return Response("ready\n" if self.ready else "not ready\n", 200 if self.ready else 503)

    async def told(self, _: HttpRequest) -> Response:
        """``GET /metrics``."""
        return Response(self.metrics.page(), media_type=TEXT)

    def _known(self, model: str) -> None:
        if model != self.name:
            raise Refused(404, f"there is no model {model}; this server has {self.name}", "model", "model_not_found")

    async def _body(self, http: HttpRequest) -> bytes:
        """All of it. Raises Refused where it is too large or too slow, ClientDisconnect."""
        limit, parts, size = self.config.max_body_kb * 1024, [], 0
        try:
            async with asyncio.timeout(self.config.write_timeout_s):
                async for part in http.stream():
                    size += len(part)
                    if size > limit:
                        raise Refused(413, f"the body has more than {limit} bytes", code="request_too_large")
                    parts.append(part)
        except TimeoutError as error:
            raise Refused(408, "the body did not come in time", code="request_timeout") from error
        return b"".join(parts)

    async def _on_thread(self, work: Callable[[], _T]) -> _T:
        if not self.ready:
            raise self._leaving()
        return await asyncio.get_running_loop().run_in_executor(self.encoder, work)

    def _encoded(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            strange = next((each for each in prompt if not 0 <= each < self.tokenizer.vocab_size), None)
            if strange is not None:
                raise Refused(400, f"prompt: {strange} is no token: 0 to {self.tokenizer.vocab_size - 1} are", "prompt")
            return prompt or prompt_tokens(self.tokenizer, "")
        return prompt_tokens(self.tokenizer, prompt)

    def _requests(
        self, prompt: list[int], sampling: Sampling, choices: int, param: str, tell: bool = False
    ) -> list[Request]:
        """The engine's, each with random numbers of its own."""
        if len(prompt) >= self.engine.limit:
            told = f"the prompt has {len(prompt)} tokens, and the model takes {self.engine.limit} with what it adds"
            raise Refused(400, told, param, "context_length_exceeded")
        seeds = [None if sampling.seed is None else sampling.seed + number for number in range(choices)]
        return [self.engine.request(prompt, replace(sampling, seed=seed), tell) for seed in seeds]

    async def _answer(
        self, http: HttpRequest, answer: Answer, stream: bool | None, options: StreamOptions | None
    ) -> Response | EventStream:
        """Start the requests, and send what becomes of them, in pieces or whole."""
        reader = Reader(answer.requests, self.config.max_behind if stream else None)
        if not self.ready:
            raise self._leaving()
        self.readers.add(reader)
        try:
            self.engine.submit(answer.requests)
        except Busy as error:
            self.readers.remove(reader)
            rounds = len(self.engine.waiting) / self.config.max_batch
            seconds = min(BUSIEST_S, max(1, math.ceil(rounds * self.readers.request_s)))
            told = f"the server is busy ({error}): try again in {seconds} s"
            raise Refused(429, told, code="rate_limit_exceeded", retry_s=seconds) from error
        if stream:
            usage = bool(options is not None and options.include_usage)
            return EventStream(self._pieces(answer, reader, usage), lambda: self._release(reader), self.config)
        try:
            return await self._whole(http, answer, reader)
        finally:
            self._release(reader)

    def _release(self, reader: Reader) -> None:
        """Whoever waited does not wait any more."""
        self.readers.remove(reader)
        if reader.open:
            self.engine.cancel(list(reader.open))

    async def _whole(self, http: HttpRequest, answer: Answer, reader: Reader) -> Response:
        gone = asyncio.create_task(disconnected(http.receive))
        try:
            while reader.open:
                waiting = asyncio.create_task(reader.changed.wait())
                await asyncio.wait({gone, waiting}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                reader.changed.clear()
                if gone.done():
                    raise ClientDisconnect
        finally:
            gone.cancel()
        pieces = reader.take()
        self._check(pieces.values())
        return json_answer(answer.whole([pieces[at] for at in range(len(answer.requests))]))

    async def _pieces(self, answer: Answer, reader: Reader, usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events."""
        while reader.open or reader.changed.is_set():
            await reader.changed.wait()
            if reader.lost:
                return
            pieces = reader.take()
            try:
                self._check(pieces.values())
            except Refused as refused:
                yield event(refused.body())
                return
            told = [
                event(answer.part(at, piece))
                for at, piece in pieces.items()
                if piece.text or piece.chosen or piece.finish
            ]
            if told:
                yield b"".join(told)
        if usage:
            yield event(answer.last())
        yield b"data: [DONE]\n\n"

    def _check(self, pieces: Iterable[Piece]) -> None:
        """Raises Refused for texts that were broken off."""
        ends = {piece.finish for piece in pieces}
        if "failed" in ends:
            raise Refused(500, "the server failed while it wrote this text", code="engine_failed")
        if "cancelled" in ends:
            raise self._leaving()

    def _leaving(self) -> Refused:
        return Refused(503, "the server is about to end: try again", code="shutting_down", retry_s=BUSIEST_S // 10)
