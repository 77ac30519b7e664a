"""What differs between two checkpoints is told, whatever their layouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.checkpoint import diff
from llm.checkpoint.diff import comparable, read_parts, same_values, state_differences, tensor_differences, tensors
from llm.checkpoint.format import DamagedError
from llm.checkpoint.lineage import read_manifest
from llm.utils.local_storage import LocalStorage
from tests.checkpoint.maker import make_commit, split_rows


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path)


def saved(storage, step, held, **options):
    commit = make_commit(storage, step, held, **options)
    return tensors(commit, read_parts(storage, commit, read_manifest(storage, commit)))


def test_states():
    a = {"step": 1, "data": {"epoch": 0, "seed": 7}, "old": None, "same": [1, 2]}
    b = {"step": 2, "data": {"epoch": 0, "seed": 8}, "new": {"x": 1}, "same": [1, 2]}
    assert list(state_differences(a, b)) == [
        ("data.seed", 7, 8),
        ("new", "-", {"x": 1}),
        ("old", None, "-"),
        ("step", 1, 2),
    ]
    assert list(state_differences({"x": 1}, {"x": True})) == [("x", 1, True)]


def test_tensors_added_removed_and_changed(storage):
    zeros = np.zeros((4, 4), np.float32)
    a = saved(storage, 1, split_rows({"gone": zeros, "same": zeros, "shape": zeros, "type": zeros}, 2))
    b = saved(storage, 2, split_rows({"new": zeros, "same": zeros, "shape": zeros[:2], "type": zeros.astype("f2")}, 1))
    assert list(tensor_differences(a, b)) == [
        ("gone", "removed: F32 [4, 4]"),
        ("new", "added: F32 [4, 4]"),
        ("shape", "F32 [4, 4] -> F32 [2, 4]"),
        ("type", "F32 [4, 4] -> F16 [4, 4]"),
    ]
    assert comparable(a, b) == ["same"]


def columns(whole, size):
    """What each rank holds when a matrix is cut along its second dimension."""
    width = -(-whole.shape[1] // size)
    return [
        {"w": (whole[:, begin : begin + width], list(whole.shape), [0, begin])}
        for begin in range(0, whole.shape[1], width)
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_changed_value_is_found_in_any_two_layouts(tmp_path_factory, monkeypatch, data):
    monkeypatch.setattr(diff, "CHUNK", data.draw(st.integers(1, 200)))
    rows, cols = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    whole = np.arange(rows * cols, dtype=np.int16).reshape(rows, cols)
    other = whole.copy()
    changed = data.draw(st.booleans())
    if changed:
        other[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))] -= 1
    storage = LocalStorage(tmp_path_factory.mktemp("run"))
    cuts = [columns, lambda values, size: split_rows({"w": values}, size)]
    one, two = (
        saved(storage, step, data.draw(st.sampled_from(cuts))(values, data.draw(st.integers(1, 4))))
        for step, values in ((1, whole), (2, other))
    )
    assert same_values(storage, one["w"], storage, two["w"]) is not changed


def test_equal_layouts_are_compared_without_reading(storage, monkeypatch):
    values = np.arange(10000, dtype=np.float64)
    one, two, three = (
        saved(storage, step, split_rows({"x": array, "s": np.array(1.0)}, 2))
        for step, array in ((1, values), (2, values), (3, values + (values == 9999)))
    )
    monkeypatch.setattr(LocalStorage, "read", lambda *arguments: pytest.fail("read"))
    assert [same_values(storage, one[name], storage, two[name]) for name in one] == [True, True]
    assert [same_values(storage, one[name], storage, three[name]) for name in ("s", "x")] == [True, False]


def test_a_file_that_is_missing_or_short_is_damage(storage):
    values = np.arange(64, dtype=np.float64)
    one = saved(storage, 1, split_rows({"x": values}, 2))
    two = saved(storage, 2, split_rows({"x": values}, 3))
    path = storage.path(one["x"].boxes[1].path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=r"rank00001-000\.safetensors is cut short"):
        same_values(storage, one["x"], storage, two["x"])
    path.unlink()
    with pytest.raises(DamagedError, match=r"rank00001-000\.safetensors is missing"):
        same_values(storage, one["x"], storage, two["x"])
