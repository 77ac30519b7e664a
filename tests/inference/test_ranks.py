"""A model that ranks share gives the logits of the whole one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm.data.tokenizer import ByteTokenizer
from llm.inference.generate import generate
from llm.inference.load import load_model
from llm.inference.parallel import check_split
from llm.inference.rows import CachedRows
from llm.inference.sampling import Sampling
from llm.train.world import World
from llm.utils.config import ConfigError, load
from tests.inference.models import save_run
from tests.llm.ranks import Ranks
from tests.llm.test_hf_families import ours, shape

PROMPTS = [[5, 9, 2, 7, 11], [14, 3]]
SAMPLING = Sampling(max_tokens=12, temperature=0.8, seed=1, logprobs=3)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"), 2)
    yield started
    started.close()


def write(world: World, folder: str) -> list[tuple[list[int], list[float]]]:
    model, _ = load_model(load(f"{folder}/config.yaml"), folder, world.device, world=world)
    done = generate(CachedRows(model, parts=world.size), ByteTokenizer(), PROMPTS, SAMPLING)
    return [(each.tokens, [chosen.logprob or 0.0 for chosen in each.chosen]) for each in done]


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "out_bias": True, "ffn_bias": True, "window": 4},
        {"tie_embeddings": True, "vocab_size": 61, "qk_norm": True},
    ],
)
def test_ranks_share_a_model(changes: dict[str, Any], tmp_path: Path, ranks: Ranks) -> None:
    save_run(tmp_path, ours(shape(**changes)))
    (expected,) = ranks(1, write, str(tmp_path))
    for found in ranks(2, write, str(tmp_path)):
        for (mine, chances), (its, wanted) in zip(found, expected, strict=True):
            assert mine == its
            assert chances == pytest.approx(wanted, abs=1e-4)


def test_a_model_that_they_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 ranks cannot share model\.n_heads=4: choose a number that divides it"):
        check_split(shape(), 3)
    check_split(shape(tie_embeddings=True, vocab_size=61), 2)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=61"):
        check_split(shape(vocab_size=61), 2)
