"""What SLURM writes down about jobs, how it is read by programs, and what waits for what."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import cluster
from tests.slurm.cluster import (
    accounting,
    job,
    jobs,
    preempt,
    requeue,
    run,
    wait_file,
    wait_for,
    wait_job,
    wait_running,
)
from tests.slurm.fixtures import Submit

pytestmark = pytest.mark.usefixtures("slurm")

EXIT_CODES = {7: "7:0", 75: "75:0", 128: "0:0", 137: "9:0", 200: "72:0", 255: "127:0"}


@pytest.fixture(scope="module")
def exited() -> dict[int, str]:
    return {code: cluster.submit(f"exit {code}") for code in EXIT_CODES}


@pytest.mark.parametrize("code", EXIT_CODES)
def test_accounting_drops_bit_7_of_the_exit_code(code: int, exited: dict[int, str]) -> None:
    # The state reaches the accounting first, and the code with a later message.
    expected = ["FAILED", EXIT_CODES[code]]
    wait_for(lambda: accounting(exited[code], "exitcode") == expected, 60, f"the exit code of job {exited[code]}")


def test_scontrol_keeps_the_whole_exit_code(exited: dict[int, str]) -> None:
    assert wait_job(exited[200], JobState="FAILED")["ExitCode"] == "200:0"


def test_each_attempt_has_a_row_for_those_who_ask_for_duplicates(submit: Submit, tmp_path: Path) -> None:
    jobid = submit(f"echo up >{tmp_path}/up; exec sleep 60", "--nodelist=n1")
    wait_file(tmp_path / "up")
    preempt("n1")
    wait_job(jobid, JobState="PENDING", Restarts="1")
    wait_for(lambda: cluster.attempts(jobid) == ["PREEMPTED", "PENDING"], 60, "sacct -D to show both attempts")
    sacct = ["sacct", "-X", "-j", jobid]
    assert run([*sacct, "-n", "-P", "-o", "state,start"]).stdout.splitlines()[0].split("|")[0] == "PENDING"
    assert len(run([*sacct, "-n", "-P", "-o", "state"]).stdout.splitlines()) == 1
    states = [str(each["state"]["current"]) for each in json.loads(run([*sacct, "-D", "--json"]).stdout)["jobs"]]
    assert len(states) == 2
    listed = run(["squeue", "-h", "-j", jobid, "-O", "RestartCnt"]).stdout.strip()
    assert listed == job(jobid)["Restarts"] == "1"


def test_a_held_job_is_missing_from_what_sacct_lists_by_time(submit: Submit) -> None:
    jobid = submit("true", "--hold")
    wait_for(lambda: cluster.attempts(jobid) == ["PENDING"], 60, "sacct to know the job")
    assert jobid not in run(["sacct", "-X", "-n", "-P", "-S", "now-1hour", "-o", "jobid"]).stdout.split()


# ---- what waits for what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["singleton", "afterany", "afternotok"])
def test_dependents_wait_while_the_first_is_requeued(kind: str, submit: Submit) -> None:
    first = submit("sleep 60", "--job-name=only-one")
    wait_running(first)
    dependency = kind if kind == "singleton" else f"{kind}:{first}"
    second = submit("sleep 60", "--job-name=only-one", f"--dependency={dependency}")
    requeue(first)
    wait_job(first, JobState="PENDING", Restarts="1")
    wait_job(second, JobState="PENDING", Reason="Dependency")


def test_a_dependency_that_cannot_be_met_pends_unless_told_to_end(submit: Submit) -> None:
    failed = submit("exit 3")
    wait_job(failed, JobState="FAILED")
    waits = submit("true", f"--dependency=afterok:{failed}")
    ends = submit("true", f"--dependency=afterok:{failed}", "--kill-on-invalid-dep=yes")
    wait_job(ends, JobState="CANCELLED")
    wait_job(waits, JobState="PENDING", Reason="DependencyNeverSatisfied")


def test_a_dependency_on_a_job_that_never_was_is_none(submit: Submit) -> None:
    wait_job(submit("true", "--dependency=afterok:999999"), JobState="COMPLETED")


def test_a_heterogeneous_job_is_requeued_through_its_leader_alone(submit: Submit, tmp_path: Path) -> None:
    script = f"#!/bin/bash\n#SBATCH --ntasks=1\n#SBATCH hetjob\n#SBATCH --ntasks=1\necho >{tmp_path}/up; exec sleep 60"
    leader = submit(script)
    wait_file(tmp_path / "up")
    components = {each["HetJobOffset"]: each["JobId"] for each in jobs(leader)}
    assert sorted(components) == ["0", "1"]
    assert components["0"] == leader
    assert run(["scontrol", "requeue", components["1"]], check=False).returncode == 1
    requeue(leader)
    wait_for(lambda: {each["Restarts"] for each in jobs(leader)} == {"1"}, 60, "both components to be requeued")


# ---- for programs ---------------------------------------------------------------------------------------------------


def test_json_and_yaml_are_there(submit: Submit) -> None:
    jobid = submit("true", "--hold")
    listed = {str(each["job_id"]): each for each in json.loads(run(["squeue", "--json"]).stdout)["jobs"]}
    # A string here, a list of flags since data_parser v0.0.40: the launcher reads `squeue -o` instead.
    assert listed[jobid]["job_state"] in ("PENDING", ["PENDING"])
    assert "nodes" in json.loads(run(["sinfo", "--json"]).stdout)
    assert "jobs" in json.loads(run(["sacct", "--json"]).stdout)
    assert "jobs:" in run(["squeue", "--yaml"]).stdout


def test_scontrol_has_no_json_before_23_02() -> None:
    old = tuple(int(part) for part in run(["sinfo", "--version"]).stdout.split()[1].split(".")[:2]) < (23, 2)
    asked = run(["scontrol", "--json", "show", "nodes"], check=False)
    assert ("unrecognized option" in asked.stderr) == (asked.returncode != 0) == old


class UnixConnection(http.client.HTTPConnection):
    """HTTP through a socket in the file system."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


@pytest.fixture
def rest(scratch: Path) -> Iterator[Path]:
    """The socket of a slurmrestd that the ordinary user started."""
    path = scratch / "socket"
    user = pwd.getpwnam("llmops")
    with (scratch / "log").open("w") as log:
        daemon = subprocess.Popen(
            ["slurmrestd", "-a", "rest_auth/local", f"unix:{path}"],
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            cwd="/",
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(path.exists, 60, "slurmrestd to listen")
        yield path
    finally:
        daemon.kill()
        daemon.wait()


def test_slurmrestd_serves_an_ordinary_user(rest: Path) -> None:
    def ask(method: str, path: str, body: object = None) -> Any:
        with contextlib.closing(UnixConnection(rest)) as connection:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read().decode()
            assert answer.status == 200, content
            return json.loads(content)

    assert ask("GET", "/slurm/v0.0.38/ping")["pings"]
    settings = {"name": "rest", "environment": {"PATH": os.environ["PATH"]}, "hold": True}
    settings |= {"current_working_directory": "/tmp", "standard_output": "/dev/null"}
    jobid = ask("POST", "/slurm/v0.0.38/job/submit", {"script": "#!/bin/bash\ntrue\n", "job": settings})["job_id"]
    listed = {each["job_id"]: each["user_name"] for each in ask("GET", "/slurm/v0.0.38/jobs")["jobs"]}
    run(["scancel", str(jobid)])
    assert listed[jobid] == "llmops"


def test_slurmrestd_refuses_root(scratch: Path) -> None:
    done = run(["slurmrestd", "-a", "rest_auth/local", f"unix:{scratch}/socket"], check=False)
    assert done.returncode != 0
    assert "root" in done.stderr
