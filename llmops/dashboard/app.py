"""The routes. None of them reads anything itself: what may hang is on threads, behind a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from llmops.dashboard.access import Guard, refusal
from llmops.dashboard.hub import Hub
from llmops.dashboard.lookups import KEEP_S, Lookups
from llmops.dashboard.source import Source
from llmops.errors import ClusterError, UserError

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
ACTION_S = 60.0  # a scheduler may take its time to accept or end a job
STUDY_KEEP_S = 10.0
GOODPUT_KEEP_S = 60.0
MOST_OVERLAID = 12
MOST_TAIL = 2000
MOST_BODY = 10_000  # bytes of a request that changes something

Handler = Callable[[Request], Awaitable[Response]]


class BadRequest(Exception):
    """A parameter cannot be what it is."""


@dataclass(frozen=True)
class Pages:
    """The handlers of all routes."""

    source: Source
    hub: Hub
    lookups: Lookups
    allow_actions: bool

    async def health(self, request: Request) -> Response:
        return Response(b"ok\n", media_type="text/plain")

    async def about(self, request: Request) -> Response:
        from llmops import __version__

        known = {"version": __version__, "url": self.source.runs_url, "actions": self.allow_actions}
        return Response(json.dumps(known), media_type="application/json")

    async def runs(self, request: Request) -> Response:
        snapshot = await self.hub.first(self.lookups.timeout_s)
        return Response(snapshot.whole(), media_type="application/json")

    async def events(self, request: Request) -> Response:
        # Proxies hold back what they think is a short answer.
        return StreamingResponse(self.hub.events(), headers={"x-accel-buffering": "no"}, media_type="text/event-stream")

    async def run(self, request: Request) -> Response:
        run_id = request.path_params["id"]
        return await self._look(("run", run_id), lambda: self.source.run(run_id))

    async def series(self, request: Request) -> Response:
        ids = tuple(dict.fromkeys(each for each in request.query_params.get("ids", "").split(",") if each))
        if not 1 <= len(ids) <= MOST_OVERLAID:
            raise BadRequest(f"ids: give 1 to {MOST_OVERLAID} runs, separated by commas")
        return await self._look(("series", ids), lambda: self.source.series(ids))

    async def study(self, request: Request) -> Response:
        study_id = request.path_params["id"]
        return await self._look(("study", study_id), lambda: self.source.study(study_id), STUDY_KEEP_S)

    async def goodput(self, request: Request) -> Response:
        return await self._look("goodput", self.source.goodput, GOODPUT_KEEP_S)

    async def logs(self, request: Request) -> Response:
        run_id, given = request.path_params["id"], request.query_params
        tail = _number(request, "tail", MOST_TAIL) or 200
        supervisor = given.get("rank") == "supervisor"
        rank = None if supervisor else _number(request, "rank")
        attempt, after = _number(request, "attempt"), given.get("after", "")
        key = ("logs", run_id, tail, rank, attempt, supervisor, after)
        return await self._look(key, lambda: self.source.logs(run_id, tail, rank, attempt, supervisor, after))

    async def cancel(self, request: Request) -> Response:
        run_id, asked = request.path_params["id"], await _body(request)
        graceful = asked.get("graceful", False)
        if not isinstance(graceful, bool):
            raise BadRequest("graceful: give true or false")
        return await self._act(f"cancel {graceful}", run_id, lambda: self.source.cancel(run_id, graceful))

    async def resume(self, request: Request) -> Response:
        run_id = request.path_params["id"]
        await _body(request)
        return await self._act("resume", run_id, lambda: self.source.resume(run_id))

    async def _look(
        self, key: Hashable, fetch: Callable[[], bytes], keep_s: float = KEEP_S, timeout_s: float | None = None
    ) -> Response:
        answer = await self.lookups.get(key, fetch, keep_s, timeout_s)
        return Response(answer, media_type="application/json")

    async def _act(self, what: str, run_id: str, act: Callable[[], bytes]) -> Response:
        """One at a time of each kind for each run: a second click gets the answer of the first."""
        try:
            return await self._look((what, run_id), act, timeout_s=ACTION_S)
        finally:
            self.hub.refresh()


def _number(request: Request, name: str, most: int = 1 << 31) -> int | None:
    text = request.query_params.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text[:12]) > most:
        raise BadRequest(f"{name}: give a number up to {most}")
    return int(text)


async def _body(request: Request) -> dict[str, object]:
    """A JSON object. Its content type is one that no form can send."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise BadRequest("send application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise BadRequest("the body is too long")
    try:
        value = json.loads(body)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest("the body is not a JSON object")
    return value


def guarded(handler: Handler, timeout_s: float) -> Handler:
    """A handler whose failures are answers of JSON."""

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except BadRequest as error:
            return refusal(400, str(error))
        except UserError as error:
            return refusal(404 if request.method == "GET" else 409, str(error))
        except TimeoutError:
            late = f"no answer from the run store or a scheduler within {timeout_s:g} s; try again"
            return refusal(504, late)
        except (ClusterError, OSError) as error:
            return refusal(502, str(error))
        except Exception as error:  # noqa: BLE001  # one page's defect must not end all others'; the log has it
            traceback.print_exception(error, file=sys.stderr)
            return refusal(500, f"this is a defect of llmops: {type(error).__name__}: {error}")

    return answered


def file(path: Path) -> Handler:
    """A handler that answers with one of the page's own files, as it was at the start."""
    content, kind = path.read_bytes(), TYPES[path.suffix]
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'

    async def answered(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        return Response(content, headers={"etag": tag}, media_type=kind)

    return answered


def build(source: Source, hub: Hub, token: str | None, allow_actions: bool, timeout_s: float = 10.0) -> ASGIApp:
    """The application. Its list of runs is looked up while it runs."""
    pages = Pages(source, hub, Lookups(timeout_s), allow_actions)
    api: dict[str, Handler] = {
        "/api/about": pages.about,
        "/api/runs": pages.runs,
        "/api/events": pages.events,
        "/api/run/{id}": pages.run,
        "/api/series": pages.series,
        "/api/logs/{id}": pages.logs,
        "/api/study/{id}": pages.study,
        "/api/goodput": pages.goodput,
        "/healthz": pages.health,
    }
    routes = [Route(path, guarded(handler, timeout_s)) for path, handler in api.items()]
    routes.append(Route("/", file(STATIC / "index.html")))
    routes += [Route(f"/static/{each.name}", file(each)) for each in sorted(STATIC.iterdir()) if each.suffix in TYPES]
    if allow_actions:
        for path, handler in (("/api/run/{id}/cancel", pages.cancel), ("/api/run/{id}/resume", pages.resume)):
            routes.append(Route(path, guarded(handler, ACTION_S), methods=["POST"]))

    @contextlib.asynccontextmanager
    async def looking(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(hub.run())
        try:
            yield
        finally:
            hub.close()
            await task

    async def missing(request: Request, error: Exception) -> Response:
        return refusal(404, "there is no such page")

    return Guard(Starlette(routes=routes, lifespan=looking, exception_handlers={404: missing}), token)
