"""The copy of a rank's state that is being saved: one reusable buffer in memory shared with the writer process."""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint.format import ITEMSIZE
from llm.checkpoint.image import Box, FileImage, staging_bytes
from llm.train.pieces import DTYPES


class Staging:
    """As large as what this rank saves, or twice that with snapshots: a save that finds it in use waits.

    On CUDA the copy runs on a stream of its own, into pinned memory, while the next forward and backward go on;
    :meth:`fence` must be called before the weights change.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Not /dev/shm: a container's is often 64 MB. This is memory that only who has the descriptor can see.
        self.descriptor = os.memfd_create("checkpoint", os.MFD_CLOEXEC)
        self._cuts: list[tuple[int, tuple[slice, ...]]] = []  # (box, what of it)
        self._views: list[list[Tensor]] = []  # of each slot, where each cut goes
        self._warm: threading.Thread | None = None
        self._pinned: Tensor | None = None
        cuda: Any = torch.cuda  # untyped in parts
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._copied = cuda.Event() if device.type == "cuda" else None

    def prepare(self, boxes: Sequence[Box], files: Sequence[FileImage], slots: int = 1) -> None:
        """Make room for ``slots`` times ``files``; touched in the background: no step pays for its first use."""
        self._settle()
        size = staging_bytes(files)
        os.ftruncate(self.descriptor, 0)
        os.ftruncate(self.descriptor, size * slots)
        self._cuts, self._views = [], [[] for _ in range(slots)]
        if not size:
            return
        whole = torch.frombuffer(mmap.mmap(self.descriptor, size * slots), dtype=torch.uint8)
        if self.device.type == "cuda":
            self._pin(whole)
        for file in files:
            for slot in file.slots:
                dtype = boxes[slot.box].dtype
                length = math.prod(slot.shape) * ITEMSIZE[dtype]
                cut = tuple(slice(at, at + count) for at, count in zip(slot.within, slot.shape, strict=True))
                self._cuts.append((slot.box, cut))
                for number, views in enumerate(self._views):
                    begin = number * size + file.position + slot.begin
                    views.append(whole[begin : begin + length].view(DTYPES[dtype]).view(slot.shape))
        self._warm = threading.Thread(target=whole.zero_, daemon=True)
        self._warm.start()

    @torch.no_grad()
    def copy(self, data: Sequence[Tensor], slot: int = 0) -> None:
        """Take ``data``, one tensor per box, into a slot."""
        self._settle()
        sources = [data[box][cut] for box, cut in self._cuts]
        targets = self._views[slot]
        if self._stream is None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            return
        assert self._copied is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            self._copied.record(self._stream)

    def done(self) -> bool:
        """Is the copy complete?"""
        return self._copied is None or bool(self._copied.query())

    def fence(self) -> None:
        """Let the GPU's own queue wait for the copy: what is launched next may change the tensors."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)

    def wait(self) -> None:
        """Wait until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def _pin(self, whole: Tensor) -> None:
        """Page-lock the buffer: only then do copies from the GPU run beside other work, and at full speed."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if self._pinned is not None:
            runtime.cudaHostUnregister(self._pinned.data_ptr())
        if code := int(runtime.cudaHostRegister(whole.data_ptr(), whole.numel(), 0)):
            raise MemoryError(f"cannot pin {whole.numel()} bytes of host memory for checkpoints: CUDA error {code}")
        self._pinned = whole

    def _settle(self) -> None:
        if self._warm is not None:
            self._warm.join()
            self._warm = None
