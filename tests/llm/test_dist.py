"""Every layout trains as one process does: the same losses, gradient norms and weights after several steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from llm.data.reading import Rows
from llm.model.init import init_weights
from llm.train.dist import Layout, lay_out
from llm.train.optim import build, clip_coefficient
from llm.train.phases import Phases
from llm.train.step import Passes
from llm.train.world import World
from llm.utils.config import TrainingConfig, check
from tests.llm.ranks import Ranks

STEPS = 4
ROWS, HELD_OUT, POSITIONS = 8, 12, 32


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def config(**changes: Any) -> TrainingConfig:
    """``changes`` are of the form section__key=value."""
    tree: dict[str, Any] = {
        "model": {
            "name": "test", "vocab_size": 264, "dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64,
            "max_seq_len": POSITIONS,
        },
        "train": {"max_steps": 100, "seq_len": POSITIONS, "global_batch_size": ROWS, "micro_batch_size": 1, "lr": 0.01},
        "dist": {"timeout_s": 60},
        "data": {"source": "embedded:shakespeare"},
        "eval": {},
        "checkpoint": {"every_steps": 0},
    }  # fmt: skip
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return msgspec.convert(tree, TrainingConfig)


def train(world: World, given: TrainingConfig, packed: bool = False) -> tuple[list[tuple[float, float]], float]:
    """(loss, gradient norm) of each step, and the loss of an evaluation after them; on every rank.

    ``packed``: rows hold several documents, and not every target counts.
    """
    check(given, world.size)
    layout = lay_out(given.dist, world)
    passes = Passes(given, layout)
    for part in passes.parts:
        init_weights(part, 0, given.model)
    optimizer = build(passes.named_parameters(), given.train, given.model)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, given.model.vocab_size, (STEPS, ROWS, POSITIONS + 1), generator=generator)
    held_out = torch.randint(0, given.model.vocab_size, (HELD_OUT, POSITIONS + 1), generator=generator)
    history, phases = [], Phases(world.device)
    for batch in batches:
        rows = share(batch, layout, packed)
        sums = passes.train(rows, ROWS * POSITIONS, phases)
        with torch.no_grad():
            total = world.sum(torch.cat((sums.double(), passes.norm_squares().view(1), count(passes, rows))))
            norm = float(total[2]) ** 0.5
            torch._foreach_mul_(optimizer.gradients(), clip_coefficient(norm, 1.0))
            optimizer.step(0.01)
        optimizer.zero_grad()
        history.append((float(total[1] / total[3]), norm))
    rows = share(held_out, layout, packed)
    evaluated = world.sum(torch.cat((passes.evaluate(rows).double(), count(passes, rows))))
    return history, float(evaluated[1] / evaluated[2])


def share(tokens: torch.Tensor, layout: Layout, packed: bool) -> Rows:
    """This rank's rows of a batch."""
    mine = tokens.chunk(layout.dp)[layout.dp_rank]
    if not packed:
        return Rows(mine)
    documents = (mine[:, :-1] % 7 == 0).cumsum(1).int()
    return Rows(mine, mine[:, 1:] % 7 != 0, documents)


def count(passes: Passes, rows: Rows) -> torch.Tensor:
    return torch.tensor([float(passes.tokens(rows))], dtype=torch.float64)


@functools.cache
def alone(packed: bool = False, **changes: Any) -> tuple[list[tuple[float, float]], float]:
    torch.set_num_threads(1)
    return train(World(0, 1, 0, torch.device("cpu"), False), config(**changes), packed)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp": (4, {}),
    "kept whole": (2, {"dist__reshard_after_forward": False}),
    "hsdp": (4, {"dist__dp_replicate": 2}),
    "fsdp_tp": (4, {"dist__tp": 2}),
    "fsdp_cp": (4, {"dist__cp": 2}),
    "pp, not enough rows to evaluate": (2, {"dist__pp": 2, "train__micro_batch_size": 4}),
    "pp 4": (4, {"dist__pp": 4}),
    "interleaved": (2, {"dist__pp": 2, "dist__pp_schedule": "interleaved", "dist__pp_stages_per_rank": 2}),
    "fsdp_pp": (4, {"dist__pp": 2}),
    "fsdp_tp_pp": (8, {"dist__pp": 2, "dist__tp": 2}),
    "tp_pp_cp": (8, {"dist__pp": 2, "dist__tp": 2, "dist__cp": 2}),
}


# Ties are cut by sharding the vocabulary, and by having the ends on two stages.
TIED = ("fsdp", "fsdp_tp", "fsdp_pp", "interleaved")


@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in LAYOUTS), *((name, True) for name in TIED)])
def test_it_trains_as_one_process(ranks: Ranks, name: str, tied: bool) -> None:
    size, changes = LAYOUTS[name]
    expected, evaluated = alone(model__tie_embeddings=tied)
    for history, value in ranks(size, train, config(model__tie_embeddings=tied, **changes)):
        # Sums are taken in another order; what Adam makes of gradients near zero magnifies that.
        assert [loss for loss, _ in history] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert [norm for _, norm in history] == pytest.approx([norm for _, norm in expected], rel=2e-4)
        assert value == pytest.approx(evaluated, rel=1e-5)


@pytest.mark.parametrize("name", ["pp, not enough rows to evaluate", "interleaved", "fsdp_tp", "tp_pp_cp"])
def test_packed_documents_train_as_on_one_process(ranks: Ranks, name: str) -> None:
    size, changes = LAYOUTS[name]
    expected, evaluated = alone(packed=True)
    assert expected[0][0] != alone()[0][0][0]
    for history, value in ranks(size, train, config(**changes), True):
        assert [loss for loss, _ in history] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert [norm for _, norm in history] == pytest.approx([norm for _, norm in expected], rel=2e-4)
        assert value == pytest.approx(evaluated, rel=1e-5)


def test_a_packed_row_has_the_losses_of_its_documents_alone() -> None:
    given = config()
    layout = lay_out(given.dist, World(0, 1, 0, torch.device("cpu"), False))
    passes = Passes(given, layout)
    init_weights(passes.parts[0], 0, given.model)
    rows = share(torch.randint(0, 264, (4, POSITIONS + 1), generator=torch.Generator().manual_seed(5)), layout, True)
    together = passes.evaluate(rows)[1]
    assert rows.documents is not None
    assert rows.counted is not None
    alone = 0.0
    for tokens, documents, counted in zip(rows.tokens, rows.documents, rows.counted, strict=True):
        for number in documents.unique():
            places = (documents == number).nonzero().flatten()
            inputs, targets = tokens[places], tokens[places + 1].where(counted[places], -100)
            alone += float(passes.parts[0](inputs[None], targets[None])[1])
    assert float(together) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", ["hsdp", "fsdp_tp"])
def test_muon_gathers_whole_matrices(ranks: Ranks, name: str) -> None:
    size, changes = LAYOUTS[name]
    expected, evaluated = alone(train__optimizer="muon")
    for history, value in ranks(size, train, config(train__optimizer="muon", **changes)):
        assert [loss for loss, _ in history] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert value == pytest.approx(evaluated, rel=1e-5)


@pytest.mark.parametrize("kept", ["selective", "full"])
@pytest.mark.parametrize("name", ["alone", "fsdp_tp", "fsdp_pp"])
def test_activations_that_are_worked_out_again_change_nothing(ranks: Ranks, name: str, kept: str) -> None:
    size, changes = LAYOUTS.get(name, (1, {}))
    plain = ranks(size, train, config(**changes))
    assert ranks(size, train, config(train__activation_checkpointing=kept, **changes)) == plain


@pytest.mark.parametrize(
    ("changes", "packed"),
    [pytest.param({}, True, marks=pytest.mark.long), ({"dist__tp": 2}, False), ({"dist__cp": 2}, True)],
)
def test_compiled_blocks_compute_the_same(ranks: Ranks, changes: dict[str, Any], packed: bool) -> None:
    expected, _ = alone(packed=packed)
    for history, _ in ranks(2, train, config(train__compile=True, **changes), packed):
        assert [loss for loss, _ in history] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert [norm for _, norm in history] == pytest.approx([norm for _, norm in expected], rel=2e-4)


def test_bfloat16_stays_near(ranks: Ranks) -> None:
    expected, _ = alone()
    for name in ("fsdp_tp", "fsdp_pp"):
        size, changes = LAYOUTS[name]
        for history, _ in ranks(size, train, config(train__dtype="bfloat16", **changes)):
            assert [loss for loss, _ in history] == pytest.approx([loss for loss, _ in expected], rel=0.02)
