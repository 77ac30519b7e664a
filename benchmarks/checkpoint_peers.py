"""What a rank does for the benchmark without us: stock torch.distributed.checkpoint, and copies of the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_ranks import Rank
from checkpoint_store import BUCKET, client
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

CONNECTIONS, OBJECT = 8, 8 << 20


# --- stock DCP -------------------------------------------------------------------------------------------------------


def _writer(url: str, **options: Any) -> Any:
    return FsspecWriter(url, **options) if "://" in url else dcp.FileSystemWriter(url, **options)


def dcp_save(rank: Rank, url: str, **options: Any) -> float:
    """As it comes, or with ``options`` of its writer."""
    with rank.clock() as taken:
        dcp.save(rank.state, storage_writer=_writer(url, **options))
    return taken[0]


def dcp_small(rank: Rank, url: str) -> None:
    """A checkpoint of one number."""
    dcp.save({"one": torch.ones(1)}, storage_writer=_writer(url))


def dcp_load(rank: Rank, url: str) -> float:
    """As it comes."""
    with rank.restored(), rank.clock() as taken:
        dcp.load(rank.state, storage_reader=FsspecReader(url) if "://" in url else dcp.FileSystemReader(url))
    return taken[0]


def dcp_begin(rank: Rank, url: str, kind: str = "THREAD", reuse: bool = False) -> Callable[[], bool]:
    """async_save, with its own collectives apart; the function tells whether it is over."""
    if reuse and "stager" not in rank.kept:
        rank.kept["stager"] = DefaultStager(StagingOptions(False, False, False, False))
    future: Any = dcp.async_save(
        rank.state,
        storage_writer=_writer(url),
        process_group=rank.aside,
        async_checkpointer_type=AsyncCheckpointerType[kind],
        async_stager=rank.kept["stager"] if reuse else None,
    )
    rank.kept["future"] = future

    def over() -> bool:
        if future.done():
            future.result()
            return True
        return False

    return over


def dcp_blocked(rank: Rank, url: str, reuse: bool = False) -> float:
    """The call of async_save; the save ends before this returns."""
    with rank.clock() as taken:
        dcp_begin(rank, url, reuse=reuse)
    rank.kept["future"].result()
    return taken[0]


# --- copies ----------------------------------------------------------------------------------------------------------


def memcpy(rank: Rank) -> float:
    """The state into memory that has been used before."""
    if "copy" not in rank.kept:
        rank.kept["copy"] = [each.clone() for each in rank.mine]
    sources = rank.mine
    with rank.clock() as taken:
        for target, source in zip(rank.kept["copy"], sources, strict=True):
            target.copy_(source)
    return taken[0]


def raw_save(rank: Rank, folder: str) -> float:
    """Write and fsync."""
    data = memoryview(rank.bytes_of_state().numpy())
    with rank.clock() as taken:
        descriptor = os.open(f"{folder}/raw{rank.world.rank}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        done = 0
        while done < len(data):
            done += os.write(descriptor, data[done:])
        os.fsync(descriptor)
        os.close(descriptor)
        dist.barrier()
    return taken[0]


def raw_load(rank: Rank, folder: str, warm: bool = False) -> float:
    """This rank's share of all the bytes that :func:`raw_save` wrote; ``warm``: into memory that was used before."""
    files = sorted(Path(folder).iterdir())
    sizes = [file.stat().st_size for file in files]
    target = memoryview(rank.bytes_of_state().numpy())
    at = sum(sizes) * rank.world.rank // rank.world.size
    end = min(sum(sizes) * (rank.world.rank + 1) // rank.world.size, at + len(target))
    with rank.clock() as taken:
        kept: list[bytes] = []
        begin = done = 0
        for file, size in zip(files, sizes, strict=True):
            if begin < end and begin + size > at:
                descriptor = os.open(file, os.O_RDONLY)
                if not warm:
                    kept.append(os.pread(descriptor, min(end, begin + size) - at, at - begin))
                    at += len(kept[-1])
                while at < min(end, begin + size):
                    count = os.preadv(descriptor, [target[done : done + min(end, begin + size) - at]], at - begin)
                    at, done = at + count, done + count
                os.close(descriptor)
            begin += size
        dist.barrier()
    return taken[0]


def raw_upload(rank: Rank, prefix: str) -> float:
    """Objects of 8 MiB over 8 connections, as boto3 sends them: signed, with its checksum."""
    s3, pool = _client(rank)
    data = memoryview(rank.bytes_of_state().numpy())
    bodies = [bytes(data[at : at + OBJECT]) for at in range(0, len(data), OBJECT)]
    keys = [f"{prefix}/{rank.world.rank}-{number:03d}" for number in range(len(bodies))]
    with rank.clock() as taken:
        list(pool.map(lambda key, body: s3.put_object(Bucket=BUCKET, Key=key, Body=body), keys, bodies))
        dist.barrier()
    return taken[0]


def raw_download(rank: Rank, prefix: str, warm: bool = False) -> float:
    """This rank's share of what :func:`raw_upload` sent, as boto3 gets it; ``warm``: into used memory."""
    s3, pool = _client(rank)
    target = memoryview(rank.bytes_of_state().numpy())
    objects = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix + "/")["Contents"]
    total = sum(each["Size"] for each in objects)
    at = total * rank.world.rank // rank.world.size
    end = min(total * (rank.world.rank + 1) // rank.world.size, at + len(target))
    parts, begin = [], 0
    for each in objects:
        first, last = max(at, begin), min(end, begin + each["Size"])
        if first < last:
            parts.append((each["Key"], first - begin, last - begin, target[first - at : last - at]))
        begin += each["Size"]

    def get(part: tuple[str, int, int, memoryview]) -> bytes:
        key, first, last, into = part
        body = s3.get_object(Bucket=BUCKET, Key=key, Range=f"bytes={first}-{last - 1}")["Body"]
        if not warm:
            return body.read()
        done = 0
        while count := body.readinto(into[done:]):
            done += count
        return b""

    with rank.clock() as taken:
        kept = list(pool.map(get, parts))
        dist.barrier()
    del kept
    return taken[0]


def _client(rank: Rank) -> Sequence[Any]:
    if "client" not in rank.kept:
        rank.kept["client"] = client(dict(os.environ), CONNECTIONS), ThreadPoolExecutor(CONNECTIONS)
    return rank.kept["client"]
