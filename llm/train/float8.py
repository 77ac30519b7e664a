"""The blocks' products in float8, by torchao: operands are rounded to eight bits with a scale, sums stay wider.

Weights, their gradients and the optimizer stay as they are, and so do the head, the embedding and attention: what a
checkpoint holds does not change. Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from llm.model.transformer import Transformer
from llm.utils.config import FLOAT8_MULTIPLE, ConfigError, TrainConfig

CAPABILITY = (8, 9)  # Ada, Hopper and newer


def convert(model: Transformer, train: TrainConfig, device: torch.device) -> None:
    """Put torchao's linear layers in the place of the blocks' own, around the same parameters. Before anything else
    is applied to ``model``. Does nothing for float8=off; raises ConfigError where ``device`` cannot do it."""
    if train.float8 == "off":
        return
    if not train.float8_emulate:
        _check(train.float8, device)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            f"train.float8={train.float8} needs torchao ({error}): pip install 'llmops[lowmem]'"
        ) from error
    recipe = Float8LinearConfig.from_recipe_name(train.float8)
    recipe = dataclasses.replace(recipe, emulate=train.float8_emulate)
    for block in model.blocks.values():
        convert_to_float8_training(block, module_filter_fn=_takes_part, config=recipe)


def _check(recipe: str, device: torch.device) -> None:
    instead = "set train.float8=off, or train.float8_emulate=true to see what its precision does"
    if device.type != "cuda":
        raise ConfigError(f"train.float8={recipe} needs a GPU, and this rank is on {device.type}: {instead}")
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        raise ConfigError(
            f"train.float8={recipe} needs compute capability 8.9, and {name} has {major}.{minor}: {instead}"
        )


def _takes_part(module: nn.Module, _: str) -> bool:
    return isinstance(module, nn.Linear) and not any(size % FLOAT8_MULTIPLE for size in module.weight.shape)
