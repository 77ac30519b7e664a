"""Who hears which signal when SLURM stops a job, and what is left of it then."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm import cluster
from tests.slurm.cluster import preempt, requeue, run, wait_file, wait_for, wait_job
from tests.slurm.fixtures import Slurm, Submit

pytestmark = pytest.mark.signals

PYTHON = f"{sys.executable} -I -S"
WITNESS = f"{PYTHON} {Path(__file__).parent / 'witness.py'}"
STOP = {"CONT", "TERM"}
NOBODY: set[str] = set()


@dataclass(frozen=True)
class Row:
    """Who hears what when a job is stopped in some way, and what becomes of the job.

    With linuxproc every process of a step hears what its first one hears, with cgroup no other one does.
    """

    stop: Callable[[str], object]
    batch: set[str]
    task: set[str]
    then: dict[str, str]
    batch_child: set[str] | None = None  # not as the tracker has it


class Witnesses:
    """A job whose batch shell and tasks, each with a child, write down the signals that reach them."""

    def __init__(self, folder: Path, submit: Submit, nodes: str, *options: str) -> None:
        self.folder, count = folder, len(nodes.split(","))
        step = f"srun --nodes={count} --ntasks={count} {WITNESS} {folder} task{{SLURM_PROCID}} child{{SLURM_PROCID}}"
        script = f"exec {WITNESS} {folder} batch batch-child -- {step}"
        self.tasks = [f"task{number}" for number in range(count)]
        self.children = [f"child{number}" for number in range(count)]
        self.jobid = submit(script, f"--nodes={count}", f"--nodelist={nodes}", *options)
        self.pids = {name: int(wait_file(folder / name).split()[0]) for name in self.everybody}

    @property
    def everybody(self) -> list[str]:
        return ["batch", "batch-child", *self.tasks, *self.children]

    def record(self, name: str) -> list[tuple[str, float]]:
        """(signal, seconds since the epoch) of each signal so far."""
        lines = (self.folder / name).read_text().splitlines()[1:]
        return [(line.split()[0], float(line.split()[1])) for line in lines]

    def heard(self, name: str) -> set[str]:
        return {each for each, _ in self.record(name)}

    def wait_heard(self, names: list[str], signals: set[str], timeout: float = 20) -> None:
        for name in names:
            wait_for(lambda name=name: signals <= self.heard(name), timeout, f"{name} to hear {signals}")

    def check(self, tracker: str, row: Row, timeout: float = 20) -> None:
        """Exactly these signals came."""
        self.wait_heard(["batch"], row.batch, timeout)
        self.wait_heard(self.tasks, row.task, timeout)
        # Whatever SLURM sends to the others it has sent by now: a signal of ours comes behind it.
        for pid in self.pids.values():
            os.kill(pid, signal.SIGUSR2)
        self.wait_heard(self.everybody, {"USR2"})
        everywhere = tracker == "linuxproc"
        # USR1 for the batch shell is for it alone.
        by_tracker = row.batch - {"USR1"} if everywhere else NOBODY
        expected = {"batch": row.batch, "batch-child": by_tracker if row.batch_child is None else row.batch_child}
        expected |= dict.fromkeys(self.tasks, row.task)
        expected |= dict.fromkeys(self.children, row.task if everywhere else NOBODY)
        # CONT comes with many a signal and means nothing.
        heard = {name: self.heard(name) - {"USR2"} | {"CONT"} for name in self.everybody}
        assert heard == {name: signals | {"CONT"} for name, signals in expected.items()}


@pytest.fixture(scope="module", autouse=True)
def slow(proctrack: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Witnesses]]:
    """Jobs on their way to an end that SLURM takes a minute for: started first, looked at last."""
    started: dict[str, Witnesses] = {}
    options = {"step": ["n3", "--signal=USR1@60"], "batch": ["n3", "--signal=B:USR1@60"], "deaf": ["n4"]}
    for name, (node, *more) in options.items():
        started[name] = Witnesses(tmp_path_factory.mktemp(name), cluster.submit, node, *more)
    for name in ("step", "batch"):
        cluster.expire(started[name].jobid, 40)
    requeue(started["deaf"].jobid)
    yield started
    for job in started.values():
        (job.folder / "quit").touch()
    run(["scancel", *(job.jobid for job in started.values())], check=False)


@pytest.fixture
def witnesses(submit: Submit, tmp_path: Path) -> Iterator[Callable[..., Witnesses]]:
    """Starts witnesses, which end with the test."""
    yield lambda nodes, *options: Witnesses(tmp_path, submit, nodes, *options)
    (tmp_path / "quit").touch()


def signalled(*options: str) -> Callable[[str], object]:
    return lambda jobid: run(["scancel", *options, "--signal=USR1", jobid])


def node_state(state: str) -> Callable[[str], object]:
    return lambda _: run(["scontrol", "update", "nodename=n2", f"state={state}", "reason=test"])


@pytest.fixture
def nodes_back() -> Iterator[None]:
    yield
    cluster.resume("n2")


RUNNING = {"JobState": "RUNNING"}
ROWS = {
    "requeue": Row(requeue, STOP, STOP, {"JobState": "PENDING", "Reason": "BeginTime", "Restarts": "1"}),
    "preemption": Row(lambda _: preempt("n1,n2"), STOP, STOP, {"JobState": "PENDING|RUNNING", "Restarts": "1"}),
    "scancel": Row(lambda jobid: run(["scancel", jobid]), STOP, STOP, {"JobState": "CANCELLED"}),
    "scancel --signal": Row(signalled(), NOBODY, {"USR1"}, RUNNING),
    "scancel --batch": Row(signalled("--batch"), {"USR1"}, NOBODY, RUNNING),
    # The batch script's process group.
    "scancel --full": Row(signalled("--full"), {"USR1"}, {"USR1"}, RUNNING, batch_child={"USR1"}),
    "drain": Row(node_state("drain"), NOBODY, NOBODY, RUNNING),
    "node down": Row(node_state("down"), STOP, STOP, {"JobState": "PENDING|RUNNING", "Restarts": "1"}),
}


@pytest.mark.parametrize("row", ROWS)
def test_who_hears_what(
    row: str, witnesses: Callable[..., Witnesses], proctrack: str, nodes_back: None, tmp_path: Path
) -> None:
    job = witnesses("n1,n2")
    ROWS[row].stop(job.jobid)
    job.check(proctrack, ROWS[row])
    assert ROWS[row].then != RUNNING or cluster.job(job.jobid)["JobState"] == "RUNNING"
    (tmp_path / "quit").touch()
    if ROWS[row].then != RUNNING:
        wait_job(job.jobid, **ROWS[row].then)


def test_under_grace_time_the_tasks_are_told_first(
    witnesses: Callable[..., Witnesses], grace: int, proctrack: str
) -> None:
    job = witnesses("n1", "--partition=lowgrace")
    preempt("n1")
    job.wait_heard(job.tasks, STOP)
    assert (job.heard("batch"), cluster.job(job.jobid)["JobState"]) == (NOBODY, "RUNNING")
    job.wait_heard(["batch"], STOP, timeout=grace + 40)
    (told,) = {time for each, time in job.record("batch") if each == "TERM"}
    first, *again = [time for each, time in job.record("task0") if each == "TERM"]
    assert told - first >= grace
    assert again, "the task is told once more when the grace is over"


@pytest.fixture
def grace() -> Iterator[int]:
    """The GraceTime of partition lowgrace in seconds, shorter than it is otherwise."""
    run(["scontrol", "update", "partitionname=lowgrace", "gracetime=2"])
    yield 2
    run(["scontrol", "update", "partitionname=lowgrace", "gracetime=30"])


SAVER = f"""{PYTHON} -c '
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: None)
print(flush=True, file=open("up", "w"))
signal.pause()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(2)
print("saved", flush=True)
print(flush=True, file=open("saved", "w"))
'"""
SHAPES = {
    "foreground": "srun {saver}",
    "exec": "exec srun {saver}",
    "TERM ignored": "trap '' TERM; srun {saver}",
    "background": "trap : TERM; srun {saver} & until wait $!; do :; done",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_shell_that_dies_of_term_loses_the_last_lines(
    shape: str, submit: Submit, proctrack: str, tmp_path: Path
) -> None:
    script = f"cd {tmp_path}\n" + SHAPES[shape].format(saver=SAVER)
    jobid = submit(script, "--nodelist=n1", f"--output={tmp_path}/log")
    wait_file(tmp_path / "up")
    requeue(jobid)
    wait_file(tmp_path / "saved")
    wait_job(jobid, JobState="PENDING")
    # With linuxproc srun is told too, which may save the day.
    if (shape, proctrack) != ("foreground", "linuxproc"):
        assert ("saved" in (tmp_path / "log").read_text()) == (shape != "foreground")


@pytest.mark.parametrize("row", ["step", "batch"])
def test_the_time_limit_and_the_signal_before_it(row: str, slow: dict[str, Witnesses], proctrack: str) -> None:
    job = slow[row]
    warned = job.tasks if row == "step" else ["batch"]
    job.wait_heard(warned, {"USR1"}, timeout=60)
    batch, task = (STOP, STOP | {"USR1"}) if row == "step" else (STOP | {"USR1"}, STOP)
    job.check(proctrack, Row(print, batch, task, {}), timeout=90)
    for name in warned:
        assert next(each for each, _ in job.record(name) if each != "CONT") == "USR1"
    (job.folder / "quit").touch()
    wait_job(job.jobid, JobState="TIMEOUT")


def test_who_does_not_leave_is_killed_after_killwait(slow: dict[str, Witnesses], slurm: Slurm) -> None:
    job = slow["deaf"]
    job.wait_heard(["batch", *job.tasks], STOP)
    gone = lambda: not any(Path(f"/proc/{pid}").exists() for pid in job.pids.values())  # noqa: E731
    wait_for(gone, slurm.kill_wait + 30, "the whole job to be killed")
    for name in ("batch", *job.tasks):
        told = min(time for each, time in job.record(name) if each == "TERM")
        assert (job.folder / name).stat().st_mtime - told > slurm.kill_wait - 3
    wait_job(job.jobid, JobState="PENDING", Restarts="1")


@pytest.fixture(scope="module")
def user_signal(slow: dict[str, Witnesses]) -> Iterator[None]:
    """Preemption sends what `--signal` asks for. Restarts the daemons, hence after the slow jobs."""
    version = tuple(int(part) for part in run(["sinfo", "--version"]).stdout.split()[1].split(".")[:2])
    old, new = "SlurmctldParameters=preempt_send_user_signal", "PreemptParameters=send_user_signal"
    with cluster.settings(LLMOPS_SLURM_CONF=old if version < (23, 2) else new):
        yield


USER_SIGNAL = [
    ("lowgrace", "B:USR1@60", {"USR1"}, NOBODY),
    ("lowgrace", "USR1@60", NOBODY, {"USR1"}),
    ("low", "B:USR1@60", STOP | {"USR1"}, STOP),
    ("low", "USR1@60", STOP, STOP | {"USR1"}),
]


@pytest.mark.parametrize(("partition", "option", "batch", "task"), USER_SIGNAL)
def test_a_preemption_that_sends_the_users_signal(
    partition: str,
    option: str,
    batch: set[str],
    task: set[str],
    user_signal: None,
    witnesses: Callable[..., Witnesses],
    grace: int,
    proctrack: str,
) -> None:
    job = witnesses("n1", f"--partition={partition}", f"--signal={option}")
    preempt("n1")
    job.check(proctrack, Row(print, batch, task, {}))
