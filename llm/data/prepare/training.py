"""A tokenizer that is trained on a sample of the input, before anything becomes tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

from llm.data.prepare.filters import is_validation
from llm.data.prepare.found import Part
from llm.data.prepare.unit import TRAINED, Job, Progress, part_path
from llm.utils.config import ConfigError

UNITS = 64  # that the sample is taken from


def train(job: Job, _item: int, progress: Progress) -> None:
    """Write the tokenizer's file and the record."""
    from llm.data.tokenizer_training import train_bpe

    assert job.config.train_tokenizer is not None
    data = train_bpe(sample(job, progress), job.config.train_tokenizer)
    job.storage.replace(TRAINED, data)
    job.storage.replace(part_path("tokenizer", 0), msgspec.json.encode({"plan": job.digest}))


def sample(job: Job, progress: Progress) -> Iterator[str]:
    """Texts of the training split, chosen by their hashes, from units chosen by theirs: at most ``tokenizer_mb``."""
    units = sorted(range(len(job.plan.units)), key=lambda unit: _order(job.config.seed, unit))[:UNITS]
    share = job.config.tokenizer_mb * 1e6 / max(len(units), 1)
    nothing = True
    for unit in units:
        part = Part(plan=job.digest, unit=unit)
        taken = 0
        wanted = min(1.0, share / max(job.plan.unit_bytes(unit), 1))
        for document in job.documents(unit, part, progress):
            chosen = int.from_bytes(document.digest[8:], "little") < wanted * 2.0**64
            if not chosen or is_validation(document.digest, job.config.validation):
                continue
            if taken >= share:
                break
            taken += len(document.data)
            nothing = False
            yield document.text
    if nothing:
        raise ConfigError("prepare.train_tokenizer: the input holds no text to train on; look at the filters")


def _order(seed: int, unit: int) -> bytes:
    return hashlib.blake2b(f"{seed} {unit}".encode(), digest_size=8).digest()
