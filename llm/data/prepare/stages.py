"""What is done before what. The items of a stage are independent of each other; the next stage needs all of them."""

from __future__ import annotations

from collections.abc import Callable

from llm.data.prepare.duplicates import compare_bucket, hash_unit
from llm.data.prepare.plan import PARTS, Plan
from llm.data.prepare.training import train
from llm.data.prepare.unit import Job, Progress, prepare_unit
from llm.utils.config import PrepareConfig
from llm.utils.storage import Storage

STAGES: dict[str, Callable[[Job, int, Progress], None]] = {
    "tokenizer": train,
    "hashes": hash_unit,
    "duplicates": compare_bucket,
    "units": prepare_unit,
}


def stages(config: PrepareConfig, plan: Plan) -> list[tuple[str, int]]:
    """The stages of a preparation in order, and how many items each has."""
    chosen = [("tokenizer", 1)] if config.train_tokenizer is not None else []
    if config.deduplicate:
        chosen += [("hashes", len(plan.units)), ("duplicates", plan.buckets)]
    return [*chosen, ("units", len(plan.units))]


def done(storage: Storage, stage: str) -> set[int]:
    """Items of a stage that have a record."""
    names = storage.list(f"{PARTS}/{stage}")
    return {int(name.removesuffix(".json")) for name in names if name.endswith(".json")}
