"""Float8 products: near bfloat16's losses under every layout, plain checkpoints, and refusals where they cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm.model.transformer import Transformer
from llm.train.float8 import convert
from llm.train.throughput import peak_flops
from llm.train.world import World
from llm.utils.config import ConfigError, check
from llmops.config.compose import load_config
from llmops.errors import UserError
from tests.llm.ranks import Ranks
from tests.llm.test_dist import alone, config, train

SHAPE = {"model__dim": 64, "model__n_kv_heads": 4, "train__dtype": "bfloat16"}
CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU, grouped=False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def float8(recipe: str = "tensorwise", **changes: Any) -> Any:
    return config(**{**SHAPE, "train__float8": recipe, "train__float8_emulate": True, **changes})


@pytest.mark.parametrize(("size", "recipe"), [(1, "rowwise"), (2, "tensorwise")])
def test_losses_stay_near_those_of_bfloat16(ranks: Ranks, size: int, recipe: str) -> None:
    """Alone, and on two ranks that share every matrix."""
    expected, evaluated = alone(**SHAPE)
    given = float8(recipe, dist__tp=size)
    for history, value in ranks(size, train, given) if size > 1 else [train(ALONE, given)]:
        losses = [loss for loss, _ in history]
        assert losses == pytest.approx([loss for loss, _ in expected], rel=0.02)
        assert losses != [loss for loss, _ in expected]  # it is not bfloat16
        assert value == pytest.approx(evaluated, rel=0.05)


def test_parameters_stay_what_they_are() -> None:
    given = float8()
    plain, converted = Transformer(given.model), Transformer(given.model)
    convert(converted, given.train, CPU)
    described = [[(name, p.shape, p.dtype, type(p)) for name, p in m.named_parameters()] for m in (plain, converted)]
    assert described[0] == described[1]
    kinds = {name: type(module).__name__ for name, module in converted.named_modules() if "Linear" in str(type(module))}
    assert len(kinds) == 7 * given.model.n_layers
    assert set(kinds.values()) == {"Float8Linear"}
    assert type(converted.head).__name__ == "Head"


def test_a_device_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = float8(train__float8_emulate=False)
    model = Transformer(given.model)
    with pytest.raises(ConfigError, match=r"train\.float8=tensorwise needs a GPU, and this rank is on cpu: set train"):
        convert(model, given.train, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"needs compute capability 8\.9, and NVIDIA A100 has 8\.0"):
        convert(model, given.train, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train__dtype": "float32"}, r"needs train\.dtype=bfloat16"),
        ({"model__ffn_dim": 72}, r"model\.ffn_dim / dist\.tp = 72 is no multiple of 16"),
        ({"train__seq_len": 24}, "the 24 positions of a micro-batch on a rank are no multiple of 16"),
    ],
)
def test_shapes_that_cannot_are_refused_before_the_queue(changes: dict[str, Any], complaint: str) -> None:
    check(float8(), 1)
    with pytest.raises(ConfigError, match=complaint):
        check(float8(**changes), 1)


def test_hardware_that_cannot_is_refused_before_the_queue() -> None:
    asked = ["model=7b", "train.dtype=bfloat16", "train.float8=rowwise"]
    load_config([*asked, "hardware=h100"])
    with pytest.raises(UserError, match=r"train\.float8=rowwise: hardware=a100_80 has no float8 products; set"):
        load_config([*asked, "hardware=a100_80"])


def test_utilisation_is_not_told_of_two_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu: Any = SimpleNamespace(type="cuda")
    assert peak_flops(config(train__dtype="bfloat16").train, gpu) == 989.4e12
    assert peak_flops(float8().train, gpu) is None
    assert peak_flops(float8(train__peak_tflops=1000.0).train, gpu) == 1e15
