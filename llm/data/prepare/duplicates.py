"""Documents that are there twice, wherever they are: the first one, in the order of the input, stays.

Each unit writes the hashes of its documents, bucket by bucket; each bucket, which fits into memory, says which ordinals
of which unit are repetitions. So nobody ever holds all hashes.
"""

from __future__ import annotations

import msgspec
import numpy as np

from llm.data.prepare.found import Part
from llm.data.prepare.plan import PARTS
from llm.data.prepare.unit import Job, Progress, part_path

HASH = np.dtype([("low", "<u8"), ("high", "<u8"), ("ordinal", "<u4")])


def hash_unit(job: Job, unit: int, progress: Progress) -> None:
    """Write the hashes of a unit's documents: an offset for each bucket and one more, then the buckets."""
    digests, buckets = bytearray(), job.plan.buckets
    count = 0
    for document in job.documents(unit, Part(plan=job.digest, unit=unit), progress):
        digests += document.digest
        count += 1
    words = np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)
    found = np.zeros(count, HASH)
    found["low"], found["high"], found["ordinal"] = words[:, 0], words[:, 1], np.arange(count)
    # By its other half: the first one has chosen the split.
    bucket = (found["high"] % buckets).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=buckets))]).astype("<u8")
    path = f"{PARTS}/hashes/{unit:05}.bin"
    job.storage.replace(path, offsets.tobytes() + found[np.argsort(bucket, kind="stable")].tobytes())
    job.storage.replace(part_path("hashes", unit), msgspec.json.encode({"plan": job.digest}))


def compare_bucket(job: Job, bucket: int, progress: Progress) -> None:
    """Write which ordinals are repetitions: an offset for each unit and one more, then the units' ordinals."""
    units = len(job.plan.units)
    parts, counts = [], np.zeros(units, np.int64)
    for unit in range(units):
        path = f"{PARTS}/hashes/{unit:05}.bin"
        first, last = _offsets(job, path, bucket)
        base = 8 * (job.plan.buckets + 1)
        start, end = base + first * HASH.itemsize, base + last * HASH.itemsize
        parts.append(np.frombuffer(job.storage.read(path, start, end) if last > first else b"", HASH))
        counts[unit] = len(parts[-1])
        progress(0, 0)
    found = np.concatenate(parts)
    owners = np.repeat(np.arange(units), counts)
    order = np.lexsort((found["high"], found["low"]))  # stable: of equal ones the first stays first
    sorted_ = found[order]
    again = np.flatnonzero((sorted_["low"][1:] == sorted_["low"][:-1]) & (sorted_["high"][1:] == sorted_["high"][:-1]))
    repeated = np.sort(order[again + 1])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners[repeated], minlength=units))]).astype("<u8")
    ordinals = found["ordinal"][repeated].astype("<u4")
    job.storage.replace(f"{PARTS}/duplicates/{bucket:05}.bin", offsets.tobytes() + ordinals.tobytes())
    job.storage.replace(part_path("duplicates", bucket), msgspec.json.encode({"plan": job.digest}))


def dropped_of(job: Job, unit: int) -> frozenset[int]:
    """Ordinals of a unit's documents that are repetitions."""
    dropped: list[int] = []
    base = 8 * (len(job.plan.units) + 1)
    for bucket in range(job.plan.buckets):
        path = f"{PARTS}/duplicates/{bucket:05}.bin"
        first, last = _offsets(job, path, unit)
        if last > first:
            dropped += np.frombuffer(job.storage.read(path, base + 4 * first, base + 4 * last), "<u4").tolist()
    return frozenset(dropped)


def _offsets(job: Job, path: str, index: int) -> tuple[int, int]:
    first, last = np.frombuffer(job.storage.read(path, 8 * index, 8 * index + 16), "<u8").tolist()
    return first, last
