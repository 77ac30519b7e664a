"""What there is to prepare: files on paths or fsspec URLs, and the units of work that they make up."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec

from llm.utils.config import ConfigError, PrepareConfig
from llm.utils.storage import Storage, open_storage

Form = Literal["jsonl", "parquet", "text"]
Packing = Literal["", "gzip", "zstd"]
FORMS: dict[str, Form] = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet", ".pq": "parquet",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
PACKINGS: dict[str, Packing] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
FOOTERS = 16  # Parquet files asked for their row groups at a time


class InputError(ConfigError):
    """A file that cannot be read as what it is said to be."""


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input. ``version`` changes with its content where the store tells: an ETag, or the time of the last change."""

    url: str
    size: int
    version: str
    form: Form
    packing: Packing = ""


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """A part of a file: bytes ``start`` to ``end``, of Parquet row groups. Lines belong where their first byte is."""

    file: int
    start: int
    end: int


@lru_cache(maxsize=64)
def _folder(url: str) -> Storage:
    return open_storage(url)


def read(file: File, start: int, end: int) -> bytes:
    """Bytes of a file; the store's retries and time-outs are :mod:`llm.utils.object_storage`'s."""
    folder, _, name = file.url.rpartition("/")
    try:
        data = _folder(folder or "/").read(name, start, end)
    except FileNotFoundError as error:
        raise InputError(f"{file.url}: there is no such file any more") from error
    if len(data) != end - start:
        raise InputError(f"{file.url}: shorter than the {file.size} bytes that it had at the start; leave it alone")
    return data


def find(config: PrepareConfig) -> list[File]:
    """The files that ``config.input`` names, sorted within each pattern.

    Raises ConfigError: nothing is there, a file is named twice, or it is not known what it is.
    """
    if not config.input:
        raise ConfigError("prepare.input names no file: give paths, URLs or globs of them")
    found: dict[str, File] = {}
    for pattern in config.input:
        matches = sorted(_remote(pattern) if _is_remote(pattern) else _local(pattern))
        if not matches:
            raise ConfigError(f"prepare.input={pattern}: nothing matches; check the path (** goes into folders)")
        for url, size, version in matches:
            if url in found:
                raise ConfigError(f"prepare.input={pattern}: {url} is named twice; name it once")
            form, packing = _kind(url, config.format)
            found[url] = File(url=url, size=size, version=version, form=form, packing=packing)
    return list(found.values())


def units(files: list[File], config: PrepareConfig) -> list[list[Piece]]:
    """The pieces of each unit: consecutive ones up to ``config.unit_mb``; what cannot be divided may be larger."""
    most = max(int(config.unit_mb * 1e6), 1)
    made: list[list[Piece]] = []
    filled = 0
    with ThreadPoolExecutor(FOOTERS) as pool:
        for pieces in pool.map(lambda each: _pieces(each[0], each[1], config, most), enumerate(files)):
            for piece, size in pieces:
                if not made or filled + size > most:
                    made.append([])
                    filled = 0
                made[-1].append(piece)
                filled += size
    return made


def local_path(url: str) -> Path | None:
    """The path that ``url`` means; None for a URL of a store."""
    if "://" not in url:
        return Path(url).expanduser().absolute()
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme in ("file", "local") else None


def _is_remote(pattern: str) -> bool:
    return local_path(pattern) is None


def _local(pattern: str) -> Iterator[tuple[str, int, str]]:
    path = str(local_path(pattern))
    # Path.glob knows no absolute patterns.
    for name in [path] if Path(path).exists() else glob.glob(path, recursive=True):  # noqa: PTH207
        if Path(name).is_dir():
            if name == path:
                raise ConfigError(f"prepare.input={pattern} is a folder: name its files, as in {pattern}/*.jsonl")
            continue
        state = Path(name).stat()
        yield name, state.st_size, str(state.st_mtime_ns)


def _remote(pattern: str) -> Iterator[tuple[str, int, str]]:
    from llm.utils.object_storage import ObjectStorage

    protocol, _, rest = pattern.partition("://")
    head, _, tail = rest.partition("/")
    storage = ObjectStorage(f"{protocol}://{head}")
    for key, entry in storage.glob(tail).items():
        if entry["type"] == "directory":
            if not glob.has_magic(pattern):
                raise ConfigError(f"prepare.input={pattern} is a folder: name its files, as in {pattern}/*.jsonl")
            continue
        if entry.get("size") is None:
            raise ConfigError(f"prepare.input={pattern}: the server does not tell how large {key} is; download it")
        version = next((str(entry[name]) for name in ("ETag", "etag", "LastModified", "mtime") if entry.get(name)), "")
        yield storage.fs.unstrip_protocol(key), int(entry["size"]), version


def _kind(url: str, form: str) -> tuple[Form, Packing]:
    name = urlsplit(url).path if "://" in url else url
    path = Path(name.rpartition("/")[2].lower())
    packing = PACKINGS.get(path.suffix, "")
    if packing:
        path = path.with_suffix("")
    if form != "auto":
        chosen: Any = form
        return chosen, packing
    if path.suffix not in FORMS:
        raise ConfigError(
            f"{url}: its name does not say what it is ({', '.join(FORMS)}, each with .gz or .zst or without): "
            "set prepare.format to jsonl, parquet or text"
        )
    return FORMS[path.suffix], packing


def _pieces(number: int, file: File, config: PrepareConfig, most: int) -> list[tuple[Piece, int]]:
    """What a file may be divided into, with the bytes of each."""
    if file.form == "parquet":
        if file.packing:
            raise ConfigError(f"{file.url}: a compressed Parquet file cannot be read in parts: decompress it")
        if file.size <= most:
            return [(Piece(number, 0, -1), file.size)]
        from llm.data.prepare.parquet import row_groups

        return [(Piece(number, index, index + 1), size) for index, size in enumerate(row_groups(file))]
    whole = file.packing or (file.form == "text" and not config.paragraphs)
    if whole or file.size <= most:
        return [(Piece(number, 0, file.size), file.size)]
    return [
        (Piece(number, start, min(start + most, file.size)), min(most, file.size - start))
        for start in range(0, file.size, most)
    ]
