"""What SLURM's commands say when a daemon does not answer, what they did all the same, and what a lost node costs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster
from tests.slurm.cluster import job, run, wait_for, wait_job
from tests.slurm.fixtures import Submit
from tests.slurm.test_signal_facts import NOBODY, STOP, Witnesses

pytestmark = pytest.mark.usefixtures("slurm")


class Asked:
    """Commands that run at the same time."""

    def __init__(self, **commands: list[str]) -> None:
        self.started = time.monotonic()
        pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.processes = {name: subprocess.Popen(command, **pipes) for name, command in commands.items()}

    def wait(self, *names: str, timeout: float = 40) -> dict[str, tuple[int, str]]:
        """Exit code and standard error of each."""
        ended = {name: self.processes[name].communicate(timeout=timeout)[1] for name in names}
        return {name: (self.processes[name].returncode, text) for name, text in ended.items()}


def test_what_timed_out_has_happened_all_the_same(submit: Submit) -> None:
    tag = f"tag-{os.getpid()}-{time.time_ns()}"
    cancelled = submit("true", "--hold")
    sbatch = ["sbatch", "--hold", f"--job-name={tag}", "--output=/dev/null", "--wrap=true"]
    with cluster.frozen("slurmctld"):
        asked = Asked(
            sbatch=sbatch,
            squeue=["squeue"],
            sinfo=["sinfo"],
            srun=["srun", "true"],
            scancel=["scancel", cancelled],
            scontrol=["scontrol", "show", "job", cancelled],
        )
        said = asked.wait("sbatch", "squeue", "sinfo", "srun", "scancel")
        assert 8 < time.monotonic() - asked.started < 30
        assert asked.processes["scontrol"].poll() is None, "scontrol is more patient"
    assert {name: code for name, (code, _) in said.items()} == {
        **dict.fromkeys(("sbatch", "squeue", "sinfo", "srun"), 1),
        "scancel": 140,
    }
    # 22.05 and 23.11: the text cannot be told from that of a refusal, only the tag tells whether there is a job.
    assert re.search("Socket timed out on send/recv operation|Unexpected message received", said["sbatch"][1])
    assert "slurm_load_jobs error" in said["squeue"][1]
    assert asked.wait("scontrol")["scontrol"][0] == 0
    found = wait_for(lambda: run(["squeue", "-h", "-n", tag, "-o", "%i"]).stdout.split(), 60, f"job {tag} to show up")
    run(["scancel", *found])
    assert len(found) == 1
    wait_job(cancelled, JobState="CANCELLED")


@pytest.fixture
def dead_controller(slurm: object) -> Iterator[None]:
    os.kill(cluster.daemon_pid("slurmctld"), signal.SIGKILL)
    yield
    cluster.dev_cluster("up")


def test_without_slurmctld_every_command_fails(dead_controller: None) -> None:
    wait_for(lambda: run(["scontrol", "ping"], check=False).returncode, 60, "scontrol ping to see it")
    asked = Asked(sbatch=["sbatch", "--wrap=true"], squeue=["squeue"], sinfo=["sinfo"], scancel=["scancel", "1"])
    said = asked.wait(*asked.processes)
    assert {name: code for name, (code, _) in said.items()} == {"sbatch": 1, "squeue": 1, "sinfo": 1, "scancel": 8}
    assert "Unable to contact slurm controller (connect failure)" in said["squeue"][1]


def test_without_slurmdbd_jobs_run_and_only_sacct_fails(submit: Submit) -> None:
    pid = cluster.daemon_pid("slurmdbd")
    os.kill(pid, signal.SIGKILL)
    try:
        wait_for(lambda: "Connection refused" in run(["sacct", "-X"], check=False).stderr, 60, "sacct to be refused")
        wait_job(submit("true"), JobState="COMPLETED")
    finally:
        cluster.dev_cluster("up")
    assert run(["sacct", "-X"]).returncode == 0


def test_a_stopped_slurmdbd_keeps_sacct_waiting_and_nothing_else(submit: Submit) -> None:
    with cluster.frozen("slurmdbd"):
        asked = Asked(sacct=["sacct", "-X"])
        wait_job(submit("true"), JobState="COMPLETED")
        assert asked.processes["sacct"].poll() is None
    assert asked.wait("sacct")["sacct"][0] == 0


# ---- nodes that are lost --------------------------------------------------------------------------------------------


def alive(witnesses: Witnesses, name: str) -> bool:
    return Path(f"/proc/{witnesses.pids[name]}").exists()


@pytest.fixture(scope="module")
def lost(slurm: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Witnesses]]:
    """Jobs on two nodes each whose second node is lost: n2 without its slurmd, n4 with all that runs on it."""
    with cluster.settings(LLMOPS_SLURMD_TIMEOUT="5"):
        nodes = {"waits": "n1,n2", "cancelled": "n1,n2", "all": "n3,n4"}
        jobs = {name: Witnesses(tmp_path_factory.mktemp(name), cluster.submit, where) for name, where in nodes.items()}
        task = jobs["all"].pids["task1"]
        stepd = int(Path(f"/proc/{task}/stat").read_text().rsplit(")", 1)[1].split()[1])
        killed = [cluster.daemon_pid("slurmd.n2"), cluster.daemon_pid("slurmd.n4"), stepd, task]
        for pid in [*killed, jobs["all"].pids["child1"]]:
            os.kill(pid, signal.SIGKILL)
        for each in jobs.values():
            each.wait_heard(["batch", "task0"], STOP, timeout=90)
        yield jobs
        for each in jobs.values():
            (each.folder / "quit").touch()


@pytest.mark.parametrize("name", ["waits", "all"])
def test_a_lost_node_stops_the_survivors_and_requeues_the_job(name: str, lost: dict[str, Witnesses]) -> None:
    assert lost[name].heard("task1") == NOBODY
    assert alive(lost[name], "task1") == (name == "waits"), "what slurmd had started runs on without it"
    assert job(lost[name].jobid)["Restarts"] == "1"
    wait_for(lambda: cluster.attempts(lost[name].jobid)[0] == "NODE_FAIL", 60, "sacct -D to show the lost attempt")


def test_orphans_end_when_their_node_is_back_unless_their_job_is_gone(lost: dict[str, Witnesses]) -> None:
    waits, cancelled = lost["waits"], lost["cancelled"]
    for each in (waits, cancelled):
        for name in ("batch", "batch-child", "task0", "child0"):
            os.kill(each.pids[name], signal.SIGKILL)
        wait_job(each.jobid, JobState="PENDING", Restarts="1")
    run(["scancel", cancelled.jobid])
    wait_job(cancelled.jobid, JobState="CANCELLED")
    cluster.dev_cluster("up")
    wait_for(lambda: not alive(waits, "task1"), 60, "the orphan of the job that waits to be aborted")
    assert alive(cancelled, "task1")
