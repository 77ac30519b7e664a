"""What can be said of ``notify`` before a run starts. A refusal names the key, and quotes no secret."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from llmops.config.overrides import ENV_NAME
from llmops.config.schema import EmailConfig, K8sCluster, NotifyConfig, RunConfig
from llmops.errors import UserError

_PREFIX = "env:"
_ADDRESS = re.compile(r"[^\s@<>,;\x00-\x1f]+@[^\s@<>,;\x00-\x1f]+")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def secret_names(notify: NotifyConfig) -> list[str]:
    """Variables whose values the supervisor needs to send what it has to tell."""
    named = (notify.webhook, notify.email.password if notify.email.to else None)
    return list(dict.fromkeys(text.removeprefix(_PREFIX) for text in named if text))


def check(config: RunConfig) -> None:
    """Raises :class:`UserError` for what cannot work, wherever it is sent from."""
    notify = config.notify
    for key, text in (("notify.webhook", notify.webhook), ("notify.email.password", notify.email.password)):
        if text is not None:
            _check_variable(key, text, config)
    if notify.command and not notify.command[0]:
        raise UserError("notify.command: its first word, the program, is empty")
    if any("\0" in word for word in notify.command):
        raise UserError("notify.command holds a null character, which no program can be given")
    _check_email(notify.email)


def check_values(notify: NotifyConfig) -> None:
    """Where the values travel with the job: they are set here, and look like what they should be."""
    for key, text, fits in (
        ("notify.webhook", notify.webhook, _is_url),
        ("notify.email.password", notify.email.password if notify.email.to else None, None),
    ):
        if text is not None:
            _check_value(key, text.removeprefix(_PREFIX), fits)


def _check_value(key: str, name: str, fits: Callable[[str], bool] | None) -> None:
    value = os.environ.get(name)
    if not value:
        raise UserError(f"{key}=env:{name}: {name} is not set in this environment; export it, or remove {key}")
    if fits is not None and not fits(value):
        raise UserError(f"{key}=env:{name}: the value of {name} is not a URL that begins with https:// or http://")


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"[\s\x00-\x1f]", value)
    except ValueError:
        return False


def _check_variable(key: str, text: str, config: RunConfig) -> None:
    name = text.removeprefix(_PREFIX)
    if not text.startswith(_PREFIX) or not ENV_NAME.fullmatch(name):
        raise UserError(f"{key}: give env:NAME, the variable that holds it; what stands here is written to the run")
    if name in config.env:
        raise UserError(
            f"{key}=env:{name}: env.{name} is written to the run; export {name} instead, and remove it there"
        )
    if isinstance(config.cluster, K8sCluster) and name not in config.cluster.secret_env:
        raise UserError(
            f"{key}=env:{name}: put it into a Secret and set cluster.secret_env.{name}={{secret: NAME, key: KEY}}"
        )


def _check_email(email: EmailConfig) -> None:
    for key, addresses in (("to", email.to), ("sender", [] if email.sender is None else [email.sender])):
        for address in addresses:
            if not _ADDRESS.fullmatch(address):
                raise UserError(f"notify.email.{key}={address!r}: not an address such as ada@example.org")
    if not email.to:
        unused = [key for key in ("sender", "user", "password") if getattr(email, key) is not None]
        if unused:
            raise UserError(f"notify.email.{unused[0]} is set, but notify.email.to names nobody")
        return
    if not re.fullmatch(r"[^\s/@]+", email.host):
        raise UserError(f"notify.email.host={email.host!r}: give the name or address of a mail server")
    if (email.user is None) != (email.password is None):
        missing = "user" if email.user is None else "password"
        raise UserError(f"notify.email.{missing} is not set: a server wants both a user and a password, or neither")
    if email.tls == "none" and email.password is not None and email.host not in _LOOPBACK:
        raise UserError("notify.email.tls=none would send the password in clear: set starttls or tls")
    if email.tls == "tls" and email.port in (25, 587):
        raise UserError(f"notify.email.tls=tls: port {email.port} begins in clear; set tls=starttls, or port=465")
    if email.tls != "tls" and email.port == 465:
        raise UserError(f"notify.email.tls={email.tls}: port 465 speaks TLS at once; set tls=tls, or another port")
