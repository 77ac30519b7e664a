"""The chunked loss against torch's of all logits: values, gradients, types, memory, split vocabularies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm.model.loss import linear_cross_entropy
from llm.train.dist import World
from tests.llm.ranks import Ranks


def given(dtype: torch.dtype, rows: int = 3, length: int = 7, width: int = 8, vocab: int = 20) -> tuple[Tensor, ...]:
    """x (B, T, D), weight (V, D) and targets (B, T), of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, length, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows, length), generator=generator)
    targets[0, 2:] = -100
    return x, weight, targets


def plain(x: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """The definition, with all logits at once."""
    logits = F.linear(x, weight).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    z = (logits.logsumexp(-1).square() * (targets.flatten() != -100)).sum()
    return loss + z_loss * z, loss


@pytest.mark.parametrize("chunk", [1, 4, 21, 4096])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_losses_and_gradients(chunk: int, z_loss: float) -> None:
    x, weight, targets = given(torch.float64)
    losses = linear_cross_entropy(x, weight, targets, chunk, z_loss)
    expected = plain(x, weight, targets, z_loss)
    torch.testing.assert_close(losses, torch.stack(expected))
    ours = torch.autograd.grad(losses[0] * 0.7, (x, weight))
    theirs = torch.autograd.grad(expected[0] * 0.7, (x, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_cross_entropy_alone_has_no_gradient() -> None:
    x, weight, targets = given(torch.float32)
    losses = linear_cross_entropy(x, weight, targets, 4, 0.1)
    assert losses[0] > losses[1] > 0
    assert not torch.autograd.grad(losses[1], x)[0].any()


def test_nothing_counts() -> None:
    x, weight, targets = given(torch.float32)
    losses = linear_cross_entropy(x, weight, torch.full_like(targets, -100), 4, 0.1)
    losses[0].backward()
    assert losses.tolist() == [0.0, 0.0]
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_stay_finite(size: float) -> None:
    x, weight, targets = given(torch.float32)
    losses = linear_cross_entropy(x * size, weight, targets, 4, 0.0)
    torch.testing.assert_close(losses[0], plain(x * size, weight, targets, 0.0)[0])
    assert losses.isfinite().all()


def test_only_wanted_gradients_are_made() -> None:
    x, weight, targets = given(torch.float32)
    both = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 4, 0.0)[0], (x, weight))
    of_x = torch.autograd.grad(linear_cross_entropy(x, weight.detach(), targets, 4, 0.0)[0], x)
    of_weight = torch.autograd.grad(linear_cross_entropy(x.detach(), weight, targets, 4, 0.0)[0], weight)
    torch.testing.assert_close((*of_x, *of_weight), both)
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets, 4, 0.0).requires_grad
    losses = linear_cross_entropy(x, weight, targets, 4, 0.0)
    losses[0].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="works once"):
        losses[0].backward()


def test_bfloat16() -> None:
    """Types stay; sums over chunks are kept in float32, so many chunks are as exact as one."""
    x, weight, targets = given(torch.bfloat16, length=200)
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    theirs = torch.autograd.grad(plain(exact[0], exact[1], targets, 0.0)[0], exact)
    for chunk in (8, 4096):
        losses = linear_cross_entropy(x, weight, targets, chunk, 0.0)
        assert losses.dtype == torch.float32
        ours = torch.autograd.grad(losses[0], (x, weight))
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine.dtype == torch.bfloat16
            error = (mine.double() - expected).norm() / expected.norm()
            assert error < 0.01, (chunk, error)


def test_autocast() -> None:
    x, weight, targets = given(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropy(x, weight, targets, 4, 0.0)
    losses[0].backward()
    low = [each.detach().bfloat16().requires_grad_() for each in (x, weight)]
    expected = linear_cross_entropy(low[0], low[1], targets, 4, 0.0)
    expected[0].backward()
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected)
    for mine, theirs in zip((x, weight), low, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == torch.float32
        assert torch.equal(mine.grad, theirs.grad.float())


class Largest(TorchDispatchMode):
    """The most values that any tensor has which is made inside."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.values = max(self.values, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("grad", [True, False])
def test_all_logits_are_never_held(grad: bool) -> None:
    x, weight, targets = given(torch.float32, length=100, vocab=300)
    with torch.set_grad_enabled(grad), Largest() as largest:
        losses = linear_cross_entropy(x, weight, targets, 10, 0.0)
        if grad:
            losses[0].backward()
    assert largest.values == 10 * 300
    with Largest() as largest:
        linear_cross_entropy(x, weight, targets, 1000, 0.0)
    assert largest.values == 300 * 300


# --- a vocabulary that is split over ranks ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(Path(tmp_path_factory.mktemp("ranks")))
    yield made
    made.close()


def split(world: World, z_loss: float) -> tuple[list[float], Tensor, Tensor]:
    """Losses, the gradient of x summed over ranks, and that of this rank's slice."""
    x, weight, targets = given(torch.float64)
    part = weight.detach().chunk(world.size)[world.rank].clone().requires_grad_()
    losses = linear_cross_entropy(x, part, targets, 4, z_loss, dist.group.WORLD)
    losses[0].backward()
    assert x.grad is not None
    assert part.grad is not None
    dist.all_reduce(x.grad)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, part, targets, 4, z_loss, dist.group.WORLD), losses)
    return losses.tolist(), x.grad.clone(), part.grad.clone()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("size", [2, 4])
def test_a_split_vocabulary_gives_the_same(ranks: Ranks, size: int, z_loss: float) -> None:
    x, weight, targets = given(torch.float64)
    expected = linear_cross_entropy(x, weight, targets, 4, z_loss)
    of_x, of_weight = torch.autograd.grad(expected[0], (x, weight))
    answers = ranks(size, split, z_loss)
    for losses, mine, _ in answers:
        assert losses == answers[0][0]
        torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), expected.detach())
        torch.testing.assert_close(mine, of_x)
    torch.testing.assert_close(torch.cat([part for _, _, part in answers]), of_weight)
