"""The weights that a run starts from, and how a run whose base is frozen knows them again.

A checkpoint of adapters holds no base: it never changes, it can be read again from where it came from, and it is
hundreds of times as large. That is safe because its checksum is in every commit: what reads adapters (a resume, an
export, sampling) reads the base too, and refuses other values than those that they were trained beside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llm.model.init import init_parameters, initial_value
from llm.train.lora import is_adapter
from llm.train.pretrained import open_pretrained
from llm.train.world import World
from llm.utils.config import ConfigError, TrainingConfig
from llm.utils.sharding import local, slices

if TYPE_CHECKING:
    from llm.train.step import Passes

ROWS = 1 << 22  # values of a tensor that are summed at a time
_MASK = (1 << 64) - 1


class Base(Protocol):
    """First values of a model's parameters, by name."""

    def rows(self, name: str, shape: tuple[int, ...], rows: slice) -> Tensor:
        """``rows`` of the parameter, of whole ``shape``, in any floating-point type."""


class _Drawn:
    """Of a model that starts from nothing."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config

    def rows(self, name: str, shape: tuple[int, ...], rows: slice) -> Tensor:
        return initial_value(name, shape, self.config.train.seed, self.config.model)[rows]


def open_base(config: TrainingConfig) -> Base:
    """Where the first weights come from. Raises ConfigError for a folder that does not have this model."""
    if config.train.init_from is not None:
        return open_pretrained(config.train.init_from, config.model)
    return _Drawn(config)


@torch.no_grad()
def fill(config: TrainingConfig, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give ``parameters``, or this rank's part of them, the values that a new run starts from. Raises ConfigError."""
    adapters = {name: parameter for name, parameter in parameters.items() if is_adapter(name)}
    rest = {name: parameter for name, parameter in parameters.items() if name not in adapters}
    if config.train.init_from is not None:
        open_pretrained(config.train.init_from, config.model).fill(rest)
    else:
        init_parameters(rest, config.train.seed, config.model)
    init_parameters(adapters, config.train.seed, config.model)


# --- knowing it again -------------------------------------------------------------------------------------------------


@torch.no_grad()
def identity(config: TrainingConfig, parameters: Mapping[str, nn.Parameter], world: World) -> dict[str, Any]:
    """What a commit says of what is frozen of ``parameters``, the same on every rank of any layout.

    All ranks call it together; those of a pipeline leave out what another stage has, too (:func:`own`).
    """
    total = 0
    for name, parameter in parameters.items():
        if not parameter.requires_grad and _first_copy(parameter):
            total += checksum(name, local(parameter), tuple(parameter.shape), slices(parameter))
    halves = torch.tensor([total & 0xFFFFFFFF, total >> 32 & 0xFFFFFFFF], dtype=torch.int64, device=world.device)
    low, high = world.sum(halves).tolist()
    return as_state(config, low + (high << 32))


def own(passes: Passes) -> dict[str, nn.Parameter]:
    """The parameters of this rank's stages, without a tied embedding that the first stage has already."""
    second = passes.tied is not None and not passes.parts[0].first
    return {n: p for n, p in passes.named_parameters().items() if not (second and n == "embedding.weight")}


def as_state(config: TrainingConfig, total: int) -> dict[str, Any]:
    """The record of a base whose tensors' checksums sum up to ``total``."""
    return {"from": config.train.init_from, "checksum": f"{total & _MASK:016x}", "lora.alpha": config.lora.alpha}


def check_base(mine: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> None:
    """Raise ConfigError where adapters belong to other weights, or were trained with another scale."""
    theirs = theirs or {}
    if theirs.get("checksum") != mine["checksum"]:
        raise ConfigError(
            f"the checkpoint's adapters were trained beside the weights of {theirs.get('from') or 'a random start'} "
            f"(checksum {theirs.get('checksum')}), and those of {mine['from'] or 'this random start'} have checksum "
            f"{mine['checksum']}: set train.init_from to the former"
        )
    if theirs.get("lora.alpha") != mine["lora.alpha"]:
        raise ConfigError(
            f"the checkpoint's adapters were trained with lora.alpha={theirs.get('lora.alpha')}, not "
            f"{mine['lora.alpha']}: restore the value"
        )


def checksum(name: str, values: Tensor, shape: tuple[int, ...], box: tuple[slice, ...]) -> int:
    """Of the part ``box`` of the tensor ``name``: parts add up to the checksum of the whole, modulo 2^64.

    The sum of the values' bits, each times an odd number that its place and the tensor's name give: one value that
    changed is always seen, and two that changed places nearly always. It is no protection against malice.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") | 1
    if not values.numel():
        return 0
    values = values.to(torch.float32).reshape(values.shape[0], -1)
    width = shape[1] if len(shape) > 1 else 1
    first = box[1].start if len(shape) > 1 else 0
    columns = torch.arange(first, first + values.shape[1], device=values.device)
    total, step = 0, max(ROWS // values.shape[1], 1)
    for begin in range(0, values.shape[0], step):
        bits = values[begin : begin + step].contiguous().view(torch.int32).to(torch.int64)
        rows = torch.arange(begin, begin + bits.shape[0], device=values.device) + box[0].start
        places = (rows[:, None] * width + columns) * 2 + 1
        total += int(bits.mul_(places).sum())  # wraps, as it should
    return total * key & _MASK


def _first_copy(parameter: Tensor) -> bool:
    """Is this rank the first of those that hold the same values of ``parameter``?"""
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return True
    spread: Any = parameter
    place = mesh.get_coordinate()
    return all(not each.is_replicate() or at == 0 for each, at in zip(spread.placements, place, strict=True))
