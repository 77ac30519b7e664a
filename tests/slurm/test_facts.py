"""What a batch script sees of its end, and how a job comes back. Should a SLURM release differ, these say where."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.slurm import cluster
from tests.slurm.cluster import (
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

# Shows what a batch script finds when TERM reaches it. TERM often comes twice, and to children too: a second one must
# not kill scontrol, and the end of a sleep that was told first must not be the script's own; the sleep that follows it
# would keep the step alive. The file appears whole: written aside, then renamed.
RECORD = """
cd {folder}
ended() {{
  trap "" TERM
  kill -9 $! 2>/dev/null
  scontrol -o show job "$SLURM_JOB_ID" >seen.part
  {then} mv seen.part seen
  exit 0
}}
trap ended TERM
echo "${{SLURM_RESTART_COUNT-unset}}" >>starts
while :; do sleep 60 & wait; done
"""


def recorder(folder: Path, then: str = "") -> str:
    return RECORD.format(folder=folder, then=then)


def seen(folder: Path, timeout: float = 20) -> dict[str, str]:
    """What the script of `recorder` saw."""
    return cluster.parse_job(wait_file(folder / "seen", timeout))


def seconds_until(timestamp: str) -> float:
    return (datetime.fromisoformat(timestamp) - datetime.now()).total_seconds()


@pytest.fixture(scope="module")
def expiring(slurm: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A job on its way to its time limit, started first because slurmctld takes up to 30 s to notice."""
    folder = tmp_path_factory.mktemp("expiring")
    jobid = cluster.submit(recorder(folder, "scontrol requeue $SLURM_JOB_ID;"), "--nodelist=n4")
    wait_running(jobid)
    cluster.expire(jobid)
    yield jobid, folder
    run(["scancel", jobid], check=False)  # requeued, it would start again while other modules want the cluster


# ---- what a batch script sees when its job is stopped ---------------------------------------------------------------


def scancel(jobid: str) -> None:
    run(["scancel", jobid])


def preempt_n1(_: str) -> None:
    preempt("n1")


@pytest.mark.signals
@pytest.mark.parametrize(
    ("stop", "options", "restarts", "state_after"),
    [
        pytest.param(requeue, ["--partition=low"], "1", "PENDING", id="requeue"),
        pytest.param(preempt_n1, ["--partition=low"], "1", "PENDING|RUNNING", id="preempted"),
        pytest.param(preempt_n1, ["--partition=cancel"], "0", "PREEMPTED", id="preempted-cancel"),
        pytest.param(preempt_n1, ["--partition=low", "--no-requeue"], "0", "PREEMPTED", id="preempted-no-requeue"),
        pytest.param(scancel, ["--partition=low"], "0", "CANCELLED", id="scancel"),
    ],
)
def test_a_stopped_job_is_completing_and_only_a_requeue_counts_a_restart(
    stop: Callable[[str], None], options: list[str], restarts: str, state_after: str, submit: Submit, tmp_path: Path
) -> None:
    jobid = submit(recorder(tmp_path), "--nodelist=n1", *options)
    wait_file(tmp_path / "starts")
    stop(jobid)
    record = seen(tmp_path)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETING", restarts)
    assert record["Reason"] != "TimeLimit"
    wait_job(jobid, JobState=state_after, Restarts=restarts)


@pytest.mark.usefixtures("expiring")
def test_a_lost_node_requeues_the_job(submit: Submit, tmp_path: Path) -> None:
    jobid = submit(recorder(tmp_path), "--nodes=2", "--nodelist=n1,n2")
    wait_file(tmp_path / "starts")
    with cluster.node_down("n2"):
        record = seen(tmp_path)
        assert (record["JobState"], record["Restarts"]) == ("COMPLETING", "1")
        wait_job(jobid, JobState="PENDING", Restarts="1")
        run(["scancel", jobid])
    wait_for(lambda: cluster.attempts(jobid)[0] == "NODE_FAIL", 60, "sacct -D to show the lost attempt")


def test_a_requeue_in_the_trap_brings_a_cancelled_job_back(submit: Submit, tmp_path: Path) -> None:
    jobid = submit(recorder(tmp_path, "scontrol requeue $SLURM_JOB_ID;"))
    wait_file(tmp_path / "starts")
    run(["scancel", jobid])
    wait_job(jobid, JobState="PENDING", Restarts="1")


@pytest.mark.signals
@pytest.mark.parametrize(
    ("after", "state", "restarts"),
    [
        ("exit 0", "COMPLETED", "0"),
        pytest.param("exit 85", "FAILED", "0", marks=pytest.mark.long),
        ("scontrol requeue $SLURM_JOB_ID", "PENDING", "1"),
    ],
)
def test_under_grace_time_only_the_steps_get_term_and_the_job_must_requeue_itself(
    after: str, state: str, restarts: str, submit: Submit, tmp_path: Path
) -> None:
    step = tmp_path / "step.sh"
    step.write_text("#!/bin/bash\n" + recorder(tmp_path))
    step.chmod(0o755)
    batch = f"trap 'echo TERM >{tmp_path}/batch' TERM; srun {step}; {after}"
    jobid = submit(batch, "--partition=lowgrace", "--nodelist=n1")
    wait_file(tmp_path / "starts")
    preempt("n1")
    record = seen(tmp_path)
    # SIGNALING is what RUNNING is called while the signal is on its way.
    assert record["JobState"] in ("RUNNING", "SIGNALING")
    assert record["Restarts"] == "0"
    assert record["PreemptTime"] != "None"
    wait_job(jobid, JobState=state, Restarts=restarts)
    assert not (tmp_path / "batch").exists()


# ---- coming back ----------------------------------------------------------------------------------------------------


def test_a_requeued_job_is_held_for_two_minutes(submit: Submit, tmp_path: Path) -> None:
    jobid = submit(recorder(tmp_path))
    wait_file(tmp_path / "starts")
    requeue(jobid)
    record = wait_job(jobid, JobState="PENDING", Reason="BeginTime")
    assert 110 < seconds_until(record["StartTime"]) <= 122
    wait_for(lambda: cluster.attempts(jobid) == ["REQUEUED", "PENDING"], 60, "sacct -D to show both attempts")


def test_an_ordinary_user_cuts_the_hold_while_completing_but_not_while_running(submit: Submit, scratch: Path) -> None:
    kick = "scontrol update jobid=$SLURM_JOB_ID StartTime=now+5; echo $?"
    script = recorder(scratch, f"({kick}) >kick;") + "\necho $SLURM_RESTART_COUNT"
    running = f"({kick}) >{scratch}/kick-running 2>&1;"
    logs = {mode: scratch / f"{mode}.log" for mode in ("default", "append")}
    other = submit("echo one; sleep 60", f"--output={logs['default']}", user="llmops")
    jobid = submit(f"echo one; {running} {script}", "--open-mode=append", f"--output={logs['append']}", user="llmops")
    assert wait_file(scratch / "starts") == "unset\n"
    assert wait_file(scratch / "kick-running").endswith("1\n")
    wait_file(logs["default"])
    logs["default"].write_text("the first attempt's log\n")
    requeue(jobid)
    requeue(other)
    assert wait_file(scratch / "kick") == "0\n"
    wait_job(other, JobState="PENDING")
    run(["scontrol", "update", f"jobid={other}", "StartTime=now+4"])
    started = time.monotonic()
    wait_job(jobid, 30, JobState="RUNNING", Restarts="1")
    assert time.monotonic() - started < 20
    wait_for(lambda: (scratch / "starts").read_text() == "unset\n1\n", 60, "SLURM_RESTART_COUNT of the second attempt")
    assert logs["append"].read_text().count("one\n") == 2
    wait_job(other, 30, JobState="RUNNING", Restarts="1")
    wait_for(lambda: logs["default"].read_text() == "one\n", 60, "the default open mode to truncate the log")


def test_a_start_that_comes_before_the_end_of_the_job_is_forgotten(submit: Submit, tmp_path: Path) -> None:
    jobid = submit(recorder(tmp_path, "scontrol update jobid=$SLURM_JOB_ID StartTime=now+2; echo $? >kick; sleep 5;"))
    wait_file(tmp_path / "starts")
    requeue(jobid)
    assert wait_file(tmp_path / "kick") == "0\n"
    record = wait_job(jobid, JobState="PENDING", Reason="BeginTime")
    assert seconds_until(record["StartTime"]) > 60
    run(["scontrol", "update", f"jobid={jobid}", "StartTime=now+3"])
    wait_job(jobid, 30, JobState="RUNNING", Restarts="1")


def test_a_start_in_the_second_of_the_kill_fails_the_job_for_good(submit: Submit, tmp_path: Path) -> None:
    def survived(number: int) -> bool:
        again = tmp_path / f"{number}"
        jobid = submit(f"[ -z $SLURM_RESTART_COUNT ] || echo >{again}; exec sleep 60")
        wait_running(jobid)
        time.sleep(1 - time.time() % 1)  # a second begins
        requeue(jobid)
        wait_job(jobid, JobState="PENDING")
        run(["scontrol", "update", f"jobid={jobid}", "StartTime=now"])
        wait_for(lambda: again.exists() or job(jobid)["JobState"] == "FAILED", 30, f"job {jobid} to start or fail")
        log = (cluster.STATE_DIR / "log" / "slurmctld.log").read_text()
        assert again.exists() or f"Killing non-startable batch JobId={jobid}: Job credential revoked" in log
        return again.exists()

    # It takes a machine that is quick enough.
    assert not all(survived(number) for number in range(10))


def test_requeue_is_refused_where_the_job_forbids_it(submit: Submit) -> None:
    jobid = submit("sleep 60", "--no-requeue")
    wait_running(jobid)
    result = run(["scontrol", "requeue", jobid], check=False)
    assert result.returncode == 1
    assert "Requested operation is presently disabled" in result.stderr


def test_a_requeue_revives_a_job_that_has_just_failed(submit: Submit) -> None:
    jobid = submit("exit 3")
    wait_job(jobid, JobState="FAILED")
    requeue(jobid)
    wait_job(jobid, JobState="PENDING", Restarts="1")


@pytest.mark.parametrize(("form", "restarted"), [("{id}", {"0", "1"}), ("{id}_1", {"1"})])
def test_the_last_element_of_an_array_has_the_id_of_the_array(
    form: str, restarted: set[str], submit: Submit, tmp_path: Path
) -> None:
    array = submit(f"echo $SLURM_JOB_ID >{tmp_path}/$SLURM_ARRAY_TASK_ID; sleep 60", "--array=0-1")
    ids = [wait_file(tmp_path / task).strip() for task in ("0", "1")]
    assert ids[0] != array == ids[1]
    requeue(form.format(id=ids[1]))

    def tasks_restarted() -> bool:
        return {j["ArrayTaskId"] for j in jobs(array) if j["Restarts"] == "1"} == restarted

    wait_for(tasks_restarted, 60, f"elements {restarted} to be requeued")


@pytest.mark.parametrize("kill", ["0", "1"])
def test_other_ranks_outlive_a_failed_one_unless_its_exit_code_is_given_up(
    kill: str, submit: Submit, tmp_path: Path
) -> None:
    first = "sleep 0.5; echo >gone; exit 7"
    second = "until [ -e gone ]; do sleep 0.1; done; sleep 3; echo >survived"
    rank = f"if [ $SLURM_PROCID = 0 ]; then {first}; else {second}; fi"
    submit(f"cd {tmp_path}; srun --ntasks=2 --kill-on-bad-exit={kill} bash -c '{rank}'; echo $? >rc", "--ntasks=2")
    code = wait_file(tmp_path / "rc")
    assert ((tmp_path / "survived").exists(), code == "7\n") == (kill == "0", kill == "0")


# Last: by now slurmctld has looked.
def test_a_time_limit_is_named_as_the_reason_and_a_requeue_still_rescues_the_job(expiring: tuple[str, Path]) -> None:
    jobid, folder = expiring
    record = seen(folder, timeout=45)
    assert (record["JobState"], record["Reason"], record["Restarts"]) == ("COMPLETING", "TimeLimit", "0")
    assert re.fullmatch("PENDING|RUNNING", wait_job(jobid, Restarts="1")["JobState"])
    run(["scancel", jobid])
