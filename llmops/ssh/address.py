"""Names of hosts, as in ``cluster.host`` and ``ssh://`` URLs. None of them can be taken for an option of ssh."""

from __future__ import annotations

import re
from typing import NamedTuple

from llmops.errors import UserError

SCHEME = "ssh://"
_HOST = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][\w.+-]*)@)?(?P<host>[A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.]+(?:%\w+)?\])(?::(?P<port>\d{1,5}))?",
    re.ASCII,
)


class Address(NamedTuple):
    """A host as ssh is told of it: a name of the user's own ssh config, or of the network."""

    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"


def parse(text: str, what: str) -> Address:
    """``[user@]host[:port]``. Raises :class:`UserError`; ``what`` names the place that it is written in."""
    found = _HOST.fullmatch(text)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or (port is not None and not 0 < port < 65536):
        raise UserError(f"{what}: {text!r} is no host; write login.example.org, user@host or host:port")
    return Address(found["host"].strip("[]"), found["user"], port)


def parse_url(url: str) -> tuple[Address, str]:
    """Host and folder of ``ssh://host/folder``; the folder is absolute, or begins with ``/~`` for the home there.

    The folder is taken as it is written: nothing in it is decoded. Raises :class:`UserError`.
    """
    host, slash, path = url.removeprefix(SCHEME).partition("/")
    address = parse(host, url)
    parts = [part for part in path.split("/") if part]
    if not slash or not parts or ".." in parts or "\0" in path:
        raise UserError(
            f"{url}: name a folder of that host, as in ssh://{address}/scratch/runs or ssh://{address}/~/runs"
        )
    return address, "/" + "/".join(parts)
