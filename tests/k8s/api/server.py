"""A double of a Kubernetes API server: it keeps objects, and fails on request. Checked against recordings of a real one
(test_double.py)."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.k8s.api.store import KINDS, POD, Change, Kind, Object, Refusal, Store, selector

ADMIN = "admin-token"
_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
    r"|/(?P<wide>[^/]+)(?:/(?P<wide_name>[^/]+))?)?"
)
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, str]
    verb: str  # as a Role has it
    resource: str  # group/plural or group/plural/subresource; empty for discovery
    body: Any = None


class Fault(NamedTuple):
    """What happens to requests that match, instead of (or, ``after``, beside) what should."""

    matches: Callable[[Request], bool]
    act: Callable[[_Handler], None]
    after: bool


class Reset(Exception):
    """The connection goes down without an answer."""


class ApiServer:
    """Serves on loopback until :meth:`close`. ``rules``: of users by token; None allows all."""

    def __init__(self) -> None:
        self.store = Store()
        self.requests: list[Request] = []
        self.faults: list[list[Any]] = []
        self.users: dict[str, tuple[str, list[Object] | None]] = {ADMIN: ("admin", None)}
        self.absent: set[str] = set()  # groups whose CRDs are not installed
        self.logs: dict[str, list[bytes]] = {}  # by pod: lines with their time, as a node keeps them
        self.streams = 0  # watches and followed logs that are open
        self.generation = 0  # raised to break them off
        self.watch_s = 60.0  # at most
        self.version = {"major": "1", "minor": "36", "gitVersion": "v1.36.2", "platform": "linux/amd64"}
        owner = self

        class Handler(_Handler):
            api = owner

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.break_streams()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def use_tls(self, certificate: Path, key: Path) -> None:
        """From now on by HTTPS alone."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")

    def break_streams(self) -> None:
        """All open watches and followed logs lose their connection."""
        with self.store.changed:
            self.generation += 1
            self.store.changed.notify_all()

    def log(self, pod: str, *lines: bytes) -> None:
        """More output of a pod: ``TIME TEXT`` with its newline."""
        with self.store.changed:
            self.logs.setdefault(pod, []).extend(lines)
            self.store.changed.notify_all()

    def fail(
        self,
        how: int | str | tuple[int, dict[str, str], bytes],
        times: int = 1,
        method: str = "",
        path: str = "",
        test: Callable[[Request], bool] = lambda request: True,
    ) -> None:
        """The next ``times`` matching requests fail: with a status, with a whole answer, ``reset`` before they are
        carried out, or ``lost`` after."""

        def matches(request: Request) -> bool:
            return request.method.startswith(method) and re.search(path, request.path) is not None and test(request)

        def act(handler: _Handler) -> None:
            if how in ("reset", "lost"):
                raise Reset
            if isinstance(how, int):
                texts = {429: "TooManyRequests", 503: "ServiceUnavailable", 500: "InternalError", 504: "Timeout"}
                raise Refusal(how, texts.get(how, ""), f"told to answer {how}")
            assert isinstance(how, tuple)
            handler.answer(*how)

        self.faults.append([times, Fault(matches, act, how == "lost")])

    def fault(self, request: Request, after: bool) -> Fault | None:
        with self.store.changed:
            for each in self.faults:
                if each[0] > 0 and each[1].after == after and each[1].matches(request):
                    each[0] -= 1
                    return each[1]
        return None


class _Handler(BaseHTTPRequestHandler):
    api: ApiServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet: what was asked is in ``requests``."""

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        match = _PATH.fullmatch(unquote(url.path))
        parts = match.groupdict() if match else {}
        if parts.get("wide"):  # of the whole cluster
            parts |= {"plural": parts["wide"], "name": parts["wide_name"]}
        verb = _VERBS.get(self.command) or ("watch" if query.get("watch") else "get" if parts.get("name") else "list")
        resource = "/".join(p for p in (parts.get("plural"), parts.get("sub")) if p)
        resource = f"{parts.get('group') or ''}/{resource}" if resource else ""
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = None
        request = Request(self.command, url.path, query, verb, resource, body)
        self.api.requests.append(request)
        try:
            fault = self.api.fault(request, after=False)
            if fault is not None:
                fault.act(self)
                return
            after = self.api.fault(request, after=True)
            respond = self._respond(request, parts)
            if after is not None:
                after.act(self)
            respond()
        except Refusal as refusal:
            self._json(refusal.code, refusal.body)
        except (Reset, ConnectionError):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, status: int, body: Object) -> None:
        self.answer(status, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _respond(self, request: Request, parts: dict[str, Any]) -> Callable[[], None]:
        """Carry the request out; what is returned sends the answer."""
        user, rules = self._user()
        kinds = [each for each in KINDS if each.group not in self.api.absent]
        if request.path == "/version":  # everybody may ask, known or not
            return lambda: self._json(200, self.api.version)
        if request.path == "/apis" and user != "system:anonymous":
            return lambda: self._json(200, _groups(kinds))
        group, version = parts.get("group") or "", parts.get("version") or parts.get("core")
        here = [each for each in kinds if (each.group, each.version) == (group, version)]
        plural, namespace, name = parts.get("plural"), parts.get("namespace") or "", parts.get("name") or ""
        review = plural == "selfsubjectaccessreviews" and user != "system:anonymous"
        if plural and not review:
            self._authorise(user, rules, request, group, parts)
        if review and request.method == "POST":
            return lambda: self._json(201, _reviewed(request.body, rules))
        # A namespaced kind without its namespace, in all of them, is nothing that llmops asks for.
        fitting = (each for each in here if each.plural == plural and each.namespaced == (parts["wide"] is None))
        kind = next(fitting, None)
        if not here or (plural and kind is None):
            return lambda: self.answer(404, {"Content-Type": "text/plain; charset=utf-8"}, b"404 page not found\n")
        if kind is None:
            found = [{"name": each.plural, "kind": each.kind, "namespaced": each.namespaced} for each in here]
            listed = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": here[0].api_version}
            return lambda: self._json(200, {**listed, "resources": found})
        return self._object(request, kind, namespace, name, parts.get("sub") or "")

    def _object(self, request: Request, kind: Kind, namespace: str, name: str, sub: str) -> Callable[[], None]:
        store, query = self.api.store, request.query
        if sub == "log":
            return self._log(kind, namespace, name, query)
        if request.method == "POST":
            made = store.create(kind, namespace, request.body, "dryRun" in query)
            return lambda: self._json(201, made)
        if request.method == "PATCH":
            self._check_patch(kind)
            patched = store.merge(kind, namespace, name, request.body)
            return lambda: self._json(200, patched)
        if request.method == "DELETE":
            policy = query.get("propagationPolicy") or (request.body or {}).get("propagationPolicy")
            deleted = store.delete(kind, namespace, name, policy)
            return lambda: self._json(200, deleted)
        if name:
            item = store.get(kind, namespace, name)
            return lambda: self._json(200, item)
        version = query.get("resourceVersion", "")
        if version and not version.isdigit():
            bad = f'resourceVersion: Invalid value: "{version}": strconv.ParseUint: parsing "{version}": invalid syntax'
            if query.get("watch"):
                raise Refusal(500, "", bad)
            raise Refusal(400, "BadRequest", f"invalid resource version: {bad}")
        if query.get("watch"):
            return lambda: self._watch(kind, namespace, query)
        page = store.page(kind, namespace, query)
        return lambda: self._json(200, page)

    def _user(self) -> tuple[str, list[Object] | None]:
        given = self.headers.get("Authorization")
        if given is None:
            return "system:anonymous", []
        user = self.api.users.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        return user

    def _authorise(
        self, user: str, rules: list[Object] | None, request: Request, group: str, parts: dict[str, Any]
    ) -> None:
        resource = request.resource.split("/", 1)[1]
        if _allows(rules, group, resource, request.verb):
            return
        plural, name = parts["plural"], parts.get("name") or ""
        kind = Kind(group, "", plural, "")
        about = f'{kind.named} "{name}"' if name else kind.named
        message = (
            f'{about} is forbidden: User "{user}" cannot {request.verb} resource "{resource}" in API group "{group}" '
            + (f'in the namespace "{parts["namespace"]}"' if parts["namespace"] else "at the cluster scope")
        )
        raise Refusal(403, "Forbidden", message, kind.details(name))

    def _check_patch(self, kind: Kind) -> None:
        sent = self.headers.get("Content-Type", "")
        if sent == "application/merge-patch+json":
            return
        if kind.custom:
            known = "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"
            told = f"the body of the request was in an unknown format - accepted media types include: {known}"
            raise Refusal(415, "UnsupportedMediaType", told)
        raise Refusal(415, "UnsupportedMediaType", "415: Unsupported Media Type", {})

    def _start_stream(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _watch(self, kind: Kind, namespace: str, query: dict[str, str]) -> None:
        store, fits = self.api.store, selector(query, kind)
        self._start_stream("application/json")

        def send(event: str, item: Object) -> None:
            self._chunk(json.dumps({"type": event, "object": item}).encode() + b"\n")

        until = time.monotonic() + min(float(query.get("timeoutSeconds") or 1e9), self.api.watch_s)
        with store.changed:
            generation = self.api.generation
            seen = int(query.get("resourceVersion") or 0)
            if seen and seen < store.compacted:
                message = f"too old resource version: {seen} ({store.compacted})"
                send("ERROR", Refusal(410, "Expired", message).body)
                self._chunk(b"")
                return
            if not seen:
                for key, item in sorted(store.objects.items(), key=lambda each: each[0][2]):
                    if key[:2] == (kind, namespace) and fits(item):
                        send("ADDED", item)
                seen = store.version
            self.api.streams += 1
            try:
                while (left := until - time.monotonic()) > 0:
                    if generation != self.api.generation:
                        raise Reset
                    if seen < store.compacted:
                        break
                    for change in [each for each in store.history if each.version > seen]:
                        seen = change.version
                        if (change.kind, change.namespace) == (kind, namespace):
                            event, item = _event(change, fits)
                            if event:
                                send(event, item)
                    store.changed.wait(min(left, 0.5))
            finally:
                self.api.streams -= 1
        if query.get("allowWatchBookmarks"):
            mark = {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": {"resourceVersion": str(seen)}}
            send("BOOKMARK", mark)
        self._chunk(b"")

    def _log(self, kind: Kind, namespace: str, name: str, query: dict[str, str]) -> Callable[[], None]:
        pod = self.api.store.get(POD, namespace, name)
        states = pod.get("status", {}).get("containerStatuses") or []
        if not states:
            return lambda: self.answer(204, {}, b"")
        waiting = states[0].get("state", {}).get("waiting")
        if waiting and not states[0].get("lastState", {}).get("terminated"):
            why = {"ImagePullBackOff": "trying and failing to pull image"}.get(waiting["reason"], waiting["reason"])
            message = f'container "{states[0]["name"]}" in pod "{name}" is waiting to start: {why}'
            raise Refusal(400, "BadRequest", message)
        return lambda: self._log_lines(namespace, name, query)

    def _log_lines(self, namespace: str, name: str, query: dict[str, str]) -> None:
        store = self.api.store
        self._start_stream("text/plain")
        with store.changed:
            generation = self.api.generation
            lines = self.api.logs.setdefault(name, [])
            position = max(0, len(lines) - int(query.get("tailLines") or len(lines)))
            if query.get("tailLines") == "0":
                position = len(lines)
            if query.get("sinceTime"):
                since = query["sinceTime"].encode()[:19]  # whole seconds, and its own once more
                position = next((i for i, line in enumerate(lines) if line[:19] >= since), len(lines))
            self.api.streams += 1
            try:
                while True:
                    for line in lines[position:]:
                        self._chunk(line if query.get("timestamps") else line.split(b" ", 1)[1])
                    position = len(lines)
                    pod = store.objects.get((POD, namespace, name))
                    ended = pod is None or pod["status"].get("phase") != "Running"
                    if ended or not query.get("follow"):
                        break
                    if generation != self.api.generation:
                        raise Reset
                    store.changed.wait(0.5)
            finally:
                self.api.streams -= 1
        self._chunk(b"")


def _allows(rules: list[Object] | None, group: str, resource: str, verb: str) -> bool:
    return rules is None or any(
        group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"] for rule in rules
    )


def _reviewed(body: Object, rules: list[Object] | None) -> Object:
    """A SelfSubjectAccessReview with its answer. Rules are of one namespace: ``namespace`` in a rule, else of all."""
    asked = body["spec"]["resourceAttributes"]
    resource = asked["resource"] + (f"/{asked['subresource']}" if asked.get("subresource") else "")
    here = None if rules is None else [each for each in rules if each.get("namespace") in (None, asked["namespace"])]
    allowed = _allows(here, asked.get("group", ""), resource, asked["verb"])
    status = {"allowed": allowed, **({"reason": "RBAC: allowed"} if allowed else {})}
    spec = {"resourceAttributes": {key: value for key, value in asked.items() if value}}
    return {"kind": body["kind"], "apiVersion": body["apiVersion"], "metadata": {}, "spec": spec, "status": status}


def _groups(kinds: list[Kind]) -> Object:
    """What ``/apis`` answers: of each group its versions, the one that is preferred first."""
    versions: dict[str, list[str]] = {}
    for each in kinds:
        if each.group and each.version not in versions.setdefault(each.group, []):
            versions[each.group].append(each.version)
    listed = {
        group: [{"groupVersion": f"{group}/{version}", "version": version} for version in found]
        for group, found in versions.items()
    }
    groups = [{"name": group, "versions": found, "preferredVersion": found[0]} for group, found in listed.items()]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def _event(change: Change, fits: Callable[[Object], bool]) -> tuple[str, Object]:
    """For a watch with a selector: what stops to match is DELETED, as it last matched; what begins to is ADDED."""
    after, before = fits(change.item), change.before is not None and fits(change.before)
    if change.before is not None and before and (change.event == "DELETED" or not after):
        metadata = {**change.before["metadata"], "resourceVersion": str(change.version)}
        return "DELETED", {**change.before, "metadata": metadata}
    if not after or change.event == "DELETED":
        return "", change.item
    return ("MODIFIED" if before else "ADDED"), change.item
