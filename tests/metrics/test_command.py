"""``llmops metrics``: what it serves of runs, within which bounds, also when something does not answer."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from llmops.job import JobView
from llmops.monitor.describe import describe
from llmops.monitor.feed import Seen
from llmops.monitor.metrics import MAX_RUNS, Look, choose, text, uncommitted_s
from tests.checkpoint.proxy import Faults, proxy
from tests.conftest import RunMaker
from tests.launcher.harness import Launcher
from tests.metrics.parts import get, llmops_metrics, promtool, until

NOW = 1_770_010_000.0


def described(number: int = 0, **changes: Any) -> dict[str, Any]:
    base = describe_one()
    return {**base, "id": f"20260131-120000-r{number}-aaaa", "name": f"r{number}", "created": NOW - 100, **changes}


def describe_one() -> dict[str, Any]:
    from llmops.monitor.describe import EMPTY

    return {**EMPTY, "backend": "slurm", "owner": "ada", "kind": "llm", "job_ids": ["1"], "state": "running"}


def samples(*runs: dict[str, Any], trouble: str = "") -> dict[str, float]:
    data = text(Seen(Look(runs, [], 0.5), NOW - 30, trouble, 1), NOW)
    promtool("check", "metrics", text=data)
    lines = [line for line in data.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def attempt(reason: str = "", **changes: Any) -> dict[str, Any]:
    return {"number": 0, "state": "running", "reason": reason, "started": NOW - 500, **changes}


def test_a_run_is_told_as_the_screens_show_it():
    run = described(
        step=40,
        max_steps=100,
        loss=2.5,
        goodput=0.75,
        mfu=0.4,
        tokens_per_s=1e5,
        eta_s=60.0,
        last_commit={"step": 30, "time": NOW - 120},
        stalled_s=90.0,
        attempts=[attempt("preempted"), attempt("failed"), attempt("preempted"), attempt()],
    )
    found = samples(run)
    run_id = f'run_id="{run["id"]}"'
    expected = {
        "step": 40, "max_steps": 100, "loss": 2.5, "goodput_ratio": 0.75, "mfu_ratio": 0.4, "tokens_per_second": 1e5,
        "eta_seconds": 60, "last_commit_timestamp_seconds": NOW - 120, "stalled_seconds": 90,
        "uncommitted_seconds": 120,
    }  # fmt: skip
    assert {name: found[f"llmops_run_{name}{{{run_id}}}"] for name in expected} == expected
    assert found[f'llmops_run_state{{{run_id},state="running"}}'] == 1
    assert found[f'llmops_run_info{{backend="slurm",kind="llm",owner="ada",run="r0",{run_id}}}'] == 1
    ends = {
        reason: found[f'llmops_run_attempts_total{{reason="{reason}",{run_id}}}'] for reason in ("preempted", "failed")
    }
    assert ends == {"preempted": 2, "failed": 1}
    assert found[f'llmops_run_attempts_total{{reason="hung",{run_id}}}'] == 0  # its first must show as an increase
    assert (found["llmops_store_up"], found["llmops_look_seconds"]) == (1, 0.5)
    assert found["llmops_last_look_timestamp_seconds"] == NOW - 30


def test_what_is_not_known_is_not_there():
    found = samples(described())
    assert not [name for name in found if name.startswith(("llmops_run_loss", "llmops_run_stalled", "llmops_run_mfu"))]


def test_uncommitted_time_is_that_of_this_attempt_and_of_trainers_alone():
    old = {"last_commit": {"step": 1, "time": NOW - 9000}}
    assert uncommitted_s(described(attempts=[attempt()], **old), NOW) == 500  # it waited for long, and has just resumed
    assert uncommitted_s(described(attempts=[attempt()]), NOW) == 500
    for no in ({"kind": "command"}, {"state": "preempted"}, {"attempts": []}):
        assert uncommitted_s(described(**{"attempts": [attempt()], **old, **no}), NOW) is None


def test_series_are_bounded_and_what_is_left_out_is_counted():
    runs = [described(number, created=NOW - number) for number in range(MAX_RUNS + 7)]
    over = [described(9000 + number, state="finished", ended=NOW - 100) for number in range(3)]
    gone = [described(9900, state="failed", ended=NOW - 4000), described(9901, state="finished", ended=None)]
    shown, omitted = choose([*runs, *over, *gone], NOW)
    assert (len(shown), omitted) == (MAX_RUNS, 10)
    newest = {each["name"] for each in shown}
    assert {"r0", "r5"} <= newest
    assert not {f"r{MAX_RUNS + 6}", "r9900", "r9901"} & newest
    found = samples(*runs, *over, *gone)
    assert found["llmops_runs_omitted"] == 10
    assert sum(name.startswith("llmops_run_state{") for name in found) == MAX_RUNS
    assert found['llmops_runs{backend="slurm",state="running"}'] == MAX_RUNS + 7
    assert found['llmops_runs{backend="slurm",state="finished"}'] == 4


def test_queues_count_runs_and_trials():
    study = described(
        1, kind="study", state="running", trials={"running": 3, "pending": 5, "preempted": 1, "complete": 9}
    )
    found = samples(study, described(2), described(3, state="pending"), described(4, state="preempted", backend="k8s"))
    queue = {
        (backend, state): found[f'llmops_queue_jobs{{backend="{backend}",state="{state}"}}']
        for backend in ("slurm", "k8s")
        for state in ("running", "waiting")
    }
    assert queue == {("slurm", "running"): 4, ("slurm", "waiting"): 7, ("k8s", "running"): 0, ("k8s", "waiting"): 1}
    assert found['llmops_studies{backend="slurm",state="running"}'] == 1
    assert found['llmops_runs{backend="slurm",state="running"}'] == 1
    assert not [name for name in found if study["id"] in name]


def test_a_scheduler_that_does_not_answer_is_down(make_run):
    """The words of a run's state are what tells it: they come from the real thing here."""
    run = make_run()
    run.submission(0)
    (silent,) = describe([run.load()], {"100": JobView("100", "unreachable", "squeue: no route")}, NOW)
    found = samples(silent, described(2, backend="k8s", state="pending"))
    assert found['llmops_scheduler_up{backend="slurm"}'] == 0
    assert found['llmops_scheduler_up{backend="k8s"}'] == 1


def test_of_a_store_that_does_not_answer_the_last_look_stays():
    assert samples(described(), trouble="no answer for 20 s")["llmops_store_up"] == 0
    data = text(Seen(None, 0.0, "no answer", 1), NOW).decode()
    assert "llmops_store_up 0.0" in data
    assert "llmops_runs" not in data


def test_names_are_text(make_run, tmp_path):
    run = make_run('we"ird\\na\nme{}', id="20260131-120001-x-aaaa", owner='o"')
    run.start(0)
    shown = Launcher(tmp_path / "runs", "local").ok("metrics", "--once")
    promtool("check", "metrics", text=shown.encode())
    assert 'run="we\\"ird\\\\na\\nme{}"' in shown


def test_damaged_runs_and_an_empty_store_are_served(make_run, tmp_path):
    empty = Launcher(tmp_path / "none", "local").ok("metrics", "--once")
    assert "llmops_store_up 1.0" in empty
    make_run().store.put("run.json", b"{")
    assert 'llmops_runs{backend="none",state="unknown"} 1.0' in Launcher(tmp_path / "runs", "local").ok(
        "metrics", "--once"
    )


def test_a_scrape_never_waits_for_a_store_that_hangs_and_sees_it_come_back(s3_server, s3_url):
    RunMaker(s3_url)()
    with proxy(s3_server) as between:
        launcher = Launcher(s3_url, "local", AWS_ENDPOINT_URL=between.url)
        with llmops_metrics(launcher.env) as url:
            until(lambda: b"llmops_store_up 1.0" in get(f"{url}/metrics"), "the first look")
            between.faults = Faults(hold=True)
            until(lambda: b"llmops_store_up 0.0" in get(f"{url}/metrics"), "the trouble", 60)
            began = time.monotonic()
            assert b"llmops_run_state{" in get(f"{url}/metrics")
            assert json.loads(get(f"{url}/sd")) == []
            assert time.monotonic() - began < 2
            between.faults = Faults()
            until(lambda: b"llmops_store_up 1.0" in get(f"{url}/metrics"), "the store's return", 60)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--port", "70000"), "--port 70000: give a number"),
        (("--interval", "0"), "--interval 0: give seconds"),
        (("--host", "256.1.2.3"), "--host 256.1.2.3 --port 9464: "),
        (("--host", "192.0.2.1"), "--host 192.0.2.1 --port 9464: "),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, told, tmp_path):
    done = Launcher(tmp_path / "runs", "local").call("metrics", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_other_machines_are_let_in_with_a_warning(tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "-m", "llmops", "metrics", "--host", "0.0.0.0", "--port", "0"]
    process = subprocess.Popen(
        command, env=Launcher(tmp_path / "runs", "local").env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        assert "there is no login" in process.stderr.readline()
    finally:
        process.terminate()
        process.communicate(timeout=20)
