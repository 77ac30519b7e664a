"""The supervisor's parts, each alone, on real processes, pipes, sockets and files."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from datetime import datetime

import pytest

from llmops import agent_zip
from llmops.agent import attempts, carry, processes, ranks
from llmops.agent.control import ControlDir
from llmops.agent.output import STAMP, RankOutput, stamp, unstamped
from llmops.agent.rundir import RunDir
from llmops.agent.signals import STOP_SIGNALS
from llmops.agent.wire import MAX_LINE, Connection, ProtocolError


def wait_until(condition, what, timeout=10.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.02)


def start_attempt(rundir, number, resume_from=None, resume_step=0, submission=0):
    record = {"number": number, "submission": submission, "resume_from": resume_from, "resume_step": resume_step}
    assert rundir.create(f"attempts/{number:04d}/start.json", record)


def commit(rundir, step, attempt, generation=0, whole=True):
    path = f"checkpoints/step_{step:08d}/{attempt:04d}-{generation:04d}"
    rundir.create(f"{path}/rank00000.json", {})
    if whole:
        rundir.create(f"{path}/manifest.json", {"step": step})
    return path


def test_only_one_of_many_creates(tmp_path):
    rundir = RunDir(str(tmp_path))
    winners = []
    barrier = threading.Barrier(8)

    def contend(number):
        barrier.wait()
        if rundir.create("job/0000/job.json", {"job_id": number}):
            winners.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert rundir.get("job/0000/job.json") == {"job_id": winners[0]}
    assert os.listdir(tmp_path / "job" / "0000") == ["job.json"]


def test_a_damaged_object_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        RunDir(str(tmp_path)).get("run.json")


def test_claims_number_attempts_and_record_what_they_resume_from(tmp_path):
    rundir = RunDir(str(tmp_path))
    first = attempts.claim(rundir, 0, "17", 0, ["n1"])
    assert (first["number"], first["resume_from"], first["resume_step"]) == (0, None, 0)
    path = commit(rundir, 100, 0)
    commit(rundir, 150, 0, whole=False)  # died before the commit
    second = attempts.claim(rundir, 0, "17", 1, ["n2"])
    assert (second["number"], second["resume_from"], second["resume_step"]) == (1, path, 100)
    # The second committed nothing; the third goes on from the same commit.
    assert attempts.claim(rundir, 0, "17", 2, ["n2"])["resume_from"] == path


def test_a_zombie_commit_past_the_fork_does_not_count(tmp_path):
    rundir = RunDir(str(tmp_path))
    start_attempt(rundir, 0)
    fork = commit(rundir, 100, 0)
    start_attempt(rundir, 1, fork, 100)
    commit(rundir, 900, 0)  # the first attempt woke up and went on
    assert attempts.resume_point(rundir) == attempts.Commit(fork, 100)
    own = commit(rundir, 200, 1)
    assert attempts.resume_point(rundir) == attempts.Commit(own, 200)


def test_after_a_rollback_the_newer_generation_counts(tmp_path):
    rundir = RunDir(str(tmp_path))
    start_attempt(rundir, 0)
    commit(rundir, 300, 0, generation=0)
    again = commit(rundir, 200, 0, generation=1)
    assert attempts.resume_point(rundir) == attempts.Commit(again, 200)


def test_history_counts_failures_and_those_without_progress(tmp_path):
    rundir = RunDir(str(tmp_path))
    reasons = ["failed", "preempted", "failed", "failed"]
    for number, reason in enumerate(reasons):
        start_attempt(rundir, number, resume_step=50)
        rundir.create(f"attempts/{number:04d}/end.json", {"reason": reason})
    commit(rundir, 60, 2)  # the third attempt failed, but after progress
    assert attempts.history(rundir, 0) == attempts.History(failures=3, without_progress=1)
    # A job that died with its node leaves no end at all.
    start_attempt(rundir, 4, resume_step=60)
    assert attempts.history(rundir, 0) == attempts.History(failures=4, without_progress=2)
    # Another submission starts with a clean slate.
    assert attempts.history(rundir, 1) == attempts.History(0, 0)


def test_messages_arrive_whole_and_a_lost_peer_is_noticed():
    left, right = socket.socketpair()
    with left, right:
        sender, receiver = _connection(left), _connection(right)
        right.send(b'{"type": "hel')
        assert sender.receive() == []
        right.send(b'lo"}\n{"type": "bye"}\n')
        assert sender.receive() == [{"type": "hello"}, {"type": "bye"}]
        right.send(b"[1]\n")
        with pytest.raises(ProtocolError):
            sender.receive()
        receiver.close()
        assert sender.receive() is None


def test_an_endless_message_is_refused():
    left, right = socket.socketpair()
    with left, right:
        connection = _connection(left)

        def write():
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                right.sendall(b"x" * (MAX_LINE + (1 << 17)))

        writer = threading.Thread(target=write)
        writer.start()
        with pytest.raises(ProtocolError, match="longer than"):
            wait_until(lambda: connection.receive() is None, "the refusal")
        left.close()  # which fails what is still being sent
        writer.join()


def _connection(sock):
    """A Connection over a socket pair, which has none of TCP's options."""
    connection = Connection.__new__(Connection)
    connection.sock, connection._buffer, connection.closed = sock, b"", False
    return connection


@pytest.mark.parametrize("cut", [1, 7, 12, 100])
def test_secrets_are_blotted_out_wherever_the_pipe_is_cut(tmp_path, cut):
    read_end, write_end = os.pipe()
    output = RankOutput(read_end, RunDir(str(tmp_path)), "logs/0000/n1/rank0", [b"s3cr3t", b"s3cr3t-longer"])
    text = b"token=s3cr3t-longer and s3cr3t\nlast s3cr3t"
    for start in range(0, len(text), cut):
        os.write(write_end, text[start : start + cut])
        assert output.pump()
    os.close(write_end)
    assert not output.pump()
    written = (tmp_path / "logs/0000/n1/rank0.000000.log").read_bytes().splitlines()
    assert all(STAMP.match(line) for line in written)
    assert [unstamped(line) for line in written] == [b"token=[secret] and [secret]", b"last [secret]"]
    assert output.tail() == "token=[secret] and [secret]\nlast [secret]"


def test_each_line_begins_with_its_time_wherever_the_pipe_is_cut(tmp_path):
    read_end, write_end = os.pipe()
    output = RankOutput(read_end, RunDir(str(tmp_path)), "logs/0000/n1/rank0", [])
    began = time.time()
    for piece in (b"a\nb", b"b\n\n", b"10%\r20%\r", b"30%\n2026-11-23T03:27:00.123Z its own\nno end"):
        os.write(write_end, piece)
        assert output.pump()
    os.close(write_end)
    assert not output.pump()
    written = (tmp_path / "logs/0000/n1/rank0.000000.log").read_bytes()
    lines = written.split(b"\n")
    expected = [b"a", b"bb", b"", b"10%\r20%\r30%", b"2026-11-23T03:27:00.123Z its own", b"no end"]
    assert [unstamped(line) for line in lines] == expected
    assert output.tail() == b"\n".join(expected).decode()
    times = [datetime.fromisoformat(line[:24].decode()).timestamp() for line in lines]
    assert times == sorted(times)
    assert began - 0.001 <= times[0] <= times[-1] <= time.time()


@pytest.mark.parametrize(
    ("now", "expected"),
    [(0.0, b"1970-01-01T00:00:00.000Z "), (1795404420.9999, b"2026-11-23T03:27:00.999Z ")],
)
def test_stamps_are_utc_and_of_one_length(now, expected):
    assert stamp(now) == expected
    assert STAMP.fullmatch(stamp(now))


DETACHED = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""


def test_everything_marked_is_killed_and_nothing_else(tmp_path):
    child_file = tmp_path / "child"
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    marked = subprocess.Popen(
        [sys.executable, "-c", DETACHED, str(child_file)], env={**os.environ, processes.MARKER: "test-marker-1"}
    )
    try:
        wait_until(lambda: child_file.exists() and child_file.read_text(), "the detached grandchild")
        grandchild = int(child_file.read_text())
        assert {marked.pid, grandchild} <= set(processes.marked("test-marker-1"))
        assert processes.kill_marked("test-marker-1") == []
        assert marked.wait(5) == -signal.SIGKILL
        wait_until(lambda: not _alive(grandchild), "the grandchild's end")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


GUARDED = """
import os, subprocess, sys, time
from llmops.agent import processes
guard = processes.start_guard(sys.argv[1])
child = subprocess.Popen(["sleep", "600"], env={**os.environ, processes.MARKER: sys.argv[1]})
print(child.pid, flush=True)
time.sleep(600)
"""


def test_the_guard_cleans_up_after_sigkill():
    parent = subprocess.Popen([sys.executable, "-c", GUARDED, "test-marker-2"], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert _alive(child)
    parent.kill()
    parent.wait()
    wait_until(lambda: not _alive(child), "the guard to kill the child")
    parent.stdout.close()


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# A program that has no handlers yet, until it is told to install them.
LATE = """
import signal, sys
print("started", flush=True)
sys.stdin.readline()
from llmops.agent.signals import STOP_SIGNALS, SignalPipe
signals = SignalPipe(STOP_SIGNALS)
print("listening", flush=True)
sys.stdin.readline()
print([number.name for number in signals.read()], flush=True)
"""


def test_a_signal_before_there_are_handlers_is_not_the_end():
    late = subprocess.Popen(
        [*carry.DEAF_START, sys.executable, "-c", LATE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert late.stdout.readline() == "started\n"
    for number in STOP_SIGNALS:
        late.send_signal(number)
    print(file=late.stdin, flush=True)
    assert late.stdout.readline() == "listening\n"
    late.send_signal(signal.SIGTERM)
    output, _ = late.communicate("\n", timeout=20)
    assert (output, late.returncode) == ("['SIGTERM']\n", 0)


def test_control_directory_round_trip():
    control = ControlDir("run", 3, 0)
    try:
        assert control.heartbeat(0) is None
        assert control.heartbeat_age(0) is None
        with open(os.path.join(control.path, "heartbeat.0"), "w") as file:
            json.dump({"step": 5, "first_step": 1}, file)
        assert control.heartbeat(0) == {"step": 5, "first_step": 1}
        assert control.heartbeat_age(0) < 60
        with open(os.path.join(control.path, "heartbeat.1"), "w") as file:
            file.write('{"step"')  # caught in the middle of a write
        assert control.heartbeat(1) is None
        control.request_stop("SIGTERM", 123.0)
        control.request_stop("SIGUSR1", 456.0)
        with open(os.path.join(control.path, "stop")) as file:
            assert json.load(file) == {"cause": "SIGTERM", "deadline": 123.0}
        assert os.stat(control.path).st_mode & 0o077 == 0
    finally:
        control.remove()
    assert not os.path.exists(control.path)


def test_a_secrets_file_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "secrets.json"
    path.write_text('{"TOKEN": "x"}')
    path.chmod(0o644)
    with pytest.raises(ranks.SpecError, match="chmod 600"):
        ranks.read_secrets(str(path), ["TOKEN"])
    path.chmod(0o600)
    assert ranks.read_secrets(str(path), ["TOKEN"]) == {"TOKEN": "x"}
    with pytest.raises(ranks.SpecError, match="OTHER"):
        ranks.read_secrets(str(path), ["OTHER"])
    assert ranks.read_secrets(None, []) == {}


def test_the_zipapp_is_the_same_every_time_and_starts_without_llmops(tmp_path):
    (name, data), (again, same) = agent_zip.build(), agent_zip.build()
    assert (name, data) == (again, same)
    path = tmp_path / name
    path.write_bytes(data)
    # -I: no site-packages of the user, no PYTHONPATH; -S: none at all.
    done = subprocess.run([sys.executable, "-I", "-S", str(path), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "local,slurm,k8s,torchx,pool,node" in done.stdout


def test_a_peer_that_was_lost_while_it_was_written_to_is_seen() -> None:
    """Also by a selector that was waiting before: it forgets a socket that is closed."""
    server = socket.create_server(("127.0.0.1", 0))
    far = socket.create_connection(server.getsockname())
    near, _ = server.accept()
    connection = Connection(near)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()  # with a reset
        for _ in range(3):
            connection.send({"type": "here"})
        assert selector.select(5), "nobody would learn of the loss"
        assert connection.receive() is None
        selector.unregister(connection)
    server.close()
