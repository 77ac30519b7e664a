"""One API server: configuration and authentication by the official client, requests as plain JSON.

The client's models are not used: they take most of its import time and would drop fields that they do not know.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from llmops.backends.k8s.explain import ApiError, Unanswered, api_error
from llmops.backends.k8s.resources import Resource
from llmops.errors import ClusterError, UserError

CONNECT_S = 5.0
READ_S = 30.0
TOTAL_S = 60.0  # of one request with all its tries and the pauses between them
TRIES = 5
BACKOFF_S = 0.25  # before the second try; doubles each time, up to BACKOFF_MAX_S
BACKOFF_MAX_S = 8.0
PAGE = 500  # objects of one page of a list
MAX_PAGES = 1000
NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
POOL = 160  # connections that are kept: more than are ever open at once, or urllib3 warns of each
MERGE_PATCH = "application/merge-patch+json"


class Api:
    """One API server, as one user. Methods raise :class:`ApiError` for an answer that refuses, :class:`Unanswered` for
    none within :data:`TOTAL_S`; both are :class:`ClusterError`."""

    def __init__(self, client: Any, context: str, kubeconfig: str = "") -> None:
        self._client = client
        self._pool = client.rest_client.pool_manager
        self.context = context
        self.kubeconfig = kubeconfig  # empty for the usual one
        url = urlsplit(client.configuration.host)
        self._base = client.configuration.host.rstrip("/")
        host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname or ""
        self.server = f"{url.scheme}://{host}" + (f":{url.port}" if url.port else "")  # without user and password

    def get(self, path: str, query: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A JSON object."""
        return self._json("GET", path, query)

    def post(self, path: str, body: Mapping[str, Any], query: Mapping[str, Any]) -> dict[str, Any]:
        """Create. Only what was surely not carried out is sent again; a dry run always may be."""
        return self._json("POST", path, query, body, repeat="dryRun" in query)

    def patch(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """JSON merge patch: the only kind that custom resources take."""
        return self._json("PATCH", path, None, body, MERGE_PATCH)

    def delete(self, path: str, policy: str) -> None:
        """Absent is fine. ``policy`` is never left out: a Job would orphan its pods."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": policy}
        try:
            self._json("DELETE", path, None, body)
        except ApiError as error:
            if error.status != 404 or error.unserved:
                raise

    def list(
        self, resource: Resource, namespace: str, labels: str = "", fields: str = ""
    ) -> tuple[list[dict[str, Any]], str]:
        """All objects, page by page, and the resourceVersion from which a watch goes on."""
        chosen = {"labelSelector": labels, "fieldSelector": fields}
        chosen = {name: value for name, value in chosen.items() if value}
        path, items, token = resource.path(namespace), list[dict[str, Any]](), ""
        for _ in range(MAX_PAGES):
            query = {**chosen, "limit": PAGE, **({"continue": token} if token else {})}
            try:
                page = self.get(path, query)
            except ApiError as error:
                if error.status != 410 or not token:
                    raise
                # The snapshot that the pages were of has expired: one answer with all of it cannot.
                page = self.get(path, chosen)
                items = []
            items += page.get("items") or []
            token = str(page["metadata"].get("continue") or "")
            if not token:
                return items, str(page["metadata"].get("resourceVersion") or "")
        raise ClusterError(f"{self.server}: a list of {resource.plural} in {namespace} does not end")

    def date(self) -> str:
        """The Date header of an answer, empty where there is none. One try."""
        answer = self._send("GET", "/version", None, None, None, CONNECT_S, READ_S)
        return str(answer.headers.get("Date") or "")

    def stream(self, path: str, query: Mapping[str, Any], read_s: float) -> Any:
        """An open answer (urllib3's); the caller reads and closes it. One try: who follows reconnects anyhow."""
        answer = self._send("GET", path, query, None, None, CONNECT_S, read_s, stream=True)
        if answer.status >= 300:
            raw = b"".join(blocks(answer))
            answer.release_conn()
            raise self._error(answer.status, raw, path)
        return answer

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        repeat: bool = True,
    ) -> dict[str, Any]:
        """Send, with bounded retries. ``repeat``: also when it may have been carried out."""
        deadline = time.monotonic() + TOTAL_S
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(1, TRIES + 1):
            left = deadline - time.monotonic()
            pause = backoff(attempt)
            try:
                answer = self._send(method, path, query, data, content_type, min(CONNECT_S, left), min(READ_S, left))
            except Unanswered:
                if not repeat or attempt == TRIES or time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)
                continue
            if answer.status < 300:
                return _object(answer.data)
            error = self._error(answer.status, answer.data, path)
            again = answer.status == 429 or (answer.status >= 500 and repeat and "too large" not in error.message)
            pause = max(pause, _retry_after(answer.headers.get("Retry-After")))
            if not again or attempt == TRIES or time.monotonic() + pause > deadline:
                if answer.status >= 500 and not repeat and "too large" not in error.message:
                    raise Unanswered(str(error)) from error
                raise error
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        data: bytes | None,
        content_type: str | None,
        connect_s: float,
        read_s: float,
        stream: bool = False,
    ) -> Any:
        import urllib3

        headers = {"Accept": "application/json", "User-Agent": "llmops"}
        if data is not None:
            headers["Content-Type"] = content_type or "application/json"
        self._client.update_params_for_auth(headers, [], ["BearerToken"])  # refreshes a token that has expired
        url = f"{self._base}{path}" + (f"?{urlencode(query)}" if query else "")
        timeout = urllib3.Timeout(connect=connect_s, read=read_s)
        try:
            # Retries of its own would sleep for as long as a Retry-After says.
            return self._pool.request(
                method, url, body=data, headers=headers, timeout=timeout, retries=False, preload_content=not stream
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> ClusterError:
        """Why there was no answer. The exception's own text is not shown: it may hold a proxy's password."""
        import urllib3.exceptions as kinds

        if isinstance(error, kinds.SSLError):
            why = "its certificate is not trusted" if "CERTIFICATE_VERIFY" in str(error) else "TLS failed"
            return ClusterError(f"{self.server}: {why} ({_tls_reason(str(error))}); check the context {self.context}")
        if isinstance(error, kinds.NewConnectionError):
            unknown = "resol" in str(error) or "not known" in str(error)
            why = "its name cannot be resolved" if unknown else "nothing listens there, or it cannot be reached"
        elif isinstance(error, kinds.TimeoutError | TimeoutError):
            why = "no answer in time"
        else:
            why = "the proxy refuses" if isinstance(error, kinds.ProxyError) else "the connection was lost"
        return Unanswered(
            f"the API server {self.server} does not answer ({why}); check the network, and the context "
            f"{self.context or 'of this pod'}"
        )

    def _error(self, status: int, raw: bytes, path: str) -> ApiError:
        text = raw.decode("utf-8", "replace")
        try:
            body = json.loads(text)
        except ValueError:
            body = {}
        status_body = body if isinstance(body, dict) and body.get("kind") == "Status" else {}
        return api_error(status, status_body, text, path, self.server, self.context)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise ClusterError("the API server's answer is no JSON; is there a proxy or login page before it?") from error
    if not isinstance(value, dict):
        raise ClusterError("the API server's answer is no JSON object; is there a proxy before it?")
    return value


def _tls_reason(text: str) -> str:
    match = re.search(r"certificate verify failed: ([^(]+)", text) or re.search(r"\] ?([^(]+)", text)
    return match[1].strip() if match else "no reason given"


def _retry_after(value: str | None) -> float:
    """Seconds; 0 where there is none, or it is a date."""
    return float(value) if value and value.strip().isdigit() else 0.0


def backoff(attempt: int) -> float:
    """Seconds before the next try after ``attempt`` of them, spread so that many clients do not come back together."""
    return min(BACKOFF_MAX_S, BACKOFF_S * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)  # noqa: S311


def inside_cluster() -> bool:
    """Whether this process runs in a pod that has a service account."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and Path(NAMESPACE_FILE).exists()


def current(context: str | None, kubeconfig: str | None) -> tuple[str, str]:
    """The context that is meant, and its namespace. The context is empty inside a cluster, and where there is none."""
    contexts = _contexts(kubeconfig)
    if contexts is None:
        if context:
            raise UserError(f"cluster.context={context}: there is no kubeconfig; set cluster.kubeconfig or KUBECONFIG")
        namespace = Path(NAMESPACE_FILE).read_text().strip() if inside_cluster() else "default"
        return "", namespace
    known, active = contexts
    name = context or active
    if not name:
        raise UserError(f"the kubeconfig has no current context; set cluster.context to one of: {', '.join(known)}")
    if name not in known:
        raise UserError(f"cluster.context={name}: not in the kubeconfig; it has: {', '.join(sorted(known)) or 'none'}")
    return name, str(known[name].get("namespace") or "default")


def connect(context: str, kubeconfig: str | None = None) -> Api:
    """The API server of a context; with an empty name that of the cluster that this process runs inside."""
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise UserError(
            "the k8s backend needs the package `kubernetes`: pip install 'llmops[k8s]' (or set cluster.backend)"
        ) from error
    configuration = client.Configuration()
    configuration.connection_pool_maxsize = POOL
    try:
        if context:
            # On another machine than the one that submitted, its context may be known by the usual file.
            files = _files(kubeconfig if kubeconfig and Path(kubeconfig).exists() else None)
            config.load_kube_config(config_file=files, context=context, client_configuration=configuration)
        elif inside_cluster():
            config.load_incluster_config(client_configuration=configuration)
        else:
            raise ClusterError(
                "there is no kubeconfig and this is no pod, so no cluster is known; set KUBECONFIG or "
                "cluster.kubeconfig (a run that was submitted from inside its cluster can be asked about only there)"
            )
    except config.ConfigException as error:
        raise ClusterError(f"the kubeconfig's context {context} cannot be used: {_safe(error)}") from error
    return Api(client.ApiClient(configuration), context, kubeconfig or "")


def _files(kubeconfig: str | None) -> str:
    """The kubeconfig's files, separated like a PATH. The client reads KUBECONFIG only when it is imported."""
    given = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    return os.pathsep.join(str(Path(part).expanduser()) for part in given.split(os.pathsep) if part)


def _contexts(kubeconfig: str | None) -> tuple[dict[str, dict[str, Any]], str] | None:
    """The contexts by name, and the current one. None where there is no kubeconfig."""
    try:
        from kubernetes.config import ConfigException, kube_config
    except ImportError as error:
        raise UserError("the k8s backend needs the package `kubernetes`: pip install 'llmops[k8s]'") from error
    import yaml

    where = _files(kubeconfig)
    if not any(Path(file).exists() for file in where.split(os.pathsep)):
        if kubeconfig:
            raise UserError(f"cluster.kubeconfig={kubeconfig}: there is no such file")
        return None
    try:
        contexts, active = kube_config.list_kube_config_contexts(where)
    except ConfigException as error:
        raise UserError(f"the kubeconfig {where} cannot be used: {_safe(error)}") from error
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the kubeconfig {where} cannot be read ({type(error).__name__}); correct it") from error
    named = {str(each["name"]): each.get("context") or {} for each in contexts or []}
    return named, str((active or {}).get("name") or "")


def _safe(error: Exception) -> str:
    """The client's complaint, which names keys and files, without anything that looks like a credential."""
    return re.sub(r"[A-Za-z0-9+/=_.-]{40,}", "…", " ".join(str(error).split()))[:300]


def blocks(answer: Any) -> Iterator[bytes]:
    """What comes of an open answer, as it comes: these answers are chunked."""
    import urllib3

    try:
        yield from answer.stream(1 << 16)
    except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
        # The last two are what reading meets when another thread has closed the connection.
        raise Unanswered("the stream broke off") from error


def lines(answer: Any) -> Iterator[bytes]:
    """Lines of an open answer as they come, without their newline; the last one may have had none."""
    held = b""
    for block in blocks(answer):
        *whole, held = (held + block).split(b"\n")
        yield from whole
    if held:
        yield held
