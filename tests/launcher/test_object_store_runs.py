"""Runs on this machine whose run store is a real S3 server: no folder is shared, a helper process stands between."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launcher.harness import TINY, Launcher


@pytest.fixture
def remote(s3_url, tmp_path):
    """A run store of its own on the S3 server."""
    return Launcher(s3_url, "local", XDG_STATE_HOME=str(tmp_path / "state"), XDG_DATA_HOME=str(tmp_path / "data"))


def supervisor(remote, run_id):
    (job_id,) = remote.status(run_id)["job_ids"]
    return int(job_id.split(":")[1])


def check_finished(remote, run_id, undisturbed, reasons):
    value = remote.wait(run_id, "finished")
    assert [attempt["reason"] for attempt in value["attempts"]] == reasons
    assert remote.losses(run_id) == undisturbed
    remote.wait_for(lambda: remote.alive(run_id) == [], 10, "all processes to be gone", run_id)
    return value


def test_a_run_is_preempted_by_sigterm_and_finishes_bit_by_bit(remote, undisturbed):
    run_id = remote.submit(*TINY)
    remote.wait_step(run_id, 12)
    pid = supervisor(remote, run_id)
    for _ in range(2):
        os.kill(pid, signal.SIGTERM)
    value = check_finished(remote, run_id, undisturbed, ["preempted", "finished"])
    first, second = value["attempts"]
    assert second["first_step"] == first["last_step"] + 1
    assert "finished" in remote.ok("status", run_id)
    assert "step" in remote.ok("logs", run_id, "--attempt", "1")


@pytest.mark.long
def test_kill_9_of_the_node_agent_is_survived(remote, undisturbed):
    run_id = remote.submit(*TINY)
    remote.wait_step(run_id, 23)
    os.kill(remote.agents(run_id)[0], signal.SIGKILL)
    value = check_finished(remote, run_id, undisturbed, ["node_failure", "finished"])
    assert value["attempts"][1]["first_step"] == 21  # from the commit at step 20


def test_output_arrives_while_the_program_runs_and_cancel_ends_it(remote):
    run_id = remote.submit(command=("bash", "-c", "echo early; sleep 600"))
    for attempt in ("0", "1"):
        shown = ("logs", run_id, "--attempt", attempt)
        remote.wait_for(lambda shown=shown: "early" in remote.call(*shown).stdout, 40, "the output", run_id)
        if attempt == "0":
            remote.ok("cancel", run_id)
            remote.ok("resume", run_id)
    assert "cancelled" in remote.ok("cancel", run_id)
    assert remote.status(run_id)["state"] == "cancelled"
    remote.wait_for(lambda: remote.alive(run_id) == [], 10, "all processes to be gone", run_id)


def test_all_output_is_stored_in_parts_and_secrets_stay_out(remote, tmp_path):
    remote.env["MY_TOKEN"] = "hunter2-very-secret"
    program = "seq 100000; sleep 3; echo token $MY_TOKEN; printf 'no newline'"
    run_id = remote.submit("secrets=[MY_TOKEN]", command=("bash", "-c", program))
    remote.wait(run_id, "finished")
    lines = remote.ok("logs", run_id).splitlines()
    assert lines == [*map(str, range(1, 100001)), "token [secret]", "no newline"]
    (secrets,) = (tmp_path / "data").rglob("*.json")
    assert secrets.stat().st_mode & 0o777 == 0o600


def test_a_store_out_of_reach_keeps_neither_ranks_nor_signals_waiting(remote, s3_server):
    """The server stands still for a while; a stop request in the middle of that is passed on at once."""
    program = "trap 'echo stopped; exit 75' TERM; echo begun; for i in $(seq 300); do sleep 0.1; done"
    run_id = remote.submit(command=("bash", "-c", program))
    remote.wait_for(lambda: "begun" in remote.call("logs", run_id).stdout, 40, "the output", run_id)
    pid, server, (rank,) = supervisor(remote, run_id), server_pid(s3_server), remote.ranks(run_id).values()
    os.kill(server, signal.SIGSTOP)
    try:
        time.sleep(8)
        os.kill(rank, 0)
        os.kill(pid, signal.SIGTERM)
        remote.wait_for(lambda: rank not in remote.ranks(run_id).values(), 15, "the rank to stop", run_id)
    finally:
        os.kill(server, signal.SIGCONT)
    remote.wait_for(lambda: len(remote.status(run_id)["attempts"]) == 2, 60, "the next attempt", run_id)
    assert remote.status(run_id)["attempts"][0]["reason"] == "preempted"
    remote.ok("cancel", run_id)


def server_pid(endpoint):
    """The S3 server's process, by the port on its command line."""
    option = f"-s3.port={endpoint.rsplit(':', 1)[1]}".encode()
    (pid,) = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if option in read(path).split(b"\0")]
    return int(pid)


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("env", "url", "code", "message"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:{port}"}, "s3://runs/x", 1, "did not answer as it should"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "s3://runs/x", 2, "access denied"),
        ({}, "memory://x", 2, "give a path or an object store"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_at_once(s3_server, dead_port, env, url, code, message):
    launcher = Launcher(url, "local", **{name: value.format(port=dead_port) for name, value in env.items()})
    done = launcher.call("submit", "--backend", "local", "code.enabled=false", "--", "true")
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert message in done.stderr
