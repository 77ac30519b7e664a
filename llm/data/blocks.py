"""Blocks of a dataset's shards, checked, from wherever they lie: a local folder, a cache of it, or an object store."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from llm.data.cache import ShardCache
from llm.data.format import DataError, Index, Shard, record, verified
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import Storage

OPEN = 64  # files that stay open


class _File:
    """A descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Blocks:
    """Reads blocks. Safe to use in threads; takes no memory that grows with the dataset.

    Files are read, not mapped: one that is cut off under a running job is an error here, and a fatal signal there.
    """

    def __init__(self, storage: Storage, index: Index, cache: ShardCache | None = None) -> None:
        self.storage, self.index, self.cache = storage, index, cache
        self.local = isinstance(storage, LocalStorage)
        self._size = record(index.dtype, index.loss).itemsize
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._copied: set[str] = set()  # shards that the cache was seen to have
        self._lock = threading.Lock()

    @property
    def near(self) -> bool:
        """Does no block have to come from a store, as far as is known?"""
        return self.local or (self.cache is not None and len(self._copied) == self.cache.count)

    def read(self, shard: Shard, first: int, count: int) -> NDArray[Any]:
        """Records ``first`` … of a shard. Raises DataError for what is missing or damaged, OSError for a store that
        does not answer."""
        where = f"{self.storage.url}/{shard.name}"
        file = self._file(shard)
        if file is not None:
            try:
                found = os.pread(file.descriptor, count * self._size, first * self._size)
                return verified(found, self.index, shard, first, where)
            except DataError:
                if self.cache is None:
                    raise
                self.cache.drop(shard)  # the copy is damaged, not the dataset
                with self._lock:
                    self._files.pop(shard.name, None)
                    self._copied.discard(shard.name)
        data = bytearray(count * self._size)
        try:
            done = self.storage.read_into(shard.name, first * self._size, [memoryview(data)])
        except FileNotFoundError as error:
            raise DataError(f"{where} is missing, but its index lists it: copy or prepare the dataset anew") from error
        return verified(memoryview(data)[:done], self.index, shard, first, where)

    def _file(self, shard: Shard) -> _File | None:
        """The local file of a shard, or of its copy in the cache; None: ask the store."""
        with self._lock:
            file = self._files.get(shard.name)
            if file is not None:
                self._files.move_to_end(shard.name)
                return file
        if isinstance(self.storage, LocalStorage):
            path: Path | None = self.storage.path(shard.name)
        else:
            path = self.cache.find(shard) if self.cache is not None else None
        if path is None:
            return None
        try:
            file = _File(path)
        except FileNotFoundError:
            if self.local:
                raise DataError(
                    f"{path} is missing, but its index lists it: copy or prepare the dataset anew"
                ) from None
            with self._lock:
                self._copied.discard(shard.name)
            return None  # somebody has just made room in the cache
        with self._lock:
            self._files[shard.name] = file
            if not self.local:
                self._copied.add(shard.name)
            while len(self._files) > OPEN:
                self._files.popitem(last=False)
        return file
