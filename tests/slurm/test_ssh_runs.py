"""Runs on the real SLURM from a machine that is not on the cluster: through a real sshd, as from a laptop."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.launcher.harness import TINY, TREE, Launcher
from tests.slurm import cluster
from tests.ssh.sshd import Sshd

PYTHON = f"cluster.python={sys.executable}"
# sbatch on the login node: SLURM takes the job, and then the connection breaks, the first time.
CUT = """#!/bin/sh
job=$(/usr/bin/sbatch "$@") || exit 1
echo "$job" >> {count}
if [ "$(wc -l < {count})" = 1 ]; then kill -KILL $(ps -o ppid= -p $(ps -o ppid= -p $PPID)); fi
echo "$job"
"""


@pytest.fixture
def login(slurm, tmp_path):
    """A login node, whose home and whose sbatch a test may change."""
    for name in ("home", "programs"):
        (tmp_path / name).mkdir()
    path = f"{tmp_path}/programs:{os.environ['PATH']}"
    # What its user's profile would set; jobs find this very llmops.
    known = {"PATH": path, "HOME": f"{tmp_path}/home", "PYTHONPATH": str(TREE)}
    known |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    options = "SetEnv " + " ".join(f"{name}={value}" for name, value in known.items())
    daemon = Sshd(tmp_path / "sshd", options=f"{options}\n")
    yield daemon
    daemon.stop()


@pytest.fixture
def laptop(login, tmp_path):
    """A launcher on a machine without SLURM's commands."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ssh", "git", "sh", "bash"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    places = {"XDG_STATE_HOME": str(tmp_path / "state"), "LLMOPS_SSH_CONFIG": str(login.config)}
    launcher = Launcher(tmp_path / "runs", "slurm", PATH=str(programs), **places)
    launcher.env["LLMOPS_RUNS_URL"] = f"ssh://login{launcher.url}"
    yield launcher
    cluster.cancel_all()


def test_a_run_is_submitted_watched_cancelled_and_resumed_from_elsewhere(laptop, login, undisturbed):
    assert Path("/usr/bin/sbatch").exists()
    assert "/usr/bin" not in laptop.env["PATH"]
    run_id = laptop.submit(*TINY, PYTHON)
    (archive,) = (laptop.root / "code").iterdir()
    sent = archive.stat()
    record = json.loads((laptop.root / run_id / "run.json").read_text())
    assert record["code"]["sha256"] == archive.name.partition(".")[0]
    assert record["code"]["dirty"] is not None
    laptop.wait_step(run_id, 12)
    assert "running" in laptop.ok("status", "--state", "running", run_id)
    laptop.ok("cancel", "--graceful", run_id)
    laptop.wait(run_id, "cancelled")
    laptop.ok("resume", run_id)
    followed = laptop.ok("logs", "-f", run_id)
    assert "[0/0] step" in followed
    assert "[1/0] step" in followed
    value = laptop.wait(run_id, "finished")
    assert value["url"] == f"{laptop.env['LLMOPS_RUNS_URL']}/{run_id}"
    assert laptop.losses(run_id) == undisturbed
    assert "latest" in laptop.ok("ckpt", "ls", run_id)
    assert " ok " in laptop.ok("ckpt", "verify", run_id)
    found = json.loads(laptop.ok("diff", "--json", run_id, run_id))
    assert (found["problems"], found["data"], found["code"]["same"]) == ([], [], True)
    laptop.submit("cluster.time=5", PYTHON, command=("true",))
    (again,) = (laptop.root / "code").iterdir()
    assert (again.stat().st_ino, again.stat().st_mtime_ns) == (sent.st_ino, sent.st_mtime_ns), "sent once"
    assert len(login.connections()) == 1


def test_a_connection_that_breaks_in_mid_submit_leaves_one_job(laptop, login, tmp_path):
    wrapper = tmp_path / "programs/sbatch"
    wrapper.write_text(CUT.format(count=tmp_path / "count"))
    wrapper.chmod(0o755)
    run_id = laptop.submit(PYTHON, command=("sleep", "300"))
    (job_id,) = (tmp_path / "count").read_text().split()
    assert laptop.status(run_id)["job_ids"] == [job_id]
    assert cluster.run(["squeue", "-h", "-o", "%A"]).stdout.split() == [job_id]


def test_with_an_object_store_only_slurm_is_asked_over_ssh(laptop, s3_url, tmp_path):
    laptop.env |= {"LLMOPS_RUNS_URL": s3_url, "TOKEN": "hidden-value"}
    laptop.url = s3_url
    show = ("sh", "-c", "echo token of ${#TOKEN} characters")
    run_id = laptop.submit("cluster.host=login", PYTHON, "secrets=[TOKEN]", command=show)
    laptop.wait(run_id, "finished")
    assert "token of 12 characters" in laptop.ok("logs", run_id)
    (secrets,) = (tmp_path / "home/.local/share/llmops/secrets").iterdir()
    assert secrets.stat().st_mode & 0o777 == 0o600
    assert list((tmp_path / "home").glob(f"{run_id}.*.out"))


def test_a_sweep_is_submitted_and_watched_from_elsewhere(laptop):
    sizes = ("train.max_steps=10", "train.warmup_steps=2", "train.lr=1e-3,3e-3", PYTHON, "cluster.cpus_per_rank=1")
    laptop.ok("sweep", "--backend", "slurm", "--name", "far", *TINY, *sizes)

    def ended():
        states = json.loads(laptop.ok("sweep", "status", "far", "--json"))["states"]
        return states if sum(states.get(state, 0) for state in ("complete", "failed")) == 2 else None

    laptop.wait_for(ended, 240, "two trials to end", "far")
    assert ended() == {"complete": 2}
    assert "step" in laptop.ok("logs", "far/0")


def test_what_cannot_work_over_ssh_is_refused(laptop, tmp_path):
    def refused(said, *arguments, code=2):
        done = laptop.call("submit", "--backend", *arguments, "--", "true")
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert said in done.stderr

    refused("there is no such partition", "slurm", "cluster.partition=none")
    refused("name different hosts", "slurm", "cluster.host=other")
    refused("is no host", "slurm", "cluster.host=-oProxyCommand=x")
    refused("cannot reach it", "local")
    refused("ssh://login/scratch", "slurm", "cluster.host=login", "runs_url=/scratch")
    refused("runs cannot be kept there", "slurm", f"runs_url=ssh://login{login_file(tmp_path)}/runs")
    assert not laptop.root.exists()


def login_file(tmp_path):
    """Where a folder is expected."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file"
