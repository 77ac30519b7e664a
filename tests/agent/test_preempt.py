"""Programs that take part in a job through ``llmops.preempt``, and what the supervisor makes of what they tell."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from llmops import agent_zip
from llmops.agent import attempts, ranks, torchrun
from llmops.agent.commits import Commits
from llmops.agent.control import ControlDir
from llmops.agent.processes import MARKER
from llmops.agent.rundir import RunDir, StoreError
from llmops.config.compose import load_config
from llmops.errors import UserError
from llmops.monitor.describe import describe_run
from llmops.runs.lineage import segments
from llmops.runs.model import AttemptEnd, AttemptStart, RunRecord
from llmops.runs.records import load_run
from llmops.runs.store import open_store

TREE = Path(__file__).parents[2]
SOURCE = TREE / "llmops" / "preempt.py"
SPEC = {
    "run_id": "run",
    "run_url": "/runs/run",
    "nodes": 2,
    "kind": "command",
    "command": ["torchrun", "train.py"],
    "env": {},
    "threads_per_rank": 1,
    "code_archive": None,
    "stop": {"save_s": 44.5},
}
ATTEMPT = {"number": 3, "resume_from": "commits/0001/1764349552123-00000007", "resume_step": 7, "resume_path": "out/7"}


@pytest.fixture
def control():
    directory = ControlDir("run", 3, 0)
    yield directory
    directory.remove()


@pytest.fixture
def outside(monkeypatch):
    """No job: whatever the tests themselves may run in."""
    for name in [name for name in os.environ if name.startswith("LLMOPS_")] + ["RANK", "TORCHELASTIC_RUN_ID"]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def inside(outside, monkeypatch, control):
    """A job of one rank, which goes on from step 7."""
    place = ranks.Placement(0, 0, 0, 2, 1, "10.0.0.1", 1234)
    env = ranks.environment(SPEC, place, ATTEMPT, control.path, None, "agent")
    for name, value in env.items():
        if name.startswith(("LLMOPS_", "RANK")):
            monkeypatch.setenv(name, value)
    return control


def load():
    """The module, as a process of its own would have it; the handlers of this one stay."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    spec = importlib.util.spec_from_file_location("preempt_under_test", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for number, handler in before.items():
        signal.signal(number, handler)
    return module


def test_it_needs_no_more_than_an_old_python():
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 9))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= set(sys.stdlib_module_names)


@pytest.mark.usefixtures("outside")
def test_outside_of_a_job_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    preempt = load()
    preempt.beat(1)
    preempt.committed(1, "somewhere")
    preempt.outlive_signals()
    assert (preempt.should_stop(), preempt.seconds_left(), preempt.resume_from()) == (False, None, None)
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(tmp_path.iterdir()) == []


def test_inside_it_speaks_the_control_directory(inside):
    preempt = load()
    assert preempt.resume_from() == (7, "/runs/run/out/7")
    preempt.beat(8)
    preempt.beat(9)
    beat = inside.heartbeat(0)
    assert (beat["step"], beat["first_step"], beat["phase"]) == (9, 8, "train")
    preempt.committed(9, Path("/runs/run/out/9"))
    assert inside.committed()["path"] == "out/9", "relative to the run's folder, which may move"
    preempt.committed(9, "s3://bucket/9")
    assert inside.committed()["path"] == "s3://bucket/9"
    assert (preempt.should_stop(), preempt.seconds_left()) == (False, None)
    inside.request_stop("SIGTERM", time.time() + 50)
    assert preempt.should_stop()
    assert 0 < preempt.seconds_left() <= 50
    with pytest.raises(SystemExit) as ended:
        preempt.exit_stopped()
    assert (ended.value.code, inside.stopped(0)["step"]) == (75, 9)


def test_a_stop_request_is_looked_for_in_microseconds(inside):
    preempt = load()
    began = time.perf_counter()
    for _ in range(1000):
        preempt.should_stop()
    assert time.perf_counter() - began < 0.5  # half a millisecond each, on however busy a machine


@pytest.mark.parametrize("step", [-1, 1.5, True, "7"])
def test_what_is_no_step_is_refused_at_once(inside, step):
    with pytest.raises(ValueError, match="whole number"):
        load().committed(step)


def test_of_several_ranks_the_first_speaks_for_all(inside, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    preempt = load()
    preempt.beat(4)
    preempt.committed(4)
    assert (inside.heartbeat(3)["step"], inside.committed()) == (4, None)


def test_a_torchrun_is_left_without_an_error(inside, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    preempt = load()
    with pytest.raises(SystemExit) as ended:
        preempt.exit_stopped(5)
    assert (ended.value.code, inside.stopped(0)["step"]) == (0, 5)


SHELL = f"""
set -e
alias preempt='{sys.executable} -S -m llmops.preempt'
preempt resume-from
if preempt should-stop; then exit 9; fi
preempt beat 8; preempt beat 9; preempt committed 9
touch "$LLMOPS_CONTROL_DIR/stop"
preempt should-stop
preempt committed -- -9 || echo "refused with $?"
preempt stopped 9
"""


def test_a_shell_may_use_it_too(inside):
    env = {**os.environ, "PYTHONPATH": inside.offer_preempt()}
    done = subprocess.run(["sh", "-c", SHELL], env=env, text=True, capture_output=True, cwd="/", timeout=60)
    assert done.returncode == 75, done.stderr
    assert done.stdout == "7 /runs/run/out/7\nrefused with 2\n"
    beat = inside.heartbeat(0)
    assert (beat["step"], beat["first_step"]) == (9, 8), "the first step, from one process to the next"
    assert (inside.committed()["path"], inside.stopped(0)["step"]) == (".", 9)


SIGNALLED = """
import os, signal
from llmops import preempt
print(preempt.__file__)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    os.kill(os.getpid(), number)
print("alive")
"""


@pytest.mark.parametrize("installed", [False, True])
def test_it_is_found_without_llmops_and_never_in_the_place_of_an_installed_one(inside, tmp_path, installed):
    """-S: no site-packages; an installed llmops is a folder that comes later on the path."""
    offered = inside.offer_preempt()
    path = [offered]
    if installed:
        (tmp_path / "llmops").mkdir()
        (tmp_path / "llmops" / "__init__.py").touch()
        (tmp_path / "llmops" / "preempt.py").write_bytes(SOURCE.read_bytes())
        path.append(str(tmp_path))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-S", "-c", SIGNALLED]
    done = subprocess.run(command, env=env, text=True, capture_output=True, cwd="/", timeout=60)
    assert done.stdout.split() == [f"{path[-1]}/llmops/preempt.py", "alive"], done.stderr


def test_the_supervisor_carries_it():
    with zipfile.ZipFile(io.BytesIO(agent_zip.build()[1])) as archive:
        assert archive.read("llmops/preempt.py") == SOURCE.read_bytes()


# ---- what the supervisor keeps of it --------------------------------------------------------------------------------


def write(control, name, text):
    Path(control.path, name).write_text(text)


def test_commits_are_kept_in_the_run_directory_and_resumed_from(control, tmp_path):
    rundir = RunDir(str(tmp_path))
    first = attempts.claim(rundir, 0, "17", 0, ["n1"])
    commits = Commits(rundir, control, first["number"])
    commits.tend()
    assert attempts.newest_commit_of(rundir, 0) is None
    for step in (10, 20, 15):  # the last one after a rollback
        write(control, "committed.0", json.dumps({"step": step, "path": f"out/{step}"}))
        commits.tend()
        commits.tend()
    assert len(rundir.list("commits/0000")) == 3
    second = attempts.claim(rundir, 0, "17", 0, ["n1"])
    assert (second["resume_step"], second["resume_path"]) == (15, "out/15")
    third = attempts.claim(rundir, 0, "17", 0, ["n1"])
    assert third["resume_from"] == second["resume_from"], "an attempt that committed nothing hands on what it got"
    assert third["resume_path"] == "out/15"


@pytest.mark.parametrize(
    "text", ['{"step": "7"}', '{"step": -1}', '{"step": 7, "path": 3}', '{"path": "x"}', "[]", "{"]
)
def test_what_is_no_commit_is_not_counted(control, tmp_path, text, capsys):
    commits = Commits(RunDir(str(tmp_path)), control, 0)
    write(control, "committed.0", text)
    commits.tend()
    assert RunDir(str(tmp_path)).list("commits/0000") == []
    assert ("not counted" in capsys.readouterr().err) == text.startswith('{"')
    write(control, "committed.0", '{"step": 7}')
    commits.tend()
    assert attempts.newest_commit_of(RunDir(str(tmp_path)), 0).place == "."


class Away(RunDir):
    """A store that is out of reach until it is not."""

    there = False

    def create(self, name, value, patience_s=1.0):
        if not self.there:
            raise StoreError("the store did not answer")
        return super().create(name, value, patience_s)


def test_a_store_that_is_out_of_reach_is_asked_again_at_the_end(control, tmp_path, capsys):
    rundir = Away(str(tmp_path))
    commits = Commits(rundir, control, 0)
    write(control, "committed.0", '{"step": 7}')
    commits.tend()
    commits.tend()  # not before a while is over: ranks wait for nothing meanwhile
    assert capsys.readouterr().err.count("did not answer") == 1
    rundir.there = True
    commits.tend(60.0)
    assert attempts.newest_commit_of(rundir, 0).step == 7


def test_progress_counts_for_the_failure_budget(control, tmp_path):
    rundir = RunDir(str(tmp_path))
    for number, step in enumerate((5, 9, 9)):
        attempts.claim(rundir, 0, "17", 0, ["n1"])
        write(control, "committed.0", json.dumps({"step": step}))
        Commits(rundir, control, number).tend()
        rundir.create(f"attempts/{number:04d}/end.json", {"reason": "failed"})
    assert attempts.history(rundir, 0) == attempts.History(failures=3, without_progress=1)


def test_status_and_lineage_follow_them(tmp_path):
    rundir = RunDir(str(tmp_path / "run"))
    record = RunRecord(
        id="run", name="run", owner="", host="", created=0.0, backend="local", kind="command", command=["x"], nodes=1,
        ranks_per_node=1,
    )  # fmt: skip
    rundir.create("run.json", as_json(record))
    rundir.create("commits/0000/0000000100000-00000010.json", {"step": 10, "path": "."})
    rundir.create("commits/0001/0000000300000-00000025.json", {"step": 25, "path": "."})
    start = AttemptStart(number=0, submission=0, job_id="1", hosts=["n1"], time=50.0)
    rundir.create("attempts/0000/start.json", as_json(start))
    end = AttemptEnd(time=150.0, reason="failed", next="retry", first_step=1, last_step=15, exit_codes={"0": 1})
    rundir.create("attempts/0000/end.json", as_json(end))
    came_from = "commits/0000/0000000100000-00000010"
    start = AttemptStart(
        number=1, submission=0, job_id="1", hosts=["n1"], time=200.0, resume_from=came_from, resume_step=10
    )
    rundir.create("attempts/0001/start.json", as_json(start))
    run = load_run(open_store(str(tmp_path)).sub("run"))
    assert segments(run) == [(0, 1, 10), (1, 11, None)]
    described, spans = describe_run(run, None, 400.0)
    assert described["step"] == 25
    assert described["last_commit"] == {"step": 25, "time": 300.0}
    assert [(span.kind, span.start, span.end) for span in spans if span.attempt == 0] == [
        ("train", 50.0, 100.0),
        ("lost", 100.0, 150.0),
    ]
    assert ("train", 200.0, 300.0) in [(span.kind, span.start, span.end) for span in spans]


def as_json(struct):
    import msgspec

    return msgspec.to_builtins(struct)


# ---- torchrun -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("torchrun train.py", True),
        ("/opt/bin/torchrun --nproc-per-node=8 train.py", True),
        ("python -u -m torch.distributed.run train.py", True),
        ("nsys profile torchrun train.py", True),
        ("accelerate launch train.py", True),
        ("python train.py torchrun", False),
        ("python -m train torchrun", False),
        ("accelerate test", False),
        ("bash", False),
    ],
)
def test_what_is_a_torchrun(command, expected):
    assert torchrun.is_torchrun(command.split()) == expected


def test_its_nodes_find_each_other_and_it_is_deaf(control):
    place = ranks.Placement(1, 0, 1, 2, 1, "10.0.0.1", 1234)
    env = ranks.environment(SPEC, place, ATTEMPT, control.path, None, "agent", "/offered")
    assert {name: value for name, value in env.items() if name.startswith(("PET_", "TORCH_"))} == {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "10.0.0.1",
        "PET_MASTER_PORT": "1234",
        "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "45",
    }
    assert (env["LLMOPS_NNODES"], env["LLMOPS_RESUME_FROM"], env["LLMOPS_RESUME_STEP"]) == ("2", "out/7", "7")
    assert env["PYTHONPATH"].endswith("/offered")
    other = {**SPEC, "nodes": 1, "command": ["python", "train.py"], "env": {"PET_NNODES": "1:4"}}
    env = ranks.environment(other, place, ATTEMPT, control.path, None, "agent")
    assert {name: value for name, value in env.items() if name.startswith(("PET_", "TORCH_"))} == {
        "PET_NNODES": "1:4",
        "PET_NODE_RANK": "1",
    }


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_one_a_node_is_enough(ranks_per_node):
    overrides = [f"cluster.ranks_per_node={ranks_per_node}", "command=[torchrun,train.py]"]
    if ranks_per_node == 1:
        load_config(overrides)
        return
    with pytest.raises(UserError, match="starts workers of its own"):
        load_config(overrides)


TOP = """
import os, subprocess, sys
os.environ["TORCHELASTIC_RUN_ID"] = "none"
workers = [subprocess.Popen([sys.executable, "-c", os.environ["WORKER"], each]) for each in ("asks", "does not")]
print([worker.wait() for worker in workers])
"""
WORKER = """
import os, signal, sys, time
if sys.argv[1] == "asks":
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(3))
loader = os.fork()
if not loader:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL if sys.argv[1] != "asks" else lambda *_: os._exit(4))
open(os.path.join(os.environ["UP"], f"{sys.argv[1]}-{'worker' if loader else 'loader'}"), "w").close()
if loader and sys.argv[1] != "asks":
    while not os.path.exists(os.path.join(os.environ["UP"], "over")):
        time.sleep(0.02)
    os._exit(5 if os.waitpid(loader, os.WNOHANG) == (0, 0) else 6)
time.sleep(60)
"""


def test_only_workers_that_ask_for_a_signal_get_it(tmp_path):
    """Neither torchrun, which started deaf, nor the processes that load a worker's data."""
    env = {**os.environ, MARKER: f"test-{os.getpid()}", "WORKER": WORKER, "UP": str(tmp_path)}
    ignore = lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # noqa: E731
    top = subprocess.Popen(
        [sys.executable, "-c", TOP],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=ignore,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(torchrun.tell_workers(top.pid, env[MARKER], signal.SIGUSR1)) == 1
        assert not torchrun.tell_workers(top.pid, env[MARKER], signal.SIGUSR2), "nobody asks for that"
        (tmp_path / "over").touch()
        assert top.stdout.readline() == "[3, 5]\n"
    finally:
        os.killpg(top.pid, signal.SIGKILL)
