"""Cross-entropy of the output matrix's logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int, z_loss: float) -> Tensor:
    """Losses of ``x`` (B, T, D) times ``weight`` (V, D) against ``targets`` (B, T; -100 = not counted), summed.

    Float32 (2): cross-entropy + ``z_loss`` x log(Z)^2, and the cross-entropy alone, without gradient.
    """
    logits = F.linear(x, weight).float().flatten(0, 1)
    targets = targets.flatten()
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    total = loss
    if z_loss:
        total = loss + z_loss * (logits.logsumexp(-1).square() * (targets != -100)).sum()
    return torch.stack((total, loss.detach()))
