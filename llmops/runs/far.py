"""The other end of an SSH connection: files and commands of the host, for a launcher elsewhere.

It is sent as text with the modules that it imports, runs in the host's own Python (3.9 or later, nothing else needed),
and ends with the connection. Beside :mod:`llmops.runs.store`, standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmops.errors import ClusterError, UserError
from llmops.runs.store import ASIDE_PREFIX, PosixStore
from llmops.ssh import READY

THREADS = 16
UNREAD = ("spec.json", "secrets.json", "changes.json")  # of a submission: not needed, or nobody's business
ATTEMPTS, PARTS = 2, 2  # the newest of a run, and of their metrics, that are read ahead
WHOLE, HEAD = 1 << 16, 1 << 13  # bytes of a file
LOGIN_S = 20.0  # for the login scripts that set PATH
Answer = tuple[Any, bytes]


class Server:
    """Answers requests, several at a time, each as soon as it can be answered."""

    def __init__(self, answers: Any) -> None:
        self._answers = answers
        self._lock = threading.Lock()
        self._path: str | None = None

    def serve(self, requests: Any) -> None:
        """Until the end of ``requests``; what was begun is finished."""
        with ThreadPoolExecutor(THREADS) as pool:
            for line in requests:
                request = json.loads(line)
                data = requests.read(request["size"])
                if len(data) < request["size"]:
                    return  # the connection was lost in the middle: not to be carried out
                pool.submit(self._answer, request, data)

    def _answer(self, request: dict[str, Any], data: bytes) -> None:
        fields: dict[str, Any]
        try:
            value, data = getattr(self, f"_do_{request['op']}")(request, data)
            fields = {"value": value}
        except FileNotFoundError as error:
            fields, data = {"missing": str(error)}, b""
        except (UserError, ClusterError) as error:
            fields, data = {"error": str(error), "user": isinstance(error, UserError)}, b""
        except OSError as error:
            told = [error.errno or 0, error.strerror or str(error), os.fsdecode(error.filename or "")]
            fields, data = {"os": told}, b""
        except Exception as error:  # noqa: BLE001 - the one who asked is told, and not left waiting
            fields, data = {"error": f"{type(error).__name__}: {error}", "user": False}, b""
        with self._lock, contextlib.suppress(BrokenPipeError):  # nobody is left to be told
            self._answers.write(json.dumps({**fields, "id": request["id"], "size": len(data)}).encode() + b"\n" + data)
            self._answers.flush()

    def _do_put(self, request: dict[str, Any], data: bytes) -> Answer:
        _store(request).put(request["path"], data)
        return None, b""

    def _do_create(self, request: dict[str, Any], data: bytes) -> Answer:
        store = _store(request)
        if store.create(request["path"], data, request["mode"]):
            return True, b""
        # Asked again after a lost answer, it may be ours.
        return request["again"] and store.get(request["path"]) == data, b""

    def _do_get(self, request: dict[str, Any], data: bytes) -> Answer:
        return None, _store(request).get(request["path"])

    def _do_read(self, request: dict[str, Any], data: bytes) -> Answer:
        return None, _store(request).read(request["path"], request["start"], request["end"])

    def _do_list(self, request: dict[str, Any], data: bytes) -> Answer:
        return _store(request).list(request["path"]), b""

    def _do_size(self, request: dict[str, Any], data: bytes) -> Answer:
        return _store(request).size(request["path"]), b""

    def _do_exists(self, request: dict[str, Any], data: bytes) -> Answer:
        return _store(request).exists(request["path"]), b""

    def _do_sizes(self, request: dict[str, Any], data: bytes) -> Answer:
        """Of all in a folder, None for folders; empty where there is none."""
        found: dict[str, int | None] = {}
        try:
            with os.scandir(Path(request["root"], request["path"])) as entries:
                for entry in entries:
                    if not entry.name.startswith(ASIDE_PREFIX):
                        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                            found[entry.name] = None if entry.is_dir() else entry.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return {}, b""
        return found, b""

    def _do_remove(self, request: dict[str, Any], data: bytes) -> Answer:
        Path(request["root"], request["path"]).unlink(missing_ok=True)
        return None, b""

    def _do_remove_folder(self, request: dict[str, Any], data: bytes) -> Answer:
        folder = Path(request["root"], request["path"])
        with contextlib.suppress(FileNotFoundError):
            if not request["only_empty"]:
                shutil.rmtree(folder)
            elif not os.listdir(folder):  # noqa: PTH208 - names alone
                folder.rmdir()
        return None, b""

    def _do_ahead(self, request: dict[str, Any], data: bytes) -> Answer:
        """What `llmops status` reads of run directories. What cannot be read is left out: it is asked for by itself."""
        found = _Found(Path(request["root"]))
        for folder in request["folders"]:
            found.run(folder)
        return {"names": found.names, "sizes": found.sizes, "parts": found.parts}, b"".join(found.data)

    def _do_place(self, request: dict[str, Any], data: bytes) -> Answer:
        """The file system that a path is on, from what Linux says, and whether it is a folder."""
        path = Path(request["path"])
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
        nearest = path
        while not nearest.exists():
            nearest = nearest.parent
        about = {"nearest": str(nearest.resolve()), "folder": path.is_dir(), "host": socket.gethostname()}
        return {**about, "mounts": mounts}, b""

    def _do_run(self, request: dict[str, Any], data: bytes) -> Answer:
        """A command, from its words: no shell reads them. The answer's data is its output, then its errors."""
        dropped = tuple(request["dropped"])
        env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        env.update(request["env"])
        for name in request["hidden"]:
            env.pop(name, None)
        try:
            done = self._run(request["argv"], data, env, request["timeout"])
        except subprocess.TimeoutExpired:
            return {"code": 124, "output": 0}, b""
        except FileNotFoundError:
            return {"code": 127, "output": 0}, b""
        return {"code": done.returncode, "output": len(done.stdout)}, done.stdout + done.stderr

    def _run(
        self, argv: Sequence[str], data: bytes, env: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        def run() -> subprocess.CompletedProcess[bytes]:
            program = shutil.which(argv[0], path=env.get("PATH"))
            if program is None:
                raise FileNotFoundError(argv[0])
            return subprocess.run([program, *argv[1:]], input=data, capture_output=True, timeout=timeout, env=env)

        try:
            return run()
        except FileNotFoundError:
            # Many clusters put their scheduler on PATH in what a login shell reads, and this is none.
            if self._path is None:
                self._path = _login_path()
            env["PATH"] = self._path
            return run()


class _Found:
    """Names in folders, sizes of files, and parts of their contents, one after the other in ``data``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        self.parts: list[tuple[str, int, int]] = []
        self.data: list[bytes] = []

    def run(self, folder: str) -> None:
        """One run directory: its records, and both ends of its newest metrics."""
        for name in self.list(folder):
            if name == "run.json":
                self.file(f"{folder}/{name}")
        for kind in ("job", "attempts"):
            for number in self.list(f"{folder}/{kind}"):
                for name in self.list(f"{folder}/{kind}/{number}"):
                    if name.endswith(".json") and name not in UNREAD:
                        self.file(f"{folder}/{kind}/{number}/{name}")
        for number in sorted(self.list(f"{folder}/metrics"))[-ATTEMPTS:]:
            parts = [name for name in self.list(f"{folder}/metrics/{number}") if name.endswith(".jsonl")]
            for name in sorted({*parts[:1], *parts[-PARTS:]}):
                self.file(f"{folder}/metrics/{number}/{name}")

    def list(self, path: str) -> list[str]:
        """The names in a folder, unless it cannot be read."""
        try:
            found = PosixStore(self.root).list(path)
        except (UserError, ClusterError):
            return []
        self.names[path] = found
        return found

    def file(self, path: str) -> None:
        """The whole of a small file; of a larger one its beginning, and its last blocks as they are read backwards."""
        try:
            with Path(self.root, path).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                spans = [(0, size)] if size <= WHOLE else [(0, HEAD), (size - WHOLE, WHOLE)]
                read = [(start, os.pread(file.fileno(), length, start)) for start, length in spans]
        except OSError:
            return
        if sum(length for _, length in spans) != sum(len(data) for _, data in read):
            return  # it was cut short meanwhile
        self.sizes[path] = size
        for start, data in read:
            self.parts.append((path, start, len(data)))
            self.data.append(data)


def _store(request: Mapping[str, Any]) -> PosixStore:
    return PosixStore(Path(request["root"]))


def _login_path() -> str:
    """PATH as a login shell has it; the current one where that does not say."""
    shell = os.environ.get("SHELL") or pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    command = 'echo; echo llmops-path="$PATH"'
    try:
        done = subprocess.run(
            [shell, "-l", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, timeout=LOGIN_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("PATH", "")
    found = re.findall(r"^llmops-path=(.+)$", done.stdout.decode("utf-8", "surrogateescape"), re.MULTILINE)
    return found[-1] if found else os.environ.get("PATH", "")


def main() -> None:
    """Say that this end is ready, and serve until the other one is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library or a command prints is no answer
    about = {"home": os.path.expanduser("~")}  # noqa: PTH111 - Path.home may raise
    answers.write(b"\n" + READY + json.dumps(about).encode() + b"\n")
    answers.flush()
    Server(answers).serve(sys.stdin.buffer)
