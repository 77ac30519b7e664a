"""Every optimizer updates sharded parameters as one process does, and what it keeps is read in any other layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llm.train.dist import lay_out
from llm.train.optim import Optimizer, build
from llm.train.pieces import local_pieces
from llm.train.step import Passes
from llm.train.world import World
from llm.utils.config import ConfigError, TrainingConfig
from llm.utils.sharding import like, local, slices
from tests.llm.ranks import Ranks
from tests.llm.test_dist import config

ALONE = World(0, 1, 0, torch.device("cpu"), False)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp_tp": (4, {"dist__tp": 2}),
    "fsdp_pp": (4, {"dist__pp": 2}),
}
# The vocabulary does not split evenly over ranks; and biases.
SHAPE = {"model__dim": 256, "model__ffn_dim": 128, "model__vocab_size": 262, "model__qkv_bias": True}
Whole = dict[str, np.ndarray[Any, Any]]
Boxes = list[tuple[str, list[int], list[int], np.ndarray[Any, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def values(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(optimizer: Optimizer, parameters: dict[str, nn.Parameter], step: int) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            whole = values(f"{step} {name}", tuple(parameter.shape))
            parameter.grad = like(whole[slices(parameter)].contiguous(), parameter)
    optimizer.step(0.01 / step)
    optimizer.zero_grad()


def work(world: World, given: TrainingConfig, steps: range, start: Whole | None = None) -> Boxes:
    """The boxes of the state that this rank has after ``steps``, from the first weights or from ``start``."""
    torch.manual_seed(0)
    parameters = Passes(given, lay_out(given.dist, world)).named_parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(values(name, tuple(parameter.shape))[slices(parameter)])
    optimizer = build(parameters, given.train, given.model)
    state = optimizer.state()
    if start is not None:
        for piece in local_pieces(state):
            box = tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.data.shape, strict=True))
            piece.data.copy_(torch.from_numpy(start[piece.name][box]))
        optimizer.steps = steps.start - 1
    for step in steps:
        update(optimizer, parameters, step)
    return [(p.name, p.shape, p.offset, p.data.numpy().copy()) for p in local_pieces(state)]


def together(parts: list[Boxes]) -> Whole:
    """Every tensor of the state, whole; copies must agree, and nothing be missing."""
    found: Whole = {}
    there: Whole = {}
    for name, shape, offset, data in (piece for boxes in parts for piece in boxes):
        whole = found.setdefault(name, np.zeros(shape, data.dtype))
        filled = there.setdefault(name, np.zeros(shape, bool))
        box = tuple(slice(at, at + size) for at, size in zip(offset, data.shape, strict=True))
        assert not filled[box].any() or np.array_equal(whole[box][filled[box]], data[filled[box]]), name
        whole[box], filled[box] = data, True
    assert all(each.all() for each in there.values())
    return found


def assert_equal(a: Whole, b: Whole) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), f"{name} differs by up to {np.abs(a[name] - b[name]).max()}"


@pytest.mark.parametrize("optimizer", ["adamw8bit", "muon"])
def test_every_layout_updates_as_one_process_and_reads_its_state(ranks: Ranks, optimizer: str) -> None:
    torch.set_num_threads(1)
    changes = {**SHAPE, "train__optimizer": optimizer}
    half, all_of_it = (together([work(ALONE, config(**changes), range(1, end))]) for end in (4, 6))
    for size, layout in LAYOUTS.values():
        given = config(**changes, **layout)
        assert_equal(together(ranks(size, work, given, range(1, 4))), half)
        assert_equal(together(ranks(size, work, given, range(4, 6), half)), all_of_it)  # from one rank's
    for name, tensor in half.items():
        assert tensor.any() or name.endswith(":codes"), f"{name} was not updated"


def refused(world: World, given: TrainingConfig) -> str:
    parameters = Passes(given, lay_out(given.dist, world)).named_parameters()
    with pytest.raises(ConfigError) as error:
        build(parameters, given.train, given.model)
    return str(error.value)


def test_blocks_that_a_split_would_cut_are_refused(ranks: Ranks) -> None:
    given = config(**{**SHAPE, "model__ffn_dim": 64}, train__optimizer="adamw8bit", dist__tp=2)
    for message in ranks(2, refused, given):
        assert "32 columns of blocks.0.ffn.down.weight" in message
        assert "lower dist.tp" in message
