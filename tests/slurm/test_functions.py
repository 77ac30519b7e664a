"""Functions on the real SLURM: preempted and resumed, and many of them as one array."""

from __future__ import annotations

import pytest

import llmops
from tests.functions import work
from tests.functions.conftest import FAST
from tests.slurm import cluster


@pytest.fixture
def on_slurm(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    yield llmops.Executor(FAST, backend="slurm", runs_url=str(tmp_path / "runs"))
    cluster.cancel_all()


def test_a_preempted_function_resumes_and_its_result_is_fetched(on_slurm, tmp_path):
    run = on_slurm.submit(work.Counter(), 60, str(tmp_path))
    cluster.wait_for((tmp_path / "count").exists, 90, "the count to begin")
    cluster.requeue(run.job_id)
    count, began = run.result(180)
    first, second = [attempt.end for attempt in run.status().run.attempts]
    assert (first.reason, first.saved, second.reason) == ("preempted", True, "finished")
    assert count == 60
    assert 0 < began[1] < 60, "it went on from what its checkpoint() had returned"


def test_many_calls_are_one_array(on_slurm):
    runs = on_slurm.map(work.inverse, [1, 2, 0, 4])
    assert [run.exception(180).__class__ for run in runs] == [type(None), type(None), ZeroDivisionError, type(None)]
    assert [runs[number].result() for number in (0, 1, 3)] == [1.0, 0.5, 0.25]
    arrays = {run.job_id.partition("_")[0] for run in runs}
    assert len(arrays) == 1
    assert [run.job_id for run in runs] == [f"{next(iter(arrays))}_{number}" for number in range(4)]
