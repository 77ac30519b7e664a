"""What the launcher takes for granted about SLURM, asked of a real one. Should a release differ, these say where."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

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

pytestmark = pytest.mark.usefixtures("slurm")

Submit = Callable[..., str]

# Shows what a batch script finds when TERM reaches it. TERM often comes twice, and to children too: a second one must
# not kill scontrol. The file appears whole: written aside, then renamed.
RECORD = """
cd {folder}
trap 'trap "" TERM; scontrol -o show job "$SLURM_JOB_ID" >seen.part; {then} mv seen.part seen; exit 0' TERM
echo "${{SLURM_RESTART_COUNT-unset}}" >>starts
sleep 60 & wait
"""


def recorder(folder: Path, then: str = "") -> str:
    return RECORD.format(folder=folder, then=then)


def seen(folder: Path, timeout: float = 20) -> dict[str, str]:
    """What the script of `recorder` saw."""
    return cluster.parse_job(wait_file(folder / "seen", timeout))


def seconds_until(timestamp: str) -> float:
    return (datetime.fromisoformat(timestamp) - datetime.now()).total_seconds()


@pytest.fixture
def submit() -> Iterator[Submit]:
    """`cluster.submit`, whose jobs end with the test."""
    submitted: list[str] = []

    def submit(script: str, *options: str, user: str | None = None) -> str:
        submitted.append(cluster.submit(script, *options, user=user))
        return submitted[-1]

    yield submit
    if submitted:
        run(["scancel", *submitted], check=False)


@pytest.fixture(scope="module", autouse=True)
def expiring(slurm: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job on its way to its time limit, started first because slurmctld takes up to 30 s to notice."""
    folder = tmp_path_factory.mktemp("expiring")
    jobid = cluster.submit(recorder(folder, "scontrol requeue $SLURM_JOB_ID;"), "--nodelist=n4")
    wait_running(jobid)
    cluster.expire(jobid)
    return jobid, folder


# ---- what a batch script sees when its job is stopped ---------------------------------------------------------------


def scancel(jobid: str) -> None:
    run(["scancel", jobid])


def preempt_n1(_: str) -> None:
    preempt("n1")


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


def test_a_lost_node_requeues_the_job(submit: Submit, tmp_path: Path) -> None:
    jobid = submit(recorder(tmp_path), "--nodes=2", "--nodelist=n1,n2")
    wait_file(tmp_path / "starts")
    with cluster.node_down("n2"):
        record = seen(tmp_path)
        assert (record["JobState"], record["Restarts"]) == ("COMPLETING", "1")
        wait_job(jobid, JobState="PENDING", Restarts="1")
        run(["scancel", jobid])
    wait_for(lambda: cluster.attempts(jobid)[0] == "NODE_FAIL", 10, "sacct -D to show the lost attempt")


def test_a_requeue_in_the_trap_brings_a_cancelled_job_back(submit: Submit, tmp_path: Path) -> None:
    jobid = submit(recorder(tmp_path, "scontrol requeue $SLURM_JOB_ID;"))
    wait_file(tmp_path / "starts")
    run(["scancel", jobid])
    wait_job(jobid, JobState="PENDING", Restarts="1")


@pytest.mark.parametrize(
    ("after", "state", "restarts"),
    [("exit 0", "COMPLETED", "0"), ("exit 85", "FAILED", "0"), ("scontrol requeue $SLURM_JOB_ID", "PENDING", "1")],
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
    assert (record["JobState"], record["Restarts"]) == ("RUNNING", "0")
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
    wait_for(lambda: cluster.attempts(jobid) == ["REQUEUED", "PENDING"], 10, "sacct -D to show both attempts")


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
    wait_for(lambda: (scratch / "starts").read_text() == "unset\n1\n", 5, "SLURM_RESTART_COUNT of the second attempt")
    assert logs["append"].read_text().count("one\n") == 2
    wait_job(other, 30, JobState="RUNNING", Restarts="1")
    wait_for(lambda: logs["default"].read_text() == "one\n", 5, "the default open mode to truncate the log")


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

    wait_for(tasks_restarted, 10, f"elements {restarted} to be requeued")


def test_a_singleton_waits_while_the_first_is_requeued(submit: Submit) -> None:
    first = submit("sleep 60", "--job-name=only-one")
    wait_running(first)
    second = submit("sleep 60", "--job-name=only-one", "--dependency=singleton")
    requeue(first)
    wait_job(first, JobState="PENDING", Restarts="1")
    wait_job(second, JobState="PENDING", Reason="Dependency")


# ---- submitting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--nodes=99", "--ntasks=999", "--cpus-per-task=64"])
def test_too_large_a_job_is_accepted_and_never_starts(option: str, submit: Submit) -> None:
    wait_job(submit("true", option), JobState="PENDING", Reason="PartitionConfig")


@pytest.mark.parametrize("option", ["--account=nope", "--qos=nope"])
def test_an_unknown_account_is_accepted_where_none_is_enforced(option: str, submit: Submit) -> None:
    wait_job(submit("true", option), JobState="COMPLETED")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--partition=nope", "invalid partition specified: nope"),
        ("--nodelist=n9", "Invalid node name specified"),
        ("--constraint=x", "Invalid feature specification"),
        ("--mem=900G", "Memory specification can not be satisfied"),
        ("--gres=gpu:8", "Invalid generic resource (gres) specification"),
        ("--array=0-20000", "Invalid job array specification"),
        ("--job-name=" + "x" * 1100, "parameter too long"),
    ],
)
def test_what_sbatch_refuses(option: str, message: str) -> None:
    result = run(["sbatch", option, "--wrap=true"], check=False)
    assert result.returncode == 1
    assert message in result.stderr


def test_a_missing_work_directory_is_replaced_by_the_temporary_folder(submit: Submit, tmp_path: Path) -> None:
    submit(f"pwd >{tmp_path}/pwd", f"--chdir={tmp_path}/missing")
    assert wait_file(tmp_path / "pwd") == "/tmp\n"


def test_a_missing_output_folder_is_made_or_fails_the_job_without_a_log(submit: Submit, scratch: Path) -> None:
    log = scratch / "missing" / "log"
    jobid = submit("echo hello", f"--output={log}")
    record = wait_job(jobid, JobState="FAILED|COMPLETED")
    if record["JobState"] == "COMPLETED":  # 23.11 makes the folder, 22.05 does not
        assert log.read_text() == "hello\n"
    else:
        assert record["ExitCode"] == "0:53"


@pytest.mark.parametrize("text", ['a "b" c', "it's", r"back\slash", "$(id) `id` $HOME", "a#b", "tab\there", "ünï"])
def test_an_sbatch_line_keeps_quoted_text(text: str, submit: Submit) -> None:
    quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    jobid = submit(f"#!/bin/bash\n#SBATCH --comment={quoted}\ntrue", "--hold")
    assert job(jobid)["Comment"] == text


def test_what_is_on_the_command_line_can_be_read_by_every_user(submit: Submit) -> None:
    jobid = submit("true", "--export=ALL,TOKEN=secret")

    def shown() -> bool:
        sacct = ["sacct", "-X", "-n", "-P", "-j", jobid, "-o", "SubmitLine"]
        return "TOKEN=secret" in run(sacct, user="llmops", cwd="/").stdout

    wait_for(shown, 10, "the command line to be in the accounting")


def test_export_none_reaches_inner_steps_unless_srun_says_otherwise(submit: Submit, tmp_path: Path) -> None:
    script = f"""
cd {tmp_path}
srun bash -c true; echo $? >plain
srun --export=ALL bash -c true; echo $? >all
"""
    submit(script, "--export=NONE")
    assert wait_file(tmp_path / "plain") != "0\n"
    assert wait_file(tmp_path / "all") == "0\n"


# ---- exit codes and records -----------------------------------------------------------------------------------------

EXIT_CODES = {7: "7:0", 75: "75:0", 128: "0:0", 137: "9:0", 200: "72:0", 255: "127:0"}


@pytest.fixture(scope="module")
def exited() -> dict[int, str]:
    return {code: cluster.submit(f"exit {code}") for code in EXIT_CODES}


@pytest.mark.parametrize("code", EXIT_CODES)
def test_accounting_drops_bit_7_of_the_exit_code(code: int, exited: dict[int, str]) -> None:
    assert accounting(exited[code], "exitcode") == ["FAILED", EXIT_CODES[code]]


def test_squeue_json_is_there(submit: Submit) -> None:
    jobid = submit("true", "--hold")
    listed = {str(j["job_id"]): j for j in json.loads(run(["squeue", "--json"]).stdout)["jobs"]}
    # A string here, a list of flags since data_parser v0.0.40: the launcher reads `squeue -o` instead.
    assert listed[jobid]["job_state"] in ("PENDING", ["PENDING"])


# ---- daemons that do not answer -------------------------------------------------------------------------------------


def test_an_sbatch_that_timed_out_has_submitted_the_job() -> None:
    tag = f"tag-{os.getpid()}-{time.time_ns()}"
    commands = {
        "sbatch": ["sbatch", "--hold", f"--job-name={tag}", "--output=/dev/null", "--wrap=true"],
        "squeue": ["squeue"],
    }
    started = time.monotonic()
    with cluster.frozen("slurmctld"):
        pipes = {
            name: subprocess.Popen(cmd, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for name, cmd in commands.items()
        }
        errors = {name: process.communicate(timeout=40)[1] for name, process in pipes.items()}
    assert 8 < time.monotonic() - started < 30
    assert {name: process.returncode for name, process in pipes.items()} == {"sbatch": 1, "squeue": 1}
    # 22.05 and 23.11: the text cannot be told from that of a refusal, only the tag tells whether there is a job.
    assert re.search("Socket timed out on send/recv operation|Unexpected message received", errors["sbatch"])
    assert "slurm_load_jobs error" in errors["squeue"]
    found = wait_for(lambda: run(["squeue", "-h", "-n", tag, "-o", "%i"]).stdout.split(), 20, f"job {tag} to show up")
    run(["scancel", *found])
    assert len(found) == 1


def test_without_slurmdbd_jobs_run_and_only_sacct_fails(submit: Submit) -> None:
    pid = cluster.daemon_pid("slurmdbd")
    os.kill(pid, signal.SIGKILL)
    try:
        wait_for(lambda: "Connection refused" in run(["sacct", "-X"], check=False).stderr, 10, "sacct to be refused")
        wait_job(submit("true"), JobState="COMPLETED")
    finally:
        cluster.dev_cluster("up")
    assert run(["sacct", "-X"]).returncode == 0


# Last: by now slurmctld has looked.
def test_a_time_limit_is_named_as_the_reason_and_a_requeue_still_rescues_the_job(expiring: tuple[str, Path]) -> None:
    jobid, folder = expiring
    record = seen(folder, timeout=45)
    assert (record["JobState"], record["Reason"], record["Restarts"]) == ("COMPLETING", "TimeLimit", "0")
    assert re.fullmatch("PENDING|RUNNING", wait_job(jobid, Restarts="1")["JobState"])
    run(["scancel", jobid])
