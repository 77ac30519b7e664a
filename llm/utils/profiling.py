"""Where time and memory go: torch's profiler on chosen steps, and the allocator's history when a GPU is full."""

from __future__ import annotations

import gzip
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llm.utils.config import ProfileConfig
from llm.utils.storage import Storage

TOP = 30  # operators in a table
HISTORY = 100_000  # allocations that are remembered


class Profiler:
    """Writes into ``profiles/<attempt>/``, on rank ``profile.rank``; on other ranks it does nothing.

    Of each chosen step ``step_<N>.rank<R>.trace.json.gz``, for Perfetto, and ``step_<N>.rank<R>.txt``, the operators
    that took most. A profiled step is slower than others. What cannot be written is a warning.
    """

    def __init__(self, config: ProfileConfig, rank: int, device: torch.device, storage: Storage, attempt: int) -> None:
        self._steps = frozenset(config.steps) if rank == config.rank else frozenset()
        self._rank, self._device, self._storage = rank, device, storage
        self._folder = f"profiles/{attempt:04d}"
        self._memory = config.memory and device.type == "cuda"
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)

    def wants(self, step: int) -> bool:
        """Is ``step`` to be recorded here?"""
        return step in self._steps

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Record what runs inside as ``step``, if it is wanted, and write it down."""
        if not self.wants(step):
            yield
            return
        from torch.profiler import ProfilerActivity, profile

        cuda = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities, record_shapes=True, profile_memory=True) as recorded:
            yield
            if cuda:
                torch.cuda.synchronize(self._device)  # its kernels belong to it
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=TOP, max_name_column_width=80)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(file))
            trace = gzip.compress(file.read_bytes(), compresslevel=1)
        name = f"step_{step:08d}.rank{self._rank:05d}"
        self._put(f"{name}.txt", table.encode())
        self._put(f"{name}.trace.json.gz", trace)

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Out of GPU memory inside: write what held it into ``out_of_memory.rank<R>.pickle`` for every such rank.

        pytorch.org/memory_viz shows the file. The error goes on.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            if self._memory:
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "snapshot.pickle"
                    torch.cuda.memory._dump_snapshot(str(file))  # type: ignore[no-untyped-call]
                    self._put(f"out_of_memory.rank{self._rank:05d}.pickle", file.read_bytes())
            raise

    def _put(self, name: str, data: bytes) -> None:
        path = f"{self._folder}/{name}"
        try:
            self._storage.replace(path, data)
        except OSError as error:
            print(f"warning: {path} was not written: {error}", file=sys.stderr, flush=True)
        else:
            print(f"wrote {path}", flush=True)
