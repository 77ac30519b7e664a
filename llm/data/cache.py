"""Whole shards of datasets in object stores, kept on a node's own disk within a bound, for all ranks and runs there.

Training reads samples in random order: as long as a shard is not here, the few kilobytes that a sample needs are read
from the store alone, so nobody waits for a download. A thread brings shards in the meantime, if all of them fit.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm.data.format import DataError, Index, Shard, blocks_of, record, verified
from llm.utils.config import ConfigError, DataConfig
from llm.utils.storage import Storage

CLOSE_S = 10.0  # for the shard in hand when a run ends


def cache_folder(config: DataConfig) -> Path | None:
    """Where shards are kept on this node: ``data.cache_dir``, or a folder of this user's own among temporary files.

    None where nothing is to be kept, or that folder is somebody else's. Raises ConfigError for one that was named and
    cannot be made.
    """
    if not config.cache_gb:
        return None
    if config.cache_dir is not None:
        try:
            Path(config.cache_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache_dir={config.cache_dir} cannot be made: {error}") from error
        return Path(config.cache_dir)
    folder = Path(tempfile.gettempdir()) / f"llm-data-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        print(f"note: no shards are kept on this node: {error}", file=sys.stderr, flush=True)
        return None
    return folder if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() else None


class ShardCache:
    """The copies of a dataset's ``shards`` below ``folder``. ``limit`` bytes bound what is there of all datasets.

    ``count`` is the number of these shards, ``bytes`` the size of all of them.
    """

    def __init__(self, folder: Path, limit: int, storage: Storage, index: Index, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self.folder, self.limit = folder / index.fingerprint(), limit
        self.count = len(self._shards)
        self._root = folder
        self._storage, self._index = storage, index
        self._size = record(index.dtype, index.loss).itemsize
        self.bytes = sum(blocks_of(shard.tokens) for shard in shards) * self._size
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def find(self, shard: Shard) -> Path | None:
        """The copy of a shard; None where there is none yet."""
        path = self.folder / shard.name
        return path if path.exists() else None

    def drop(self, shard: Shard) -> None:
        """Remove the copy of a shard."""
        (self.folder / shard.name).unlink(missing_ok=True)

    def fill(self, turn: int, of: int) -> None:
        """Bring all shards in the background; ranks of one node begin at different places."""
        first = len(self._shards) * turn // max(of, 1)
        ordered = [*self._shards[first:], *self._shards[:first]]
        self._thread = threading.Thread(target=self._fill, args=(ordered,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Bring no more; the shard in hand is finished, or given up."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _fill(self, shards: list[Shard]) -> None:
        try:
            for shard in shards:
                if self._stop.is_set() or not self._bring(shard):
                    return
        except (OSError, DataError) as error:  # whoever needs the shard meets the same, and says so
            print(f"note: no more shards are kept in {self.folder}: {error}", file=sys.stderr, flush=True)

    def _bring(self, shard: Shard) -> bool:
        """Download one shard unless it is here, or another rank is at it. False: there is no room for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / shard.name
        with _locked(self.folder / f".{shard.name}.lock", wait=False) as mine:
            if not mine:
                return True
            if target.exists():
                os.utime(target)  # in use
                return True
            size = blocks_of(shard.tokens) * self._size
            with _locked(self._root / ".lock", wait=True):
                if not self._make_room(size):
                    return False
            data = bytearray(size)
            done = self._storage.read_into(shard.name, 0, [memoryview(data)])
            verified(memoryview(data)[:done], self._index, shard, 0, f"{self._storage.url}/{shard.name}")
            aside = self.folder / f".{shard.name}.{os.getpid()}"
            try:
                aside.write_bytes(data)
                aside.replace(target)
            finally:
                aside.unlink(missing_ok=True)
        return True

    def _make_room(self, size: int) -> bool:
        """Remove what other datasets left longest unused until ``size`` more bytes fit."""
        found = []
        for path in self._root.glob("*/*"):
            if path.suffix == ".lock":
                continue
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(each for _, each, _ in found)
        for _, each, path in sorted(found):
            if total + size <= self.limit:
                break
            if path.parent != self.folder:
                path.unlink(missing_ok=True)
                total -= each
        return total + size <= self.limit


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock among the processes of this node; yields whether it is held."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
