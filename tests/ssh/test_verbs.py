"""What the verbs cost over a connection: requests, and questions to the scheduler."""

from __future__ import annotations

import pytest

from llmops import overview
from llmops.monitor.describe import describe
from llmops.runs import records, ssh_store
from llmops.runs.store import open_store
from tests.conftest import RunMaker
from tests.ssh.sshd import Sshd


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A login node whose SLURM says that every job runs, and notes what it is asked."""
    programs = tmp_path / "programs"
    programs.mkdir()
    says = "seq 100 199 | sed 's/$/|RUNNING|2026-01-31T12:00:00|name|None/'"
    (programs / "squeue").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/squeue.asked\n{says}\n')
    (programs / "squeue").chmod(0o755)
    daemon = Sshd(tmp_path / "sshd", options=f"SetEnv PATH={programs}:/usr/bin:/bin\n")
    monkeypatch.setenv("LLMOPS_SSH_CONFIG", str(daemon.config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ssh_store._host.cache_clear()
    yield f"ssh://login{tmp_path}/runs"
    daemon.stop()
    ssh_store._host.cache_clear()


def history(tmp_path, count, steps=300):
    """Runs that are interrupted now, after two attempts each."""
    make_run = RunMaker(str(tmp_path / "runs"))
    for number in range(count):
        run = make_run(f"run{number}")
        run.submission(job_id=str(100 + number))
        run.start(0)
        run.end(0, "preempted", "requeue")
        run.start(1, "checkpoints/step_00000010/0000-0000")
        run.metrics(0, range(1, 13), time=1.77e9, tokens_per_s=1e5)
        run.metrics(1, range(11, steps), time=1.77e9, tokens_per_s=1e5)


@pytest.mark.parametrize("count", [1, 40])
def test_the_status_of_any_number_of_runs_takes_as_many_round_trips(cluster, tmp_path, count):
    history(tmp_path, count)
    rows = overview.overview(runs_url=cluster).rows
    host = ssh_store.connect("login")
    assert [row["step"] for row in rows] == [299] * count
    assert {row["state"] for row in rows} == {"running"}
    # The names of runs, of studies and of those that were resumed; all directories at once; squeue.
    assert (host.connections, host.requests) == (1, 5)
    assert len((tmp_path / "squeue.asked").read_text().splitlines()) == 1


def test_what_is_read_ahead_says_what_the_store_says(cluster, tmp_path):
    history(tmp_path, 3, 3000)
    (tmp_path / "runs/20260131-120099-bad-aaaa/job/0000").mkdir(parents=True)
    (tmp_path / "runs/20260131-120099-bad-aaaa/run.json").write_text("{")
    store = open_store(cluster)
    ahead = records.load_runs(store, records.list_ids(store))
    singly = [records.load_run(store.sub(run_id)) for run_id in records.list_ids(store)]
    assert describe(ahead, {}, 2e9) == describe(singly, {}, 2e9)
    here = records.list_runs(str(tmp_path / "runs"))
    strip = lambda rows: [{**row, "url": ""} for row in rows]  # noqa: E731
    assert strip(describe(ahead, {}, 2e9)) == strip(describe(here, {}, 2e9))
