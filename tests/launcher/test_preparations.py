"""A run that prepares data, by the launcher: its ranks share the work, are stopped and go on."""

from __future__ import annotations

import time

import pytest

from tests.data.preparing import jsonl, shakespeare, texts


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(shakespeare()))
    return [
        "task=prepare_data", f"prepare.input=[{tmp_path}/a.jsonl]", f"prepare.output={tmp_path}/out",
        "prepare.unit_mb=0.02", "prepare.workers=1", "prepare.validation=0", "cluster.ranks_per_node=2",
    ]  # fmt: skip


def test_a_preparation_is_a_run(local, corpus, tmp_path):
    run_id = local.submit(*corpus)
    value = local.wait(run_id, "finished")
    assert value["name"] == "prepare_data"
    assert value["attempts"][0]["state"] == "finished"
    assert texts(tmp_path / "out") == [text for text in shakespeare() if text]
    shown = local.ok("logs", run_id)
    assert "prepared 29 units; 0 had been prepared before" in shown
    assert "train: 1,0" in shown
    # Again: nothing is left to do.
    assert local.wait(local.submit(*corpus), "finished")["attempts"][0]["state"] == "finished"


def test_a_preparation_is_stopped_and_resumed(local, corpus, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(shakespeare() * 20))
    run_id = local.submit(*corpus)
    records = tmp_path / "out" / "parts" / "units"
    deadline = time.monotonic() + 120
    while len(list(records.glob("*.json"))) < 4:
        assert time.monotonic() < deadline, local.trace(run_id)
        time.sleep(0.01)
    local.ok("cancel", "--graceful", run_id)
    value = local.wait(run_id, "cancelled")
    kept = len(list(records.glob("*.json")))
    assert (tmp_path / "out" / "parts").exists(), "it was over before it was stopped"
    assert kept >= 4
    assert value["step"] is not None
    local.ok("resume", run_id)
    local.wait(run_id, "finished")
    assert texts(tmp_path / "out") == [text for text in shakespeare() * 20 if text]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["prepare.input=[/nowhere/*.jsonl]"], "prepare.input=/nowhere/*.jsonl: nothing matches"),
        (["prepare.tokenizer=/nowhere/tokenizer.json"], "prepare.tokenizer=/nowhere/tokenizer.json: there is no"),
        (["prepare.output=null"], "prepare.output is not set"),
    ],
)
def test_what_cannot_be_prepared_is_not_submitted(local, corpus, change, said):
    done = local.call("submit", *corpus, *change)
    assert done.returncode == 2
    assert said in done.stderr
    assert local.call("sweep", *corpus, "prepare.seed=1,2").returncode == 2
