"""What a model's program can do, and what it cannot."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from llm.eval import sandbox
from llm.eval.sandbox import check, run

BOOT = sandbox.BOOT.encode()[:60]
QUICK = {"seconds": 5.0, "memory_mb": 512}


def test_a_program_that_ends_has_passed() -> None:
    assert run("import math\nassert math.sqrt(4) == 2", **QUICK).passed
    failed = run("assert 1 == 2, 'not so'", **QUICK)
    assert not failed.passed
    assert failed.why == "AssertionError: not so"
    assert run("x = (", **QUICK).why.startswith("SyntaxError")


@pytest.mark.parametrize("leave", ["raise SystemExit(0)", "import os; os._exit(0)"])
def test_leaving_early_is_no_pass(leave: str) -> None:
    assert not run(leave, **QUICK).passed


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(1 << 22))", "OSError"),
        ("print('x' * (1 << 22))", "xxx"),
        ("[open('/dev/null') for _ in range(1000)]", "OSError"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "ValueError"),
    ],
)
def test_limits(program: str, why: str) -> None:
    began = time.monotonic()
    ran = run(program, seconds=1.0, memory_mb=512)
    assert not ran.passed
    assert why in ran.why or ran.why == "killed by SIGXFSZ"
    assert time.monotonic() - began < 30


def test_nothing_of_this_process_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert run("import os\nassert 'SECRET_TOKEN' not in os.environ", **QUICK).passed
    assert run(
        f"import os\nassert os.getcwd() not in ('/', {os.getcwd()!r})\nassert os.listdir() == []", **QUICK
    ).passed
    # Not by way of /proc either.
    text = f"import os\nassert b'SECRET_TOKEN' not in open('/proc/{os.getpid()}/environ', 'rb').read()"
    assert "PermissionError" in run(text, **QUICK).why


needs_namespaces = pytest.mark.skipif(not run("", **QUICK).isolated, reason="no user namespaces here")


@needs_namespaces
def test_the_network_is_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=3)", **QUICK)
    assert "OSError" in ran.why


@needs_namespaces
def test_nothing_can_be_written_but_in_its_own_folder(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("before")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o777)
    for attack in (
        f"open({str(target)!r}, 'w')",
        f"import os; os.remove({str(target)!r})",
        f"open({str(tmp_path / 'other')!r}, 'w')",
        # Whoever has lost its capabilities cannot get them back in a namespace of its own.
        "import ctypes; assert ctypes.CDLL(None).mount(b't', b'/tmp', b'tmpfs', 0, None) == 0, 'refused'",
    ):
        ran = run(attack, **QUICK)
        assert not ran.passed
        assert any(word in ran.why for word in ("Read-only", "Permission", "refused")), ran.why
    assert target.read_text() == "before"
    assert run("open('file', 'w').write('x')", **QUICK).passed


@needs_namespaces
def test_children_end_with_it() -> None:
    text = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(300)"
    run(text, **QUICK)  # where it is not root's, it cannot even fork
    mine = [path for path in Path("/proc").glob("[0-9]*/cmdline") if BOOT in read(path)]
    assert mine == []


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just gone
        return b""


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run("open('file', 'w').write('x')", **QUICK).passed
    assert list(tmp_path.iterdir()) == []
    assert isinstance(check(), bool)
