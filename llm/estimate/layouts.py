"""Layouts that a number of ranks allows, and how well they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from llm.estimate.hardware import HardwareConfig
from llm.estimate.memory import Memory, memory
from llm.estimate.timing import StepTime, step_time
from llm.utils.config import ConfigError, DistConfig, TrainConfig, check

CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    """One way to run: what it changes, what a rank needs, and how long a step takes."""

    changes: dict[str, Any]  # dotted key: value, where it differs from the configuration that was asked about
    memory: Memory
    time: StepTime

    @property
    def overrides(self) -> str:
        """The changes as they are typed."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items())


def fitting(config: Any, world_size: int, hardware: HardwareConfig) -> list[Layout]:
    """Every layout that is valid and fits, the fastest first.

    ``config`` has the fields of :class:`llm.utils.config.TrainingConfig`; its global batch stays as it is.
    """
    found: list[Layout] = []
    for train, dist in _candidates(config, world_size, hardware):
        try:
            check(_With(config, train, dist), world_size)
        except ConfigError:
            continue
        needed = memory(config.model, train, dist, world_size, config.lora)
        if needed.total <= hardware.usable_bytes:
            time = step_time(config.model, train, dist, world_size, hardware, config.lora)
            found.append(Layout(_changes(config, train, dist, world_size), needed, time))
    return sorted(found, key=lambda layout: (layout.time.total, len(layout.changes)))


def nearest(config: Any, world_size: int, hardware: HardwareConfig) -> Layout | None:
    """The one that changes fewest keys, and of these the fastest; None if nothing fits."""
    layouts = fitting(config, world_size, hardware)
    return min(layouts, key=lambda layout: (len(layout.changes), layout.time.total), default=None)


class _With:
    """A configuration with another layout."""

    def __init__(self, config: Any, train: TrainConfig, dist: DistConfig) -> None:
        self.model, self.data, self.lora, self.train, self.dist = config.model, config.data, config.lora, train, dist


def _candidates(config: Any, world_size: int, hardware: HardwareConfig) -> Iterator[tuple[TrainConfig, DistConfig]]:
    train, dist = config.train, config.dist
    powers = [2**power for power in range(world_size.bit_length()) if world_size % 2**power == 0]
    copies = sorted({1, dist.dp_replicate, max(world_size // hardware.gpus_per_node, 1)})
    micros = sorted({train.micro_batch_size, *(2**power for power in range(6) if 2**power <= train.global_batch_size)})
    contexts = [degree for degree in powers if (degree <= 8 and train.seq_len // degree >= 1024) or degree == 1]
    for tp in [degree for degree in powers if degree <= hardware.gpus_per_node]:
        for pp in [degree for degree in powers if degree <= min(config.model.n_layers, 16)]:
            for cp in contexts:
                for replicate in copies:
                    rest, left = divmod(world_size, tp * pp * cp * replicate)
                    if left or not rest:
                        continue
                    keep = pp == dist.pp
                    other = msgspec.structs.replace(
                        dist,
                        tp=tp,
                        pp=pp,
                        cp=cp,
                        dp_replicate=replicate,
                        dp_shard=rest if isinstance(dist.dp_shard, int) else "auto",
                        pp_schedule=dist.pp_schedule if keep else "1f1b",
                        pp_stages_per_rank=dist.pp_stages_per_rank if keep else 1,
                    )
                    for micro in micros:
                        if train.global_batch_size % (micro * rest * replicate):
                            continue
                        for kept in CHECKPOINTING:
                            yield (
                                msgspec.structs.replace(train, micro_batch_size=micro, activation_checkpointing=kept),
                                other,
                            )


def _changes(config: Any, train: TrainConfig, dist: DistConfig, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section, old, new in (("dist", config.dist, dist), ("train", config.train, train)):
        for name in new.__struct_fields__:
            if getattr(old, name) != getattr(new, name):
                found[f"{section}.{name}"] = getattr(new, name)
    return found
