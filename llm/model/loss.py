"""Cross-entropy of the output matrix's logits, of which only a chunk of positions is ever held.

Logits are the largest tensor of a training step: 128,256 of them for each position of a Llama 3, in float32 more than
the rest of the last layers together. So the forward pass goes through chunks of positions, works out each chunk's loss
and its gradients by ``x`` and by the weight at once, and keeps these alone; the backward pass only scales them. This
costs no more products than the usual way, unlike recomputing the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import torch.distributed as dist

IGNORED = -100  # a target that does not count


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int, z_loss: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Losses of ``x`` (B, T, D) times ``weight`` (V, D) against ``targets`` (B, T; -100 = not counted), summed.

    Float32 (2), or float64 for float64: cross-entropy + ``z_loss`` x log(Z)^2 (PaLM, Chowdhery et al., 2022, section
    5), and the cross-entropy alone, without gradient. Logits are worked out in the type of ``x``, ``chunk`` positions
    at a time, their softmax in float32; nothing that has V columns outlives a chunk. Backward works once.

    With ``group`` the vocabulary is split: rank r of its R ranks has rows r x V / R and following of the matrix as
    ``weight`` (V / R, D), and all have the same ``x`` and ``targets``. The losses are then those of the whole, the same
    on every rank, and the gradient of ``x`` is this rank's part of a sum that the caller has to add up.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    with_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with torch.autocast(kind, enabled=False):
        losses: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, -2), weight, targets.flatten(), chunk, z_loss, group, with_gradient
        )
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """``x`` is (N, D), ``targets`` (N)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        z_loss: float,
        group: dist.ProcessGroup | None,
        with_gradient: bool,
    ) -> Tensor:
        of_x = torch.empty_like(x) if with_gradient and ctx.needs_input_grad[0] else None
        of_weight: Tensor | None = None
        first = 0
        if group is not None:
            first = group.rank() * weight.shape[0]
        sums = torch.zeros(2, dtype=_exact(x.dtype), device=x.device)
        for begin in range(0, x.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            logits = F.linear(x[rows], weight)  # (n, V)
            losses, slope = _losses_and_slope(logits, targets[rows], z_loss, first, group, with_gradient)
            sums += losses
            if of_x is not None and slope is not None:
                torch.mm(slope, weight, out=of_x[rows])
            if slope is not None and ctx.needs_input_grad[1]:
                of_weight = _add_product(of_weight, slope, x[rows], last=begin + chunk >= x.shape[0])
        ctx.gradients = of_x, of_weight if of_weight is None else of_weight.to(weight.dtype)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward through linear_cross_entropy works once: its gradients were handed out")
        scale = grads[0][0]
        of_x, of_weight = (None if each is None else each.mul_(scale) for each in ctx.gradients)
        ctx.gradients = None
        return of_x, of_weight, None, None, None, None, None


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The type that a softmax is worked out in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _add_product(total: Tensor | None, slope: Tensor, x: Tensor, last: bool) -> Tensor:
    """``total`` + ``slope`` (n, V) transposed times ``x`` (n, D). Sums of several chunks are float32 at least."""
    if total is None:
        product = slope.t() @ x
        return product if last else product.to(_exact(x.dtype))
    if total.dtype == x.dtype:
        return total.addmm_(slope.t(), x)
    return total.add_(slope.t() @ x)


def _losses_and_slope(
    logits: Tensor,
    targets: Tensor,
    z_loss: float,
    first: int,
    group: dist.ProcessGroup | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums (2) over a chunk's positions, and the first one's gradient by ``logits`` (n, V), whose memory it takes.

    ``first`` is the token of the first column.
    """
    counted = targets != IGNORED
    own = counted & (targets >= first) & (targets < first + logits.shape[1]) if group is not None else counted
    column = torch.where(own, targets - first, 0).unsqueeze(1)  # (n, 1)
    exact = logits.to(_exact(logits.dtype))
    top = exact.amax(1)
    if group is not None:
        _all_reduce(top, group, largest=True)
    shifted = exact.sub_(top.unsqueeze(1))
    target = shifted.gather(1, column).squeeze(1)
    powers = shifted.exp_()
    total = powers.sum(1)
    if group is not None:
        both = torch.stack((total, torch.where(own, target, 0.0)))
        _all_reduce(both, group)
        total, target = both[0], both[1]
    log_z = total.log()
    loss = torch.where(counted, log_z - target, 0.0).sum()
    log_z = torch.where(counted, log_z + top, 0.0)
    sums = torch.stack((loss + z_loss * log_z.square().sum() if z_loss else loss, loss))
    if not with_gradient:
        return sums, None
    factor = counted * (1.0 + 2.0 * z_loss * log_z) / total
    slope = powers.mul_(factor.unsqueeze(1))
    slope.scatter_add_(1, column, -own.to(slope.dtype).unsqueeze(1))
    return sums, slope if slope.dtype == logits.dtype else logits.copy_(slope)


def _all_reduce(values: Tensor, group: dist.ProcessGroup, largest: bool = False) -> None:
    import torch.distributed as dist

    dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
