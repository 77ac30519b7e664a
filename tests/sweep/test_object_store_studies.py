"""A study whose store is a real S3 server: trials make their runs, ask and report without a folder that they share."""

from __future__ import annotations

import json

import pytest

from llmops.runs.store import open_store
from tests.sweep.driver import CURVE, Sweeper

CURVE_OF_LR = """
for i in 1 2 3; do
  echo "step=$i loss=$(awk -v lr=$LR "BEGIN { print (log(lr) + 4.6) ^ 2 + 1 / $i }")"
done
"""


@pytest.fixture
def remote(s3_url, tmp_path):
    return Sweeper(s3_url, "local", XDG_STATE_HOME=str(tmp_path / "state"), XDG_DATA_HOME=str(tmp_path / "data"))


def test_a_study_that_learns(remote):
    arguments = ("sweep=tpe", "--trials", "4", "--max-parallel", "2", "env.LR=tag(log,interval(0.0001,1))")
    out = remote.ok(
        "sweep", "--backend", "local", "--json", *CURVE, *arguments, "--name", "far", "--", "bash", "-c", CURVE_OF_LR
    )
    study = json.loads(out)["id"]
    trials = remote.until_over(study, 150)
    assert [trial["state"] for trial in trials] == ["complete"] * 4
    assert len({trial["params"]["env.LR"] for trial in trials}) == 4
    best = json.loads(remote.ok("sweep", "best", "--json", "far"))
    assert best["value"] == min(trial["value"] for trial in trials)
    assert "step=3 loss=" in remote.ok("logs", "far/0")
    # Everything that trials have told each other is JSON, in objects that were put once.
    journal = open_store(remote.url).sub(f"{study}/journal")
    parts = [json.loads(journal.get(name)) for name in journal.list()]
    assert len(parts) > 4
