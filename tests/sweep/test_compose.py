"""A trial's configuration is what Hydra would compose at its point, only sooner."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from llmops.config import groups
from llmops.config.compose import load_config
from llmops.config.overrides import assign
from llmops.errors import UserError
from llmops.sweep import compose, space
from llmops.sweep.model import Axis


def bases(overrides: list[str], config_dir: Path | None = None) -> tuple[list[Axis], compose.Bases]:
    found = space.parse(overrides, groups.read(config_dir).options())
    return found.axes, compose.compose(found.axes, found.fixed, config_dir)


def same_as_hydra(overrides: list[str], fixed: list[str], config_dir: Path | None = None) -> int:
    axes, found = bases([*overrides, *fixed], config_dir)
    combinations = list(itertools.product(*(axis.values for axis in axes)))
    for values in combinations:
        point = dict(zip((axis.key for axis in axes), values, strict=True))
        single = [f"{axis.key}={point[axis.key]}" if axis.group else assign(axis.key, point[axis.key]) for axis in axes]
        assert found.config(axes, point).data == load_config([*fixed, *single], config_dir).data
    return len(combinations)


def test_every_point_is_what_hydra_composes() -> None:
    # model.max_seq_len decides train.seq_len by an interpolation, and the recipe another value of it.
    fixed = ["model.dim=64", "model.n_layers=1"]
    assert same_as_hydra(["model.max_seq_len=64,128", "train.lr=1e-4,3e-4", "data=shakespeare"], fixed) == 4
    assert same_as_hydra(["model=tiny,1b", "train.seed=range(0,3)", "env.MODE=a,b"], ["recipe=tiny"]) == 12
    assert same_as_hydra(["sweep=grid", "model=tiny,1b", "eval.sample_prompts=[a],[b,c]"], ["recipe=tiny"]) == 4


def test_elaborate_interpolations_are_omegaconfs(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\nenv:\n  WHAT: lr=${train.lr} of ${model.name}\n  SAME: ${env.WHAT}\n"
    )
    assert same_as_hydra(["train.lr=0.001,0.002", "model.name=a,b"], ["recipe=mine"], tmp_path) == 4


def test_the_base_stays_as_it_was() -> None:
    axes, found = bases(["train.lr=1,2", "recipe=tiny"])
    before = found.to_bytes()
    found.config(axes, {"train.lr": 2.0})
    assert found.to_bytes() == before
    assert compose.Bases.from_bytes(before).found == found.found


def test_a_digest_is_of_what_trials_compute() -> None:
    one, two = bases(["train.lr=1,2", "recipe=tiny"])[1], bases(["train.lr=1,2", "recipe=tiny", "retry.backoff_s=7"])[1]
    assert one.digest() == two.digest()
    assert one.digest() != bases(["train.lr=1,2", "recipe=tiny", "train.beta1=0.5"])[1].digest()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lrr=1,2"], "did you mean train.lr?"),
        (["model=tiny,9b"], "has no 9b"),
        (["modle=tiny,1b"], "there is no key modle"),
        (["train.lr=a,b"], "train.lr"),
    ],
)
def test_what_does_not_exist_is_said(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        bases(overrides)


def test_a_point_that_cannot_train_is_named() -> None:
    axes, found = bases(["model.n_heads=4,5", "recipe=tiny"])
    with pytest.raises(UserError, match=r"trial model.n_heads=5: .*does not divide"):
        found.config(axes, dict(zip([axis.key for axis in axes], [5], strict=True)))


def test_trials_of_a_study_share_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    for name, ranks in (("one", 1), ("two", 2)):
        text = f"# @package _global_\ncluster:\n  ranks_per_node: {ranks}\n"
        (tmp_path / "recipe" / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError, match="different clusters"):
        bases(["recipe=one,two", "dist=fsdp"], tmp_path)
