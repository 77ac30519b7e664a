"""A run store in a folder of another host, and that host's commands: one connection of the system's ssh for both."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmops.errors import ClusterError, UserError
from llmops.runs.ahead import Ahead, Read
from llmops.runs.store import Store, check_path
from llmops.ssh.address import SCHEME, Address, parse, parse_url
from llmops.ssh.command import is_interactive
from llmops.ssh.session import Lost, Session

ANSWER_S = 60.0
AT_ONCE = 64  # run directories that are read in one request
# What the host runs, in the order in which they import each other.
SENT = ("llmops", "llmops.errors", "llmops.ssh", "llmops.runs", "llmops.runs.store", "llmops.runs.far")


class Host:
    """A host that is connected to when it is first asked, and once more when the connection is lost."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.requests = self.connections = 0  # that were made so far
        self._lock = threading.Lock()
        self._session: Session | None = None

    def _connected(self) -> Session:
        with self._lock:
            if self._session is None or not self._session.alive:
                # Later, somebody else may have the terminal: a screen full of runs.
                interactive = self.connections == 0 and is_interactive()
                self._session = Session(self.address, _modules(), interactive)
                self.connections += 1
            return self._session

    @property
    def home(self) -> str:
        """The user's folder there."""
        return str(self._connected().greeting["home"])

    def absolute(self, path: str) -> str:
        """A path there: ``/~`` at its beginning is the home."""
        return self.home + path[2:] if path == "/~" or path.startswith("/~/") else path

    def ask(
        self, op: str, data: bytes = b"", *, once: bool = False, timeout_s: float = ANSWER_S, **fields: Any
    ) -> tuple[Any, bytes]:
        """Value and data of a request. ``once``: never sent again, since twice would not be the same as once.

        Raises :class:`Lost` when it was not answered, and what went wrong at the other end as it is raised here.
        """
        answer: dict[str, Any] = {}
        for again in (False, True):
            session = self._connected()
            self.requests += 1
            try:
                answer, found = session.ask({**fields, "op": op, "again": again}, data, timeout_s)
                break
            except Lost:
                if again or once:
                    raise
        if "value" in answer:
            return answer["value"], found
        if "missing" in answer:
            raise FileNotFoundError(answer["missing"])
        if "os" in answer:
            number, text, name = answer["os"]
            raise OSError(number, text, f"{self.address}:{name}" if name else str(self.address))
        raise (UserError if answer["user"] else ClusterError)(f"{self.address}: {answer['error']}")

    def run(
        self,
        argv: Sequence[str],
        data: bytes = b"",
        *,
        env: Mapping[str, str] | None = None,
        dropped: Sequence[str] = (),
        hidden: Sequence[str] = (),
        timeout_s: float,
        once: bool,
    ) -> tuple[int, bytes, bytes]:
        """Exit code, output and errors of a command; 124 when it did not end in time, 127 when there is none.

        Its environment is that of a login, with ``env``, without ``hidden`` and what begins with one of ``dropped``.
        """
        options = {"env": dict(env or {}), "dropped": list(dropped), "hidden": list(hidden), "timeout": timeout_s}
        value, both = self.ask("run", data, once=once, timeout_s=timeout_s + 30, argv=list(argv), **options)
        return value["code"], both[: value["output"]], both[value["output"] :]


@functools.cache
def _host(address: Address) -> Host:
    return Host(address)


def connect(name: str, what: str = "cluster.host") -> Host:
    """The host called ``name``; not contacted yet. All who ask for it in this process share one session."""
    return _host(parse(name, what))


@functools.cache
def _modules() -> list[tuple[str, str]]:
    """Names and sources."""
    found = []
    for name in SENT:
        spec = find_spec(name)
        found.append((name, Path(str(spec and spec.origin)).read_text(encoding="utf-8")))
    return found


class SshStore:
    """A folder of a host, as :class:`~llmops.runs.store.PosixStore` has it there."""

    def __init__(self, host: Host, root: str) -> None:
        self.host = host
        self._root = root

    @classmethod
    def open(cls, url: str) -> SshStore:
        """Does not contact the host. Raises ``UserError`` for what is no URL of this kind."""
        address, path = parse_url(url)
        return cls(_host(address), path)

    def __repr__(self) -> str:
        return f"SshStore({self.url!r})"

    @property
    def url(self) -> str:
        return f"{SCHEME}{self.host.address}{self._root}"

    @property
    def job_url(self) -> str:
        return self.host.absolute(self._root)

    @property
    def login(self) -> str | None:
        return str(self.host.address)

    @property
    def local_path(self) -> Path | None:
        return None

    def put(self, path: str, data: bytes) -> None:
        self._ask("put", _object(path), data)

    def create(self, path: str, data: bytes, mode: int = 0o644) -> bool:
        return bool(self._ask("create", _object(path), data, mode=mode)[0])

    def get(self, path: str) -> bytes:
        return self._ask("get", path)[1]

    def read(self, path: str, start: int, end: int | None = None) -> bytes:
        return self._ask("read", path, start=start, end=end)[1]

    def list(self, path: str = "") -> list[str]:
        return [str(name) for name in self._ask("list", path)[0]]

    def size(self, path: str) -> int:
        return int(self._ask("size", path)[0])

    def exists(self, path: str) -> bool:
        return bool(self._ask("exists", path)[0])

    def sub(self, path: str) -> SshStore:
        return SshStore(self.host, f"{self._root}/{check_path(path)}" if path else self._root)

    def ahead(self, folders: Sequence[str]) -> Store:
        read = Read()
        for first in range(0, len(folders), AT_ONCE):
            chosen = list(folders[first : first + AT_ONCE])
            found, data = self.host.ask("ahead", root=self.job_url, folders=chosen)
            read.names.update(found["names"])
            read.sizes.update(found["sizes"])
            done = 0
            for path, start, length in found["parts"]:
                read.parts.setdefault(path, []).append((start, data[done : done + length]))
                done += length
        return Ahead(self, read)

    def _ask(self, op: str, path: str, data: bytes = b"", **fields: Any) -> tuple[Any, bytes]:
        check_path(path)
        return self.host.ask(op, data, root=self.job_url, path=path, **fields)


def _object(path: str) -> str:
    if not path:
        raise ValueError("an object needs a name")
    return path
