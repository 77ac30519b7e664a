"""The optimizer against torch's own."""

from __future__ import annotations

import torch
from torch import nn

from llm.train.optim import AdamW, clip_coefficient
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
