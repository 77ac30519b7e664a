"""The optimizer against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llm.train.optim import OPTIMIZERS, clip_coefficient
from llm.train.optim.adamw import AdamW
from llm.train.optim.muon import Muon, orthogonal
from llm.utils.config import TrainConfig


def config(**changes: object) -> TrainConfig:
    values = {
        "max_steps": 100,
        "seq_len": 8,
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "lr": 0.01,
        "warmup_steps": 10,
    }
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def test_equals_torch_adamw() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    settings = config(weight_decay=0.3)
    ours = AdamW(dict(models[0].named_parameters()), settings)
    matrices = [p for p in models[1].parameters() if p.dim() >= 2]
    vectors = [p for p in models[1].parameters() if p.dim() < 2]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.01,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    for step in range(20):
        x = torch.randn(4, 5)
        for model in models:
            model(x).square().sum().backward()
        lr = 0.01 / (step + 1)
        for group in theirs.param_groups:
            group["lr"] = lr
        ours.step(lr)
        ours.zero_grad()
        theirs.step()
        theirs.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_parameters_without_gradient_stay() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    before = model[1].weight.detach().clone()
    model[0](torch.ones(1, 2)).sum().backward()
    AdamW(dict(model.named_parameters()), config()).step(0.1)
    assert torch.equal(model[1].weight, before)


def test_clipping() -> None:
    assert clip_coefficient(0.5, 1.0) == 1.0
    assert clip_coefficient(4.0, 1.0) == 0.25
    assert clip_coefficient(1e9, 0) == 1.0


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_orthogonalised_momentum_keeps_its_directions_and_loses_their_lengths(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    found = orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ found @ vh.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3


def test_muon_is_for_the_matrices_of_the_blocks() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 4)]), "head": nn.Linear(4, 3)})
    muon = Muon(dict(model.named_parameters()), config(weight_decay=0.0))
    assert list(muon.matrices) == ["blocks.0.weight"]
    assert {name for name in muon.state() if not name.startswith("model.")} == {
        "optim.momentum.blocks.0.weight",
        *(f"optim.{slot}.{name}" for slot in ("exp_avg", "exp_avg_sq")
          for name in ("blocks.0.bias", "head.weight", "head.bias")),
    }  # fmt: skip
    before = model["blocks"][0].weight.detach().clone()  # type: ignore[index]
    model["head"](model["blocks"][0](torch.ones(2, 6))).square().sum().backward()  # type: ignore[index]
    muon.step(0.1)
    change = model["blocks"][0].weight.detach() - before  # type: ignore[index]
    assert float(torch.linalg.matrix_norm(change, 2)) == pytest.approx(0.1 * 0.2 * 6**0.5, rel=0.4)


def test_optimizers_have_names() -> None:
    assert OPTIMIZERS.names() == ["adamw", "adamw8bit", "muon"]
    assert OPTIMIZERS.load("muon") is Muon
    with pytest.raises(KeyError, match="there is no optimizer sgd: choose one of adamw, adamw8bit, muon"):
        OPTIMIZERS.load("sgd")
    with pytest.raises(ValueError, match="there is an optimizer adamw already"):
        OPTIMIZERS.add("adamw", "x:y")
