"""Writing a directory that torch.distributed.checkpoint.load reads, without the whole state in memory."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from llm.tools.dcp_import import STATE
from llm.tools.dcp_metadata import METADATA
from llm.tools.destination import REMOTE_FILE, Folder, new_folder
from llm.tools.export import Exported

VERSION = "1.0.0"  # of DCP's files, as its own writer marks them


def export_dcp(source: Exported, names: Sequence[str], target: str) -> None:
    """Tensors under their names, and the state as a text of JSON called ``state.json``.

    Memory: 512 MiB of tensors and, for a store, a file of 256 MiB.
    """
    with new_folder(target) as folder:
        writer = _Writer(folder)
        writer.add_value(STATE, json.dumps(source.manifest.state))
        for part, data in source.read(names):
            writer.add_chunk(part.name, source.tensors[part.name].shape, part.offset, data)
        writer.close()
        with folder.file(METADATA, last=True) as sink:
            sink.write(pickle.dumps(writer.metadata(), protocol=4))


class _Writer:
    """Files of bounded size, each a row of what torch.save makes of one chunk."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.entries: dict[str, Any] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}
        self.files = 0
        self.pending: list[io.BytesIO] = []
        self.size = 0

    def add_value(self, name: str, value: object) -> None:
        self.entries[name] = BytesStorageMetadata()
        self._put(MetadataIndex(name), value)

    def add_chunk(self, name: str, shape: Sequence[int], offset: Sequence[int], data: torch.Tensor) -> None:
        entry = self.entries.get(name)
        if entry is None:
            properties = TensorProperties(dtype=data.dtype)
            entry = self.entries[name] = TensorStorageMetadata(properties, torch.Size(shape), [])
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), data.shape))
        self._put(MetadataIndex(name, offset, len(entry.chunks) - 1), data)

    def close(self) -> None:
        """Write what is pending."""
        if self.pending:
            with self.folder.file(self._name()) as sink:
                for stream in self.pending:
                    sink.write(stream.getbuffer())
            self.files += 1
        self.pending, self.size = [], 0

    def metadata(self) -> Metadata:
        return Metadata(
            state_dict_metadata=self.entries,
            planner_data={name: (name,) for name in self.entries},
            storage_data=self.places,
            storage_meta=StorageMeta(),
            version=VERSION,
        )

    def _name(self) -> str:
        return f"__0_{self.files}.distcp"

    def _put(self, index: MetadataIndex, value: object) -> None:
        stream = io.BytesIO()
        torch.save(value, stream)
        if self.pending and self.size + len(stream.getbuffer()) > REMOTE_FILE:
            self.close()
        self.places[index] = _StorageInfo(self._name(), self.size, len(stream.getbuffer()))
        self.pending.append(stream)
        self.size += len(stream.getbuffer())
