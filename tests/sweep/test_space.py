"""What a sweep's command line means: Hydra's grammar, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmops.errors import UserError
from llmops.sweep import space

GROUPS = {"model": ["1b", "7b", "tiny"], "recipe": ["none", "tiny"], "cluster": ["local", "slurm"]}


def axis(text: str) -> Any:
    found = space.parse([text], GROUPS)
    assert not found.fixed
    return found.axes[0]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.lr=1e-4,3e-4", [0.0001, 0.0003]),
        ("train.lr=choice(1e-4,3e-4)", [0.0001, 0.0003]),
        ("train.seed=range(0,4)", [0, 1, 2, 3]),
        ("train.seed=range(0,8,3)", [0, 3, 6]),
        ("train.lr=range(0,1,0.25)", [0.0, 0.25, 0.5, 0.75]),
        ("train.seed=range(3,0,-1)", [3, 2, 1]),
        ("model=tiny,1b", ["tiny", "1b"]),
        ("model=glob(*b)", ["1b", "7b"]),
        ("model=glob(*,exclude=7b)", ["1b", "tiny"]),
        ("train.dtype=float32,'bfloat16'", ["float32", "bfloat16"]),
        ("train.deterministic=true,false", [True, False]),
        ("eval.sample_prompts=[a],[b,c]", [["a"], ["b", "c"]]),
        ("env.LR=1,2", [1, 2]),
        ("env.LR=1,nan", [1, "nan"]),
        ("train.seed=sort(3,1,2)", [1, 2, 3]),
        ("train.seed=null,1", [None, 1]),
    ],
)
def test_values(text: str, values: list[Any]) -> None:
    assert axis(text).values == values


def test_intervals() -> None:
    found = axis("train.lr=interval(1e-5,1e-2)")
    assert (found.kind, found.low, found.high, found.log, found.integer) == ("interval", 1e-5, 1e-2, False, False)
    assert axis("train.lr=tag(log,interval(1e-5,1e-2))").log
    assert axis("train.warmup_steps=int(interval(1,10))").integer


@pytest.mark.parametrize(
    "text", ["recipe=tiny", "train.lr=1e-4", "cluster.nodelist=n1,n2", "name=a,b", "sweep.objective=log:a,b", "~env"]
)
def test_what_does_not_vary(text: str) -> None:
    assert space.parse([text], GROUPS) == space.Space([], [text], set())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lr=choice()"], "there is no value"),
        (["train.seed=range(5,5)"], "there is no value"),
        (["model=glob(x*)"], "there is no value"),
        (["train.lr=glob(*)"], "options of a group"),
        (["train.lr=1e-4,3e-4,1e-4"], "0.0001 is there twice"),
        (["train.lr=1,2", "train.lr=3,4"], "given twice"),
        (["train.lr=1,2", "train.lr=3"], "given twice"),
        (["train.lr=interval(2,1)"], "from a smaller to a larger"),
        (["train.lr=tag(log,interval(0,1))"], "begins above 0"),
        (["train.lr=tag(fast,interval(0,1))"], "the only tag"),
        (["train.seed=range(0,100000000)"], "more than 1,000,000 values"),
        (["train.lr"], "key=value"),
        (["train.lr=0.1,inf"], "no finite number"),
    ],
)
def test_refusals(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        space.parse(overrides, GROUPS)
    assert "\n" not in str(error.value)


def test_one_and_true_are_two_values() -> None:
    assert axis("env.X=1,true").values == [1, True]


def test_shuffling_is_the_seeds() -> None:
    found = space.parse(["train.seed=shuffle(range(0,20))", "train.lr=1,2,3"], GROUPS)
    first, again, other = space.shuffle(found, 1), space.shuffle(found, 1), space.shuffle(found, 2)
    assert first == again
    assert first[0].values != other[0].values
    assert sorted(first[0].values) == list(range(20))
    assert first[1].values == [1.0, 2.0, 3.0]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=2, max_size=6, unique=True))
def test_floats_arrive_as_they_were_written(values: list[float]) -> None:
    text = "train.lr=" + ",".join(repr(value) for value in values)
    assert [float(value) for value in axis(text).values] == values
