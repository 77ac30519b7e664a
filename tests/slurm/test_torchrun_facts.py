"""What torchrun does to its workers when it is told to stop: the reason why the supervisor starts ranks itself."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launcher.harness import Launcher
from tests.slurm import cluster
from tests.slurm.cluster import run, wait_file, wait_job
from tests.slurm.fixtures import Submit

HERE = Path(__file__).parent
RANK = str(HERE / "rank.py")
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1

Torchrun = Callable[..., "Job"]


class Job:
    """One torchrun with one worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ready(self) -> Job:
        wait_file(self.folder / "up", 90)
        return self

    def kill(self, *signals: int, pause: float = 0.02) -> None:
        pid = int((self.folder / "torchrun.pid").read_text())
        for number, each in enumerate(signals):
            if number:
                time.sleep(pause)  # what is asked is what signals this far apart do
            os.kill(pid, each)

    def rc(self, timeout: float = 60) -> int:
        """Its exit code as a shell shows it."""
        code = int(wait_file(self.folder / "rc", timeout))
        return 128 - code if code < 0 else code

    @property
    def saved(self) -> bool:
        return (self.folder / "saved").exists()

    def end(self) -> None:
        for name in ("torchrun.pid", "rank.pid"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                os.killpg(int((self.folder / name).read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Torchrun]:
    """Starts a torchrun: seconds that its worker takes to save, what more the worker is told, options, variables."""
    server = subprocess.Popen(
        [sys.executable, str(HERE / "torchrun_server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    jobs: list[Job] = []

    def start(seconds: float, *worker: str, options: tuple[str, ...] = (), script: str = RANK, **env: str) -> Job:
        folder = tmp_path_factory.mktemp("torchrun")
        (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
        line = [str(folder), "--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", *options]
        line += [script, str(folder), str(seconds), *worker]
        assert server.stdin is not None
        print(shlex.join(line), file=server.stdin, flush=True)
        jobs.append(Job(folder))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def patient(start: Torchrun) -> dict[str, Job]:
    """Workers that take 33 s to save, told to stop first and looked at last."""
    jobs = {name: start(33, options=more) for name, more in {"30": (), "100": ("--shutdown-timeout=100",)}.items()}
    for job in jobs.values():
        job.ready().kill(TERM)
    return jobs


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_may_save_and_its_exit_code_is_lost(start: Torchrun, times: int) -> None:
    job = start(2).ready()
    job.kill(*[TERM] * times)
    assert (job.rc(), job.saved) == (1, True)


def test_the_exit_code_of_a_worker_that_fails_is_lost_too(start: Torchrun, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(7)\n")
    assert start(0, script=str(script)).rc() == 1


def test_a_third_term_ends_it_without_a_save(start: Torchrun) -> None:
    job = start(8).ready()
    job.kill(TERM, TERM, TERM, pause=0.7)
    assert (job.rc(), job.saved) == (1, False)


def test_usr1_ends_torchrun_at_once(start: Torchrun) -> None:
    job = start(2).ready()
    job.kill(USR1)
    assert (job.rc(), job.saved) == (138, False)


SIGNALS = "SIGTERM,SIGINT,SIGUSR1"


def test_usr1_is_taken_for_term_where_torchrun_is_asked_to(start: Torchrun) -> None:
    jobs = [start(1, options=(f"--signals-to-handle={SIGNALS}",)), start(1, PET_SIGNALS_TO_HANDLE=SIGNALS)]
    overwritten = start(1, TORCHELASTIC_SIGNALS_TO_HANDLE=SIGNALS)
    for job in [*jobs, overwritten]:
        job.ready().kill(USR1)
    assert [(job.rc(), job.saved) for job in jobs] == [(1, True)] * 2
    assert (overwritten.rc(), overwritten.saved) == (138, False)


def test_the_workers_of_data_loaders_are_killed_unless_they_ignore_term(start: Torchrun) -> None:
    jobs = {handling: start(2, handling) for handling in ("default", "ignore")}
    for job in jobs.values():
        job.ready().kill(TERM)
    assert {handling: (job.rc(), job.saved) for handling, job in jobs.items()} == {
        "default": (1, False),
        "ignore": (1, True),
    }
    assert "was killed before the state was saved" in (jobs["default"].folder / "log").read_text()


def test_workers_are_killed_30_s_after_term_unless_asked_otherwise(start: Torchrun, patient: dict[str, Job]) -> None:
    by_variable = start(8, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1").ready()
    by_variable.kill(TERM)
    assert (by_variable.rc(), by_variable.saved) == (1, False)
    assert {name: (job.rc(), job.saved) for name, job in patient.items()} == {"30": (1, False), "100": (1, True)}


IN_A_COLLECTIVE = """
import os, signal, sys, threading, time
import torch.distributed as dist

rank = os.fork() == 0
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=int(rank), world_size=2)
if rank:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    os.set_blocking(reader, True)
    seen = {}
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: seen.setdefault("handler", time.monotonic()))
    threading.Thread(target=lambda: (os.read(reader, 1), seen.setdefault("thread", time.monotonic()))).start()
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    sent = time.monotonic() + 0.5
    dist.barrier()
    print(seen["thread"] - sent, seen["handler"] - sent, flush=True)
else:
    time.sleep(3)
    dist.barrier()
    os.wait()
os._exit(0)
"""


def test_a_handler_waits_for_the_collective_and_a_wakeup_descriptor_does_not(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", IN_A_COLLECTIVE, str(tmp_path)], timeout=90)
    thread, handler = (float(word) for word in done.stdout.split())
    assert thread < 1.5 < 2 < handler


# ---- the same rank under SLURM --------------------------------------------------------------------------------------


@pytest.mark.signals
def test_under_srun_alone_term_reaches_the_helper_only_with_linuxproc(
    submit: Submit, tmp_path: Path, proctrack: str
) -> None:
    step = f"exec srun {sys.executable} {RANK} {tmp_path} 2 default"
    jobid = submit(step)
    wait_file(tmp_path / "up")
    run(["scancel", "--signal=TERM", jobid])
    wait_job(jobid, JobState="FAILED", ExitCode="85:0" if proctrack == "cgroup" else "1:0")
    assert (tmp_path / "saved").exists() == (proctrack == "cgroup")


@pytest.fixture
def launcher(slurm: object, tmp_path: Path) -> Iterator[Launcher]:
    yield Launcher(tmp_path / "runs", "slurm")
    cluster.cancel_all()


@pytest.mark.signals
def test_under_our_supervisor_torchrun_is_left_alone(launcher: Launcher, tmp_path: Path, proctrack: str) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-endpoint=127.0.0.1:0")
    run_id = launcher.submit("code.enabled=false", command=(*torchrun, RANK, str(tmp_path), "2", "ignore"))
    wait_file(tmp_path / "up", 60)
    (job_id,) = launcher.status(run_id)["job_ids"]
    # With linuxproc SLURM itself tells every process, torchrun too, which takes two at most.
    for _ in range(4 if proctrack == "cgroup" else 1):
        run(["scancel", "--signal=TERM", job_id])
    launcher.wait_for(lambda: launcher.attempts(run_id), 60, "the end of the attempt", run_id)
    assert launcher.attempts(run_id) == [("preempted", "requeue")]
    assert wait_file(tmp_path / "saved") == ("flag\n" if proctrack == "cgroup" else "TERM\n")
    launcher.ok("cancel", run_id)
