"""Bytes of the training text, split into a training part and a held-out tail."""

from __future__ import annotations

import gzip
import mmap
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from llm.utils.config import ConfigError

EMBEDDED = "embedded:"


@dataclass(frozen=True)
class Text:
    """``train`` and ``held_out`` follow each other in one text; ``fingerprint`` names its exact content."""

    train: memoryview
    held_out: memoryview
    fingerprint: str


def load_text(source: str, validation_fraction: float) -> Text:
    """Read ``source``: ``embedded:NAME``, a path (mapped, not read) or an fsspec URL (read into memory by every rank).

    Raises ConfigError when there is no such text.
    """
    data = _read(source)
    cut = len(data) - int(len(data) * validation_fraction)
    return Text(data[:cut], data[cut:], f"{len(data)}-{zlib.crc32(data):08x}")


def _read(source: str) -> memoryview:
    if source.startswith(EMBEDDED):
        file = resources.files("llm.data") / "corpus" / f"{source.removeprefix(EMBEDDED)}.txt.gz"
        if not file.is_file():
            raise ConfigError(f"data.source={source}: this package embeds only embedded:shakespeare")
        return memoryview(gzip.decompress(file.read_bytes()))
    if "://" in source:
        import fsspec

        try:
            with fsspec.open(source, "rb") as stream:  # type: ignore[no-untyped-call]
                return memoryview(stream.read())
        except FileNotFoundError as error:
            raise ConfigError(f"data.source={source}: there is no such object") from error
    path = Path(source)
    if not path.is_file() or not path.stat().st_size:
        raise ConfigError(f"data.source={source}: no such file, or it is empty")
    with path.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
