"""How often the launcher asks SLURM, what it does without an answer, and that none of it needs privileges."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from llmops.backends.slurm_limits import SHARED, file_system
from tests.conftest import RunMaker
from tests.launcher.harness import TINY, TREE, Launcher
from tests.slurm import cluster

ASKED = ("squeue", "sacct", "scontrol", "sinfo", "sbatch", "scancel")
# Logs the launcher's calls (those of supervisors inside jobs are not its own), then does as it is told, or asks SLURM.
WRAPPER = """#!/bin/bash
[ -n "$SLURM_JOB_ID" ] || echo "{name} $*" >> {folder}/calls
[ -n "$SLURM_JOB_ID" ] || [ ! -e {folder}/instead.{name} ] || . {folder}/instead.{name}
exec {real} "$@"
"""
NO_CODE = ("code.enabled=false", "retry.max_no_progress=1")


class Counted(Launcher):
    """A launcher whose SLURM commands are counted, and can be made to fail."""

    def __init__(self, root: Path, folder: Path) -> None:
        folder.mkdir()
        for name in ASKED:
            real = shutil.which(name)
            assert real is not None
            (folder / name).write_text(WRAPPER.format(name=name, folder=folder, real=real))
            (folder / name).chmod(0o755)
        super().__init__(root, "slurm", PATH=f"{folder}:{os.environ['PATH']}")
        self.folder = folder

    def calls(self) -> list[str]:
        """Commands called since the last time this was asked."""
        log = self.folder / "calls"
        names = [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    def instead(self, name: str, script: str) -> None:
        """From now on, this happens when a command is called."""
        (self.folder / f"instead.{name}").write_text(script)


@pytest.fixture
def counted(slurm, tmp_path):
    yield Counted(tmp_path / "runs", tmp_path / "bin")
    cluster.cancel_all()


def made_runs(root: Path, count: int) -> None:
    """Runs whose job SLURM has forgotten long ago: some ended, some were lost."""
    make = RunMaker(str(root))
    for number in range(count):
        run = make(f"made{number}")
        run.submission(0, job_id=str(900_000 + number))
        run.start(0)
        if number % 2:
            run.end(0, "failed")


def test_a_status_of_many_runs_asks_once(counted):
    running = counted.submit(*NO_CODE, "--name", "running", command=("sleep", "600"))
    held = counted.submit(*NO_CODE, 'cluster.extra=["--hold"]', "--name", "held", command=("true",))
    called_off = counted.submit(*NO_CODE, 'cluster.extra=["--hold"]', "--name", "off", command=("true",))
    finished = counted.submit(*NO_CODE, "--name", "finished", command=("true",))
    failed = counted.submit(*NO_CODE, "--name", "failed", command=("false",))
    counted.ok("cancel", called_off)
    counted.wait(finished, "finished")
    counted.wait(failed, "failed")
    counted.wait(running, "running")
    made_runs(counted.root, 25)
    counted.calls()
    values = {value["id"]: value for value in json.loads(counted.ok("status", "--json"))}
    assert sorted(counted.calls()) == ["sacct", "squeue"]
    assert len(values) == 30
    expected = {running: "running", held: "pending", called_off: "cancelled", finished: "finished", failed: "failed"}
    assert {run_id: values[run_id]["state"] for run_id in expected} == expected
    others = {value["state"] for run_id, value in values.items() if run_id not in expected}
    assert others == {"failed"}
    # Only those whose end is not written down are asked about.
    counted.ok("status", finished)
    counted.call("status", failed)
    assert counted.calls() == []
    counted.ok("status", running, held)
    assert counted.calls() == ["squeue"]
    counted.ok("logs", running)
    assert counted.calls() == []
    counted.ok("cancel", running)


def test_jobs_that_were_never_written_down_are_found_by_one_look(counted):
    """The launcher died after each of three submissions, and before each of three others."""
    held = [counted.submit(*NO_CODE, 'cluster.extra=["--hold"]', command=("true",)) for _ in range(3)]
    never = [counted.submit(*NO_CODE, 'cluster.extra=["--hold"]', command=("true",)) for _ in range(3)]
    for run_id in held + never:
        record = counted.root / run_id / "job" / "0000" / "job.json"
        if run_id in never:
            cluster.run(["scancel", json.loads(record.read_text())["job_id"]])
            name = json.loads((record.parent / "submission.json").read_text())["tag"]
            # As if it had never been accepted: no job has the name of its submission.
            text = (record.parent / "submission.json").read_text().replace(name, f"{name}x")
            (record.parent / "submission.json").write_text(text)
        record.unlink()
    counted.calls()
    values = {value["id"]: value for value in json.loads(counted.ok("status", "--json"))}
    assert sorted(counted.calls()) == ["sacct", "squeue"]
    assert [values[run_id]["state"] for run_id in held] == ["pending"] * 3
    assert [values[run_id]["state"] for run_id in never] == ["unknown"] * 3
    for run_id in held:
        assert (counted.root / run_id / "job" / "0000" / "job.json").exists()


def test_a_status_of_runs_that_are_over_asks_nobody(counted):
    made = RunMaker(str(counted.root))
    for number in range(30):
        run = made(f"over{number}")
        run.submission(0, job_id=str(900_000 + number))
        run.start(0)
        run.end(0, ("finished", "failed", "cancelled")[number % 3])
    states = [value["state"] for value in json.loads(counted.ok("status", "--json"))]
    assert states == ["finished", "failed", "cancelled"] * 10
    assert counted.calls() == []


def test_a_submission_asks_for_the_partitions_once(counted):
    counted.ok("submit", "--backend", "slurm", *NO_CODE, "--name", "one", "--", "true")
    local_disk = not SHARED.match(file_system(counted.root))
    # On a disk of this machine it must be known whether all nodes are this machine.
    assert counted.calls() == ["sinfo", *(["sinfo"] if local_disk else []), "sbatch"]
    counted.ok("render", "--backend", "slurm", "--", "true")
    assert set(counted.calls()) == {"sinfo"}
    counted.wait("one", "finished")


def test_without_accounting(counted):
    counted.instead("sacct", "echo 'sacct: error: Problem talking to the database: Connection refused' >&2; exit 1")
    running = counted.submit(*NO_CODE, "--name", "running", command=("sleep", "600"))
    counted.wait(running, "running")
    made_runs(counted.root, 2)
    done = counted.call("status", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    lost, ended, live = json.loads(done.stdout)
    assert (lost["state"], ended["state"], live["state"]) == ("failed", "failed", "running")
    assert "SLURM knows no such job" in lost["reason"]
    assert "cancelled" in counted.ok("cancel", running)


def test_without_the_controller(counted):
    running = counted.submit(*NO_CODE, "--name", "running", command=("sleep", "600"))
    counted.wait(running, "running")
    counted.wait_for(lambda: counted.ranks(running), 30, "its rank", running)
    refused = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    counted.instead("squeue", f"echo '{refused}' >&2; exit 1")
    for arguments in (["status"], ["status", "running"], ["status", "--json"]):
        done = counted.call(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "unknown" in done.stdout
        assert "Unable to contact slurm controller" in done.stdout
    assert "attempt 0 was running" in counted.status(running)["reason"]
    refused_resume = counted.call("resume", running)
    assert refused_resume.returncode == 1
    assert "it is not known whether its job still lives" in refused_resume.stderr
    counted.instead("squeue", "exec sleep 600")
    start = time.monotonic()
    assert counted.status(running)["state"] == "unknown"
    assert time.monotonic() - start < 45
    (counted.folder / "instead.squeue").unlink()
    assert counted.status(running)["state"] == "running"
    counted.ok("cancel", running)


class Unprivileged(Launcher):
    """Everything as the cluster's ordinary user."""

    USER = "llmops"
    python, tree = sys.executable, TREE

    def call(self, *arguments, timeout=120):
        return cluster.run(
            [self.python, "-m", "llmops", *arguments], timeout, user=self.USER, env=self.env, cwd=self.tree, check=False
        )

    def use(self, python, tree, packages):
        """Run this interpreter on this copy of the project; whether the user can."""
        self.python, self.tree = str(python), tree
        self.env["PYTHONPATH"] = f"{tree}:{packages}"
        check = [self.python, "-c", "import llmops.api, torch"]
        with contextlib.suppress(OSError):
            return cluster.run(check, 60, user=self.USER, env=self.env, cwd=tree, check=False).returncode == 0
        return False


def copy(source, target, *left_out):
    """Copy a folder so that everybody may read it."""
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", *left_out))
    cluster.run(["chmod", "-R", "a+rX", str(target)], timeout=120)
    return target


def make_usable(launcher, folder):
    """Give the user an interpreter like this one, the project and its packages; copies, where somebody's home or a
    strict umask keeps the originals from him."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = Path(sysconfig.get_path("purelib"))
    system = [f"/usr/bin/{version}", f"/usr/local/bin/{version}"]
    if any(launcher.use(python, TREE, packages) for python in (sys.executable, *system)):
        return
    tree = copy(TREE, folder / "tree", ".git", ".venv", ".*_cache")
    packages = copy(packages, folder / "packages")
    if any(launcher.use(python, tree, packages) for python in system):
        return
    python = copy(sys.base_prefix, folder / "python", "site-packages", "test") / "bin" / version
    launcher.env["LD_LIBRARY_PATH"] = str(folder / "python" / "lib")
    assert launcher.use(python, tree, packages), f"{python} of {sys.base_prefix} does not run where it was copied to"


@pytest.fixture
def unprivileged(slurm, scratch):
    who = pwd.getpwnam(Unprivileged.USER)
    (scratch / "runs").mkdir()
    os.chown(scratch / "runs", who.pw_uid, who.pw_gid)
    launcher = Unprivileged(scratch / "runs", "slurm", HOME=who.pw_dir, USER=who.pw_name, LOGNAME=who.pw_name)
    launcher.env.pop("XDG_CACHE_HOME", None)
    make_usable(launcher, scratch)
    yield launcher
    cluster.cancel_all()


def test_an_ordinary_user(unprivileged, undisturbed):
    run_id = unprivileged.submit(*TINY, "code.enabled=false")
    unprivileged.wait_step(run_id, 12)
    job_id = unprivileged.status(run_id)["job_ids"][0]
    assert f"UserId={Unprivileged.USER}(" in cluster.run(["scontrol", "-o", "show", "job", job_id]).stdout
    cluster.preempt()
    value = unprivileged.wait(run_id, "finished", timeout=150)
    first, second = value["attempts"]
    assert (first["reason"], second["reason"], value["job_ids"]) == ("preempted", "finished", [job_id])
    assert unprivileged.losses(run_id) == undisturbed
    assert second["started"] - first["ended"] < 60, "the two minutes that SLURM holds a requeued job back were cut"
    owners = {path.owner() for path in unprivileged.root.rglob("*")}
    assert owners == {Unprivileged.USER}


def test_an_ordinary_user_cancels(unprivileged):
    run_id = unprivileged.submit(*NO_CODE, command=("sleep", "600"))
    unprivileged.wait_for(lambda: unprivileged.ranks(run_id), 30, "the rank", run_id)
    assert "cancelled" in unprivileged.ok("cancel", run_id)
    assert unprivileged.alive(run_id) == []
