"""The ways a notification leaves: a Slack-compatible webhook, mail by SMTP, a command.

Each raises :class:`NotSent` with one line that holds no secret: what libraries say of an error may hold a URL.
"""

from __future__ import annotations

import email.message
import email.utils
import http.client
import json
import os
import signal
import smtplib
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

from llmops.agent.plain import plain

ANSWER_S = 10.0  # for each answer of a server
TRIES = 3  # of a webhook that says "later"
PAUSE_S = 2.0  # before its second try; doubles
COMMAND_S = 20.0
SAID_LINES, SAID_BYTES = 5, 4096  # of what a command prints


class NotSent(Exception):
    """It did not leave, and why. One line, without secrets."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, without what it was to tell."""

    def redirect_request(self, *_: Any) -> None:
        return None


def webhook(url: str, text: str, deadline: float) -> list[str]:
    """POST ``{"text": ...}``. Tried again, until ``deadline`` on the monotonic clock, only where the server asks so."""
    # Slack reads <...> as a link or a call to everybody in the channel.
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    body = json.dumps({"text": escaped}).encode()
    opener = urllib.request.build_opener(_NoRedirect)
    pause = PAUSE_S
    for left in range(TRIES - 1, -1, -1):
        try:
            if not url.startswith(("https://", "http://")):
                raise NotSent("webhook: its URL begins with neither https:// nor http://")
            request = urllib.request.Request(url, body, {"Content-Type": "application/json", "User-Agent": "llmops"})  # noqa: S310
            with opener.open(request, timeout=ANSWER_S) as answer:
                answer.read(SAID_BYTES)
            return []
        except urllib.error.HTTPError as error:
            with error:
                later = error.code == 429 or error.code >= 500
                wait_s = max(_retry_after(error.headers.get("Retry-After")), pause)
            if not left or not later or time.monotonic() + wait_s > deadline:
                raise NotSent(f"webhook: HTTP {error.code}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NotSent(f"webhook: {_why(error)}") from None
        time.sleep(wait_s)
        pause *= 2
    raise AssertionError("the last try either returns or raises")


def _retry_after(text: str | None) -> float:
    """Seconds; a date, or nonsense, counts as nothing said."""
    return float(text) if text and text.isascii() and text.isdecimal() else 0.0


def mail(config: dict[str, Any], password: str | None, subject: str, text: str) -> list[str]:
    """Send one mail to all. Certificates are verified; a password never leaves in clear but to this machine."""
    here = socket.gethostname()
    message = email.message.EmailMessage()
    message["Subject"] = subject
    message["From"] = config["sender"] or f"llmops@{here}"
    message["To"] = ", ".join(config["to"])
    message["Date"] = email.utils.formatdate()
    message["Message-ID"] = email.utils.make_msgid(domain=here if "." in here else f"{here}.invalid")
    message.set_content(text)
    host, port, tls = config["host"], config["port"], config["tls"]
    try:
        context = None if tls == "none" else ssl.create_default_context()
        if tls == "tls":
            server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, here, timeout=ANSWER_S, context=context)
        else:
            server = smtplib.SMTP(host, port, here, timeout=ANSWER_S)
        with server:
            if tls == "starttls":
                server.starttls(context=context)
            if config["user"] and password is not None:
                server.login(config["user"], password)
            refused = server.send_message(message)
    except smtplib.SMTPResponseException as error:
        raise NotSent(f"email: {type(error).__name__} {error.smtp_code}") from None
    except (OSError, ValueError) as error:  # smtplib's own are OSErrors
        raise NotSent(f"email: {_why(error)}") from None
    if refused:
        raise NotSent(f"email: the server refused {len(refused)} of {len(config['to'])} addresses")
    return []


def _why(error: BaseException) -> str:
    """What went wrong, without what the error quotes."""
    reason = getattr(error, "reason", None)
    cause = reason if isinstance(error, urllib.error.URLError) and isinstance(reason, BaseException) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "the server's certificate cannot be verified"
    if isinstance(cause, (socket.timeout, TimeoutError)):
        return f"no answer within {ANSWER_S:g} s"
    if isinstance(cause, socket.gaierror):
        return "its host is not known"
    if isinstance(cause, (ValueError, http.client.InvalidURL)):
        return "its address is not valid"
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno)
    return type(cause).__name__


_running: list[subprocess.Popen[bytes]] = []


def kill_commands() -> None:
    """End what is left of the programs that were started, with all that they have started themselves."""
    for process in _running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def command(argv: list[str], event: dict[str, Any], environment: dict[str, str]) -> list[str]:
    """Run a program with the event on its standard input; the last lines that it printed."""
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as output:
        source.write(json.dumps(event).encode() + b"\n")
        source.seek(0)
        try:
            process = subprocess.Popen(
                argv,
                stdin=source,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise NotSent(f"command: {plain(argv[0])} cannot be started: {_why(error)}") from None
        _running.append(process)
        try:
            code: int | None = process.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            kill_commands()
            process.wait()
            code = None
        size = output.seek(0, os.SEEK_END)
        output.seek(max(size - SAID_BYTES, 0))
        lines = [plain(line) for line in output.read().decode("utf-8", "replace").splitlines()]
    said = [line for line in lines if line][-SAID_LINES:]
    if code != 0:
        how = f"returned {code}" if code is not None else f"was killed after {COMMAND_S:g} s"
        raise NotSent(f"command: {plain(argv[0])} {how}" + (f": {said[-1]}" if said else ""))
    return said
