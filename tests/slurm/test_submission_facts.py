"""What sbatch takes, what it refuses, and what becomes of what it was given."""

from __future__ import annotations

import errno
import os
import resource
import socket
from pathlib import Path

import pytest

from tests.slurm import cluster
from tests.slurm.cluster import job, run, wait_file, wait_for, wait_job
from tests.slurm.fixtures import Submit

pytestmark = pytest.mark.usefixtures("slurm")


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

    wait_for(shown, 60, "the command line to be in the accounting")


def test_export_none_reaches_inner_steps_unless_srun_says_otherwise(submit: Submit, tmp_path: Path) -> None:
    script = f"""
cd {tmp_path}
srun bash -c true; echo $? >plain
srun --export=ALL bash -c true; echo $? >all
"""
    submit(script, "--export=NONE")
    assert wait_file(tmp_path / "plain") != "0\n"
    assert wait_file(tmp_path / "all") == "0\n"


def test_a_log_is_named_by_patterns(submit: Submit, scratch: Path) -> None:
    name = f"{scratch}/%j-%A-%a-%x-%u-%N-%n-%t-%s"
    jobid = submit(f"srun --output={name}.step true", "--job-name=named", f"--output={name}.batch", "--nodelist=n2")
    wait_job(jobid, JobState="COMPLETED")
    # Without an array %a is this number; %t and %n are those of the first task and node.
    common = f"{jobid}-{jobid}-4294967294-named-root"
    host = socket.gethostname().split(".")[0]
    names = {f"{common}-{host}-0-0-0.step", f"{common}-{host}-0-0-batch.batch"}
    assert {path.name for path in scratch.iterdir()} == names


def test_a_slash_in_a_name_leads_the_log_elsewhere(submit: Submit, scratch: Path) -> None:
    (scratch / "logs").mkdir()
    wait_job(submit("true", "--job-name=../up", f"--output={scratch}/logs/%x"), JobState="COMPLETED")
    assert (scratch / "up").exists()


PARSED = [
    (" #SBATCH --comment=x", None),  # not in the first column
    ("true\n#SBATCH --comment=x", None),  # after the first command
    ("#SBATCH --comment='a  b'", "a  b"),
    ("#SBATCH --comment='a\\'b'", "a'b"),  # unlike in a shell
    ('#SBATCH --comment="a\\\\b"', "a\\b"),
    ("#SBATCH --comment=a#b", "a"),
    ("#SBATCH --comment=a # --hold", "a"),
    ('#SBATCH "" --comment=x', None),
]


@pytest.mark.parametrize(("lines", "comment"), PARSED)
def test_what_sbatch_reads_of_a_line(lines: str, comment: str | None, submit: Submit) -> None:
    jobid = submit(f"#!/bin/bash\n{lines}\ntrue", "--hold")
    assert job(jobid).get("Comment") == comment


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/bin/bash\n#SBATCH --comment='a\ntrue\n", "Unmatched"),
        ("#!/bin/bash\n#SBATCH --comment=a\\ b\ntrue\n", "Invalid directive found in batch script: b"),
        ("#!/bin/bash\r\ntrue\r\n", "DOS line breaks"),
        ("#!/bin/bash\n" + "#" * 4 * 2**20, "parameter too long"),
        ("true\n", "must start with #!"),
    ],
    ids=["open quote", "escaped blank", "CRLF", "4 MiB", "no #!"],
)
def test_scripts_that_sbatch_refuses(script: str, message: str) -> None:
    result = run(["sbatch", "--hold"], check=False, input=script)
    assert (result.returncode in (1, 255), result.stdout) == (True, "")
    assert message in result.stderr


def test_an_unknown_option_is_255() -> None:
    assert run(["sbatch", "--bogus", "--wrap=true"], check=False).returncode == 255


def test_an_environment_has_the_size_that_the_kernel_allows(submit: Submit) -> None:
    def environment(size: int) -> dict[str, str]:
        return {**os.environ, **{f"BIG{number}": "x" * 100_000 for number in range(size // 100_000)}}

    allowed = resource.getrlimit(resource.RLIMIT_STACK)[0] // 4
    assert job(submit("true", "--hold", env=environment(allowed - 200_000)))["JobState"] == "PENDING"
    with pytest.raises(OSError, match="Argument list too long") as error:
        submit("true", "--hold", env=environment(allowed + 900_000))
    assert error.value.errno == errno.E2BIG


def test_quotes_in_export_are_kept(submit: Submit, tmp_path: Path) -> None:
    submit(f'echo "$ONE" >{tmp_path}/one', "--export=ALL,ONE='a,b'")
    assert wait_file(tmp_path / "one") == "'a,b'\n"


def test_the_environment_is_stored_for_root_alone(submit: Submit) -> None:
    jobid = submit("true", "--hold", env={**os.environ, "TOKEN": "secret"})
    (stored,) = (cluster.STATE_DIR / "state").glob(f"hash.*/job.{jobid}/environment")
    assert b"TOKEN=secret" in stored.read_bytes()
    assert (stored.stat().st_mode & 0o077, stored.stat().st_uid) == (0, 0)
