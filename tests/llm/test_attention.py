"""Masks, the kernels behind them, and rotary positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm.model import attention
from llm.model.attention import Mask, attend, document_bounds, make_mask, packs
from llm.model.rope import frequencies, magnitude, rotary_table, rotate
from llm.model.transformer import Transformer
from llm.utils.config import ModelConfig, RopeScaling
from tests.llm.test_model import build, shape

CPU = torch.device("cpu")
# Two rows of 12: documents of 5, 1 and 6 positions, and one of 12.
DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 12])


def one_by_one(q: Tensor, k: Tensor, v: Tensor, sees: Any, scale: float) -> Tensor:
    """Attention by its definition: ``sees(row, i, j)`` says whether position i of a row sees j."""
    B, H, T, _ = q.shape
    share = H // k.shape[1]
    out = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                keys = [j for j in range(k.shape[2]) if sees(b, i, j)]
                weights = torch.softmax(k[b, h // share, keys] @ q[b, h, i] * scale, 0)
                out[b, h, i] = weights @ v[b, h // share, keys]
    return out


def heads(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (2, 4, 12, 8), keys and values (2, 2, 12, 8)."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 12, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 12, 8, generator=generator, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("window", [None, 1, 3, 12, 50])
@pytest.mark.parametrize("packed", [False, True])
def test_masks_by_definition(window: int | None, packed: bool) -> None:
    documents = DOCUMENTS if packed else None
    q, k, v = heads()
    mask = make_mask(2, 12, CPU, window, None, documents)
    plain = not packed and (window is None or window >= 12)
    assert (mask == Mask()) == plain  # the fast kernel
    expected = one_by_one(
        q,
        k,
        v,
        lambda b, i, j: 0 <= i - j < (window or 99) and (documents is None or bool(documents[b, i] == documents[b, j])),
        0.3,
    )
    torch.testing.assert_close(attend(q, k, v, mask, 0.3), expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_spread_positions_see_what_the_whole_row_does(window: int | None, packed: bool) -> None:
    """Queries of some positions against the keys of all: context parallelism."""
    documents = DOCUMENTS if packed else None
    q, k, v = heads()
    whole = attend(q, k, v, make_mask(2, 12, CPU, window, None, documents))
    for positions in (torch.tensor([0, 1, 2, 9, 10, 11]), torch.tensor([3, 4, 5, 6, 7, 8])):
        part = attend(q[:, :, positions], k, v, make_mask(2, 12, CPU, window, positions, documents))
        torch.testing.assert_close(part, whole[:, :, positions])
    with pytest.raises(ValueError, match=r"6 queries and 12 keys: set Transformer\.parts"):
        attend(q[:, :, :6], k, v, Mask())


def test_bounds_of_documents() -> None:
    assert document_bounds(2, 12, CPU, DOCUMENTS).tolist() == [0, 5, 6, 12, 24]
    assert document_bounds(2, 12, CPU, DOCUMENTS.flip(0)).tolist() == [0, 12, 17, 18, 24]
    three = torch.tensor([[7, 7, 9, 9, 9, 2]])
    assert document_bounds(1, 6, CPU, three).tolist() == [0, 2, 5, 6, 6]  # up to a power of two
    assert document_bounds(3, 4, CPU, None).tolist() == [0, 4, 8, 12]
    assert document_bounds(1, 4, CPU, torch.zeros(1, 4)).tolist() == [0, 4]


@pytest.mark.parametrize("window", [None, 3])
def test_the_packed_kernel_gets_what_the_mask_means(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs on a GPU only; here each of its documents goes through the exact attention instead."""

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, q_len: int, k_len: int, **more: Any):
        assert (q_len, k_len) == (12, 12)
        assert torch.equal(q_at, k_at)
        assert more["enable_gqa"]
        left, right = more["window_size"]
        assert right == 0
        out = torch.empty_like(q)
        for begin, end in zip(q_at[:-1].tolist(), q_at[1:].tolist(), strict=True):
            parts = (each[begin:end].transpose(0, 1)[None] for each in (q, k, v))
            mask = make_mask(1, max(end - begin, 1), CPU, None if left == -1 else left + 1)
            if end > begin:
                out[begin:end] = attend(*parts, mask, more["scale"])[0].transpose(0, 1)
        return out

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    q, k, v = heads()
    exact = attend(q, k, v, make_mask(2, 12, CPU, window, None, DOCUMENTS), 0.2)
    mask = make_mask(2, 12, CPU, window, None, DOCUMENTS, packed=True)
    assert mask.bounds is not None
    torch.testing.assert_close(attend(q, k, v, mask, 0.2), exact)


def test_only_a_gpu_has_the_packed_kernel() -> None:
    assert not packs(CPU, torch.bfloat16, 64)
    assert not packs(torch.device("cuda"), torch.float32, 64)
    assert not packs(torch.device("cuda"), torch.bfloat16, attention.FLASH_HEAD + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 3])
def test_the_packed_kernel_equals_the_mask_on_a_gpu(window: int | None) -> None:
    device = torch.device("cuda")
    q, k, v = (each.to(device, torch.bfloat16) for each in heads())
    exact = attend(q, k, v, make_mask(2, 12, device, window, None, DOCUMENTS))
    packed = attend(q, k, v, make_mask(2, 12, device, window, None, DOCUMENTS, packs(device, q.dtype, 8)))
    torch.testing.assert_close(packed, exact, rtol=2e-2, atol=2e-2)


# --- in the decoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"window": 4, "full_every": 2}, {"qk_norm": True, "qkv_bias": True}])
def test_packed_documents_equal_documents_alone(changes: dict[str, Any]) -> None:
    model = build(shape(n_layers=4, **changes))
    tokens = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(1))
    packed = model(tokens, documents=DOCUMENTS[:1])
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        torch.testing.assert_close(packed[:, begin:end], model(tokens[:, begin:end]))
    assert not torch.allclose(packed[:, 5:], model(tokens)[:, 5:], atol=1e-3)


def test_which_layers_have_a_window() -> None:
    assert list(Transformer(shape(n_layers=6, window=4, full_every=3)).windows.values()) == [4, 4, None, 4, 4, None]
    assert Transformer(shape(n_layers=6, window=4), range(3, 5)).windows == {"3": 4, "4": 4}
    assert set(Transformer(shape()).windows.values()) == {None}


def test_a_window_hides_what_is_far() -> None:
    model = build(shape(window=4, n_layers=1))
    tokens = torch.randint(0, 50, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 50
    same = [torch.equal(a, b) for a, b in zip(model(tokens)[0], model(changed)[0], strict=True)]
    assert same == [True] * 5 + [False] * 4 + [True] * 7


@pytest.mark.parametrize("changes", [{}, {"window": 4, "full_every": 2}])
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_spread_over_ranks_equals_the_row(changes: dict[str, Any], packed: bool) -> None:
    """One of two ranks' forward pass, with the keys and values that it would gather."""
    documents = DOCUMENTS if packed else None
    model = build(shape(**changes))
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = model(tokens, documents=documents)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    for block in model.blocks.values():
        block.attention.gather = keep
    model(tokens, documents=documents)
    model.parts = 2
    positions = torch.tensor([0, 1, 2, 9, 10, 11])
    source = iter(list(kept))
    for block in model.blocks.values():
        block.attention.gather = lambda x: next(source)
    part = model(tokens[:, positions], positions=positions, documents=documents)
    torch.testing.assert_close(part, whole[:, positions])


@pytest.mark.parametrize("packed", [False, True])
def test_a_block_compiles_as_one_graph(packed: bool) -> None:
    config = shape(window=4, qk_norm=True, qkv_bias=True)
    block = build(config).blocks["0"]
    x = torch.randn(2, 12, 32)
    rope = rotary_table(config, 12, CPU)
    mask = make_mask(2, 12, CPU, 4 if packed else None, None, DOCUMENTS if packed else None)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, rope, mask), block(x, rope, mask))


# --- rotary positions ------------------------------------------------------------------------------------------------


def test_rotary_scores_depend_on_distance_alone() -> None:
    cos, sin = rotary_table(shape(), 12, CPU)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    spread = torch.ones(1, 12, 1, 1)
    scores = rotate(q * spread, cos, sin)[0, :, 0] @ rotate(k * spread, cos, sin)[0, :, 0].T
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0, 0] != scores[1, 0]


def stretched(kind: str, **changes: Any) -> ModelConfig:
    scaling = RopeScaling(kind=kind, **{"factor": 8.0, "original_max_seq_len": 8192, **changes})  # type: ignore[arg-type]
    return shape(head_dim=128, rope_theta=500000.0, rope_scaling=scaling)


def test_llama3_scaling() -> None:
    """The rule of Llama 3.1: pairs that turn 4 times in 8,192 positions stay, those that turn less than once slow down
    by the factor."""
    plain = frequencies(shape(head_dim=128, rope_theta=500000.0), CPU)
    scaled = frequencies(stretched("llama3"), CPU)
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = scaled[(turns > 1) & (turns < 4)] / plain[(turns > 1) & (turns < 4)]
    assert 0 < len(between) < 10
    assert ((between > 1 / 8) & (between < 1)).all()
    assert rotary_table(stretched("llama3"), 4, CPU)[0][0].max() == 1.0


def test_yarn_scaling() -> None:
    plain = frequencies(shape(head_dim=128, rope_theta=500000.0), CPU)
    scaled = frequencies(stretched("yarn"), CPU)
    turns = 8192 * plain / (2 * torch.pi)
    ratio = scaled / plain
    assert torch.equal(scaled[turns > 40], plain[turns > 40])
    torch.testing.assert_close(ratio[turns < 0.8], torch.full_like(ratio[turns < 0.8], 1 / 8))
    assert (ratio.diff() <= 1e-6).all()
    assert magnitude(stretched("yarn").rope_scaling) == pytest.approx(1.2079441541679836)
    assert magnitude(stretched("yarn", attention_factor=1.5).rope_scaling) == 1.5
    assert rotary_table(stretched("yarn", attention_factor=1.5), 4, CPU)[0][0].max() == 1.5


def test_positions_choose_rows_of_the_table() -> None:
    whole = rotary_table(shape(), 12, CPU)
    positions = torch.tensor([7, 2, 11])
    for part, table in zip(rotary_table(shape(), 3, CPU, positions), whole, strict=True):
        assert torch.equal(part, table[positions])
