"""Rotary positions (Su et al., "RoFormer", 2021), and two ways to stretch them beyond the context of training.

Shapes: T positions, E values of a head, of which the first half is paired with the second.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm.utils.config import ModelConfig, RopeScaling, head_size


def rotary_table(
    config: ModelConfig, length: int, device: torch.device, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, 1, E/2) in float32; of positions 0 .. ``length`` - 1, or of ``positions`` (T).

    Recomputed in every forward instead of kept in a buffer: it costs next to nothing, and a buffer would need care
    wherever a model is built on the meta device, sharded or saved.
    """
    if positions is None:
        positions = torch.arange(length, device=device)
    angles = positions.float().unsqueeze(-1) * frequencies(config, device)  # (T, E/2)
    scale = magnitude(config.rope_scaling)
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (first half, second half) of a head by its position's angle. ``x`` is (B, T, heads, E)."""
    first, second = x.float().chunk(2, dim=-1)  # (B, T, heads, E/2) each; float32 keeps long positions exact under bf16
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair: float32 (E/2), falling from 1 to almost 1 / ``rope_theta``."""
    size = head_size(config)
    plain = config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "llama3":
        return plain * _llama3(plain, scaling)
    return plain * _yarn(size, config.rope_theta, scaling, device)


def magnitude(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies queries and keys by, each: the square root of its temperature's inverse."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Factors (E/2) of Llama 3.1: 1 for pairs that turn often within the original context, 1 / factor for those that
    do not, and a blend, linear in the number of turns, between."""
    turns = scaling.original_max_seq_len * plain / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return blend + (1.0 - blend) / scaling.factor


def _yarn(size: int, theta: float, scaling: RopeScaling, device: torch.device) -> Tensor:
    """Factors (E/2) of YaRN (Peng et al., 2023, section 3.2): likewise, but linear in the number of the pair, between
    those that turn ``beta_fast`` and ``beta_slow`` times."""

    def pair(turns: float) -> float:
        """The pair, a fraction, that turns so often within the original context."""
        return size * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32, device=device) - first) / max(last - first, 0.001)
    slow = ramp.clamp(0.0, 1.0)
    return slow / scaling.factor + (1.0 - slow)
