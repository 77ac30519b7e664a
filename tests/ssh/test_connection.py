"""The connection itself: how little it takes, how it fails, and what it leaves behind."""

from __future__ import annotations

import ast
import contextlib
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmops.errors import ClusterError, UserError
from llmops.runs import ssh_store
from llmops.runs.store import open_store
from llmops.ssh import command
from tests.launcher.harness import LLMOPS, TREE, Launcher
from tests.ssh.sshd import Sshd


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A host that a test may harm."""
    daemon = Sshd(tmp_path / "own", "own")
    monkeypatch.setenv("LLMOPS_SSH_CONFIG", str(daemon.config))
    ssh_store._host.cache_clear()
    yield daemon
    daemon.stop()
    ssh_store._host.cache_clear()


def status(url, *arguments, **env):
    """`llmops status` of a store, as a process of its own."""
    launcher = Launcher(url, "slurm", **env)
    begun = time.monotonic()
    done = launcher.call("status", *arguments)
    return done.returncode, done.stderr, time.monotonic() - begun


def refused(url, said, code, **env):
    found, errors, _ = status(url, **env)
    assert (found, errors.count("\n")) == (code, 1), errors
    assert said in errors


def test_many_processes_share_one_connection(own, tmp_path):
    url = f"ssh://own{tmp_path}/runs"
    for _ in range(3):
        assert status(url)[0] == 0
    assert len(own.connections()) == 1
    folder = command._folder()
    assert len(list(folder.iterdir())) == 1
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_user_s_own_shared_connection_is_left_as_it_is(own, tmp_path):
    socket = tmp_path / "mine"
    own.config.write_text(
        own.config.read_text() + f"  ControlMaster auto\n  ControlPersist 60\n  ControlPath {socket}\n"
    )
    assert status(f"ssh://own{tmp_path}/runs")[0] == 0
    assert socket.is_socket()


def test_a_lost_connection_is_made_again_and_nothing_is_done_twice(own, tmp_path):
    store = open_store(f"ssh://own{tmp_path}/runs")
    assert store.create("claim", b"mine")
    own.hang_up()
    assert store.get("claim") == b"mine"
    assert not store.create("claim", b"other")
    assert store.host.connections == 2
    own.stop()
    with pytest.raises(ClusterError, match="own: nothing answers at its port"):
        store.get("claim")


def test_of_a_command_that_was_asked_for_once_nothing_is_asked_twice(own, tmp_path):
    host = ssh_store.connect("own")
    script = f"echo x >> {tmp_path}/count; kill -9 $(ps -o ppid= -p $(ps -o ppid= -p $PPID))"  # the sshd
    with pytest.raises(ssh_store.Lost):
        host.run(["sh", "-c", script], timeout_s=30, once=True)
    assert host.run(["cat", f"{tmp_path}/count"], timeout_s=30, once=True) == (0, b"x\n", b"")


def test_words_reach_a_command_as_they_are(sshd):
    words = ["a b", "$HOME", "it's", '"', "\\", "*", "", "-x", "ü\n;"]
    program = "import sys; print(sys.argv[1:])"
    code, output, errors = ssh_store.connect("login").run(
        [sys.executable, "-c", program, *words], timeout_s=30, once=True
    )
    assert (code, output.decode(), errors) == (0, f"{words}\n", b"")


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "a b", "a;b", "@x", "x:0", "x:99999", "$(x)", "", "a@-b"])
def test_a_host_that_could_be_something_else_is_refused(host, tmp_path):
    with pytest.raises(UserError, match="is no host"):
        ssh_store.connect(host)
    refused(f"ssh://{host}/runs", "is no host", 2, HOME=str(tmp_path))


def test_a_url_without_a_folder_is_refused():
    for url in ("ssh://login", "ssh://login/", "ssh://login/a/../b"):
        with pytest.raises(UserError, match="name a folder of that host"):
            open_store(url)


def test_what_ssh_refuses_is_one_line(own, tmp_path):
    url = f"ssh://own{tmp_path}/runs"
    text = own.config.read_text()
    refused("ssh://no-such-host.invalid/runs", "there is no host of that name", 2)
    (own.folder / "known_hosts").write_text("")
    refused(url, "its host key is not known here", 2)
    own.know()
    own.new_key("host_key")
    refused(url, "its host key is not the one that you know", 2)
    own.know()
    (own.folder / "authorized_keys").write_text("")
    refused(url, "it refused your login", 2)
    own.config.write_text(text + "  NoSuchOption yes\n")
    refused(url, "ssh does not take its configuration", 2)
    assert own.connections() == []


def test_a_host_that_does_not_answer_is_given_up(own, tmp_path, monkeypatch):
    own.process.send_signal(19)  # it takes connections, and says nothing
    monkeypatch.setattr(command, "CONNECT_S", 1)
    with pytest.raises(ClusterError, match="own: it does not answer"):
        open_store(f"ssh://own{tmp_path}/runs").list()
    own.process.send_signal(18)


def test_a_python_that_is_missing_or_too_old_is_said(sshd, tmp_path):
    url = f"ssh://login{tmp_path}/runs"
    old = tmp_path / "python3.6"
    old.write_text('#!/bin/sh\nexec python3 -c "import sys; sys.version_info = (3, 6); exec(sys.argv[1])" "$3"\n')
    old.chmod(0o755)
    refused(url, "its Python is older than 3.9", 2, LLMOPS_SSH_PYTHON=str(old))
    refused(url, "there is no Python on it", 2, LLMOPS_SSH_PYTHON="/no/such/python")
    refused(url, "give the name or path of a Python", 2, LLMOPS_SSH_PYTHON="x; touch y")


def test_what_is_sent_needs_no_newer_python_and_nothing_that_is_installed(sshd, tmp_path):
    for _, text in ssh_store._modules():
        ast.parse(text, feature_version=(3, 9))
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=120)
    assert status(f"ssh://login{tmp_path}/runs", LLMOPS_SSH_PYTHON=str(bare / "bin/python"))[0] == 0


def test_login_scripts_may_talk(own, tmp_path):
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\necho "Welcome!"\necho "be nice" >&2\nexec /bin/sh "$@"\n')
    shell.chmod(0o755)
    own.stop()
    settings = own.folder / "sshd_config"
    settings.write_text(settings.read_text() + f'ForceCommand {shell} -c "$SSH_ORIGINAL_COMMAND"\n')
    own.start()
    assert status(f"ssh://own{tmp_path}/runs")[0] == 0


def test_a_host_behind_another(tmp_path, monkeypatch):
    gate = Sshd(tmp_path / "gate", "gate")
    inner = Sshd(tmp_path / "inner", "inner", jump=gate)
    monkeypatch.setenv("LLMOPS_SSH_CONFIG", str(inner.config))
    try:
        assert status(f"ssh://inner{tmp_path}/runs")[0] == 0
        assert len(gate.connections()) == len(inner.connections()) == 1
    finally:
        inner.stop()
        gate.stop()


def test_a_folder_that_cannot_be_written_is_one_line(sshd, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^login: .*runs cannot be kept there"):
        open_store(f"ssh://login{tmp_path}/file/runs").create("x", b"")


def far_ends(daemon):
    """Process ids of our programs at the other end of this host's connections."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            of_this = f" {daemon.port}\0".encode() in (path / "environ").read_bytes()
            if of_this and b"sys.version_info" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def test_the_other_end_ends_with_this_one_however_it_ends(own, tmp_path):
    program = "import sys, time; from llmops.runs.store import open_store; open_store(sys.argv[1]).list(); print()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}; sys.stdout.flush(); time.sleep(300)", f"ssh://own{tmp_path}/runs"],
        stdout=subprocess.PIPE,
        cwd=TREE,
    )
    assert process.stdout.readline() == b"\n"
    assert far_ends(own)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while far_ends(own):
        assert time.monotonic() < deadline, far_ends(own)
        time.sleep(0.05)


def test_at_a_terminal_ssh_may_ask(own, tmp_path):
    (own.folder / "known_hosts").write_text("")
    launcher = Launcher(f"ssh://own{tmp_path}/runs", "slurm")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(TREE)
        os.execve(sys.executable, [*LLMOPS, "status"], launcher.env)
    shown, answered = b"", False
    with contextlib.suppress(OSError):  # the other side is closed
        while data := os.read(terminal, 1024):
            shown += data
            if b"(yes/no" in shown and not answered:
                os.write(terminal, b"yes\n")
                answered = True
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown.decode()
    assert answered
    assert f":{own.port} " in (own.folder / "known_hosts").read_text()
