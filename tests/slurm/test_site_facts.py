"""Sites that are configured otherwise: enforced accounts and limits, no requeue by default, a short requeue wait."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import datetime

import pytest

from tests.slurm import cluster
from tests.slurm.cluster import job, requeue, run, wait_for, wait_job, wait_running
from tests.slurm.fixtures import Submit

USER = "llmops"


@pytest.fixture(scope="module", autouse=True)
def site(slurm: object) -> Iterator[None]:
    """The cluster as such a site has it."""
    auth = f"AuthInfo={cluster.show_config('AuthInfo')},cred_expire=5"
    lines = ["AccountingStorageEnforce=associations,limits,qos", "JobRequeue=0", auth]
    with cluster.settings(LLMOPS_SLURM_CONF=";".join(lines)):
        yield


def sacctmgr(*arguments: str, check: bool = True) -> None:
    run(["sacctmgr", "-i", *arguments], check=check)


@pytest.fixture
def limits(site: None) -> Iterator[None]:
    """Whatever limits the test gave the user are gone afterwards."""
    yield
    run(["scancel", f"--user={USER}"])
    sacctmgr("modify", "user", USER, "set", "MaxSubmitJobs=-1", "MaxJobs=-1", "qos=normal")
    sacctmgr("delete", "qos", "brief", check=False)


def known(field: str, value: str) -> None:
    """Wait until slurmctld has heard of a limit from slurmdbd."""
    show = ["scontrol", "-o", "show", "assoc_mgr", f"users={USER}", "flags=assoc"]
    wait_for(lambda: f"{field}={value}" in run(show).stdout, 60, f"slurmctld to know {field}={value}")


def sbatch(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["sbatch", "--parsable", "--output=/dev/null", *options, "--wrap=sleep 60"]
    return run(command, check=False, user=USER, cwd="/")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--account=nope", "Invalid account or account/partition combination specified"),
        ("--qos=nope", "Invalid qos specification"),
    ],
)
def test_unknown_accounts_are_refused_where_they_are_enforced(option: str, message: str) -> None:
    result = sbatch(option)
    assert result.returncode == 1
    assert message in result.stderr


def test_more_jobs_than_may_be_submitted_are_refused(limits: None) -> None:
    sacctmgr("modify", "user", USER, "set", "MaxSubmitJobs=1")
    known("MaxSubmitJobs", "1")
    assert sbatch("--hold").returncode == 0
    second = sbatch("--hold")
    assert second.returncode == 1
    assert "AssocMaxSubmitJobLimit" in second.stderr
    assert "Job violates accounting/QOS policy" in second.stderr


def test_more_jobs_than_may_run_pend(limits: None) -> None:
    sacctmgr("modify", "user", USER, "set", "MaxJobs=1")
    known("MaxJobs", "1")
    first, second = sbatch().stdout.strip(), sbatch().stdout.strip()
    wait_running(first)
    wait_job(second, JobState="PENDING", Reason="AssocMaxJobsLimit")


def test_more_time_than_the_qos_allows_pends(limits: None) -> None:
    sacctmgr("add", "qos", "brief", "MaxWall=1")
    sacctmgr("modify", "user", USER, "set", "qos+=brief")
    wait_for(lambda: sbatch("--hold", "--qos=brief").returncode == 0, 60, "slurmctld to know the QOS")
    result = sbatch("--qos=brief", "--time=10")
    assert result.returncode == 0
    wait_job(result.stdout.strip(), JobState="PENDING", Reason="QOSMaxWallDurationPerJobLimit")


def test_requeue_can_be_asked_for_where_it_is_not_the_default(submit: Submit) -> None:
    assert job(submit("true", "--hold"))["Requeue"] == "0"
    assert job(submit("true", "--hold", "--requeue"))["Requeue"] == "1"


def test_the_hold_after_a_requeue_is_the_life_of_a_credential(submit: Submit) -> None:
    jobid = submit("sleep 60", "--requeue")
    wait_running(jobid)
    requeue(jobid)
    record = wait_job(jobid, JobState="PENDING", Reason="BeginTime")
    assert (datetime.fromisoformat(record["StartTime"]) - datetime.now()).total_seconds() < 8
    wait_job(jobid, 30, JobState="RUNNING", Restarts="1")
