"""What the API server answers when it refuses, in one line for people. Nothing of a request's headers is ever in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmops.errors import ClusterError

MAX_MESSAGE = 700  # a server may quote a whole pod template

_DENIED = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]*)" in API group "(?P<group>[^"]*)"'
    r'(?: in the namespace "(?P<namespace>[^"]*)")?'
)
_WEBHOOK = re.compile(r'admission webhook "(?P<name>[^"]*)" denied the request: ?(?P<why>.*)', re.DOTALL)


class ApiError(ClusterError):
    """The API server answered with an error. ``str()`` is one line for people."""

    def __init__(self, text: str, status: int, reason: str, message: str, body: Mapping[str, Any]) -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason  # of the Status object: NotFound, AlreadyExists, Expired …; empty where there was none
        self.message = message  # the server's own words
        self.body = body

    @property
    def unserved(self) -> bool:
        """The path itself does not exist, so no such kind is served: then there is no Status, only plain text."""
        return self.status == 404 and not self.body


class Unanswered(ClusterError):
    """No answer in time: the request may have been carried out."""


def one_line(text: str, limit: int = MAX_MESSAGE) -> str:
    """Without line breaks, and cut where it is too long to read."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def api_error(status: int, body: Mapping[str, Any], text: str, path: str, where: str, context: str) -> ApiError:
    """``body``: the Status object, empty where the answer ``text`` was none. ``where``: the server's URL."""
    reason, message = str(body.get("reason") or ""), str(body.get("message") or text.strip() or f"HTTP {status}")
    return ApiError(_words(status, body, message, path, where, context), status, reason, message, body)


def _words(status: int, body: Mapping[str, Any], message: str, path: str, where: str, context: str) -> str:
    told = one_line(message)
    webhook = _WEBHOOK.search(message)
    if webhook:
        why = one_line(_causes(body) or webhook["why"])
        return f"the admission webhook {webhook['name']} denied it: {why}"
    if status == 401:
        return (
            f"{where} does not accept these credentials (401 Unauthorized); log in again for the context "
            f"{context or 'of this pod'}, whose token is wrong or has expired"
        )
    if status == 403:
        return _forbidden(message, told, where, context)
    if status == 404 and not body:
        kind = path.split("?")[0].split("/")
        served = "/".join(kind[2:4]) if kind[1:2] == ["apis"] else path
        return f"{where} serves no {served}: its operator (CRD) is not installed there; choose another cluster.workload"
    if status == 404 and _details(body).get("kind") == "namespaces":
        name = _details(body).get("name")
        return f"there is no namespace {name} at {where}; create it, or set cluster.namespace"
    if status == 413 or "request is too large" in message:
        return f"the object is too large for the API server ({told}); shorten env, annotations or the command"
    if status in (400, 422):
        return f"the API server says that it is invalid: {one_line(_causes(body) or _strict(message))}"
    if status == 429:
        return f"{where} is throttling (429, {told}); try again later"
    if status >= 500:
        return f"{where} has a fault ({status}: {told}); try again later"
    return told


def _forbidden(message: str, told: str, where: str, context: str) -> str:
    denied = _DENIED.search(message)
    if denied is None:  # quota, PodSecurity, a namespace that ends, an account or class that is absent
        return f"the cluster's policy forbids it: {told}"
    if denied["user"] == "system:anonymous":
        return (
            f"{where} got no credentials (it takes you for system:anonymous); log in for the context "
            f"{context or 'of this pod'}, or check its user in the kubeconfig"
        )
    resource, _, sub = denied["resource"].partition("/")
    group, namespace = denied["group"], denied["namespace"]
    kind = f"{resource}.{group}" if group else resource
    place = f"in namespace {namespace}" if namespace else "at cluster scope"
    check = f"kubectl auth can-i {denied['verb']} {kind}" + (f" --subresource={sub}" if sub else "")
    check += (f" -n {namespace}" if namespace else "") + (f" --context {context}" if context else "")
    # Authorisation is asked before existence, so a kind that is absent is forbidden too.
    unsure = f", or {group} is not installed: the server does not say" if "." in group else ""
    full = f"{kind}/{sub}" if sub else kind
    return (
        f"{denied['user']} may not {denied['verb']} {full} {place} ({where}); ask for a Role that allows it{unsure}; "
        f"check with: {check}"
    )


def _details(body: Mapping[str, Any]) -> Mapping[str, Any]:
    details = body.get("details")
    return details if isinstance(details, Mapping) else {}


def _causes(body: Mapping[str, Any]) -> str:
    """``field: what is wrong`` of each cause; empty where there are none."""
    causes = _details(body).get("causes") or []
    told = []
    for cause in causes:
        field, message = str(cause.get("field") or ""), str(cause.get("message") or "")
        line = message if field in ("", "<nil>") or message.startswith(field) else f"{field}: {message}"
        told += [line] if line not in told else []
    return "; ".join(told)


def _strict(message: str) -> str:
    """Of a decoding error only what it is about."""
    return message.split("strict decoding error: ", 1)[-1]
