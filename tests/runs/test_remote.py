"""The run directory behind a URL, as the supervisor sees it: the helper process, and output through the spool."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from llmops.agent.helper import Helper
from llmops.agent.remote import FILE_BYTES, MAX_FILES, Spool
from llmops.agent.rundir import StoreError, open_rundir
from llmops.errors import ClusterError
from llmops.runs.spool import PART_BYTES, SpoolReader
from llmops.runs.store import PosixStore, open_store


@pytest.fixture
def rundir(s3_url):
    """A run directory on the S3 server, and its helper."""
    rundir = open_rundir(s3_url)
    yield rundir
    rundir.close()


def stored(url):
    """All output of rank 0, in order of its parts."""
    store = open_store(url).sub("logs/0000/n1")
    return b"".join(store.get(name) for name in store.list())


def test_objects_are_put_once_and_found(rundir):
    assert rundir.get("run.json") is None
    assert rundir.create("attempts/0000/start.json", {"number": 0})
    assert not rundir.create("attempts/0000/start.json", {"number": 1})
    # A second try after a lost answer finds its own object.
    assert rundir.create("attempts/0000/start.json", {"number": 0})
    assert rundir.get("attempts/0000/start.json") == {"number": 0}
    assert (rundir.list("attempts"), rundir.list("none")) == (["0000"], [])
    assert rundir.exists("attempts/0000/start.json")
    assert not rundir.exists("attempts/0001/start.json")
    with rundir.local_copy("attempts/0000/start.json") as path:
        assert '"number": 0' in Path(path).read_text()
    assert not os.path.exists(path)


def test_a_helper_outlives_signals_and_is_replaced_when_killed(rundir):
    assert rundir.list("") == []
    process = rundir.helper.process
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(process.pid, number)
    assert rundir.list("") == []
    assert rundir.helper.process is process
    process.kill()
    assert rundir.list("") == []


def test_a_helper_ends_with_its_supervisor(rundir):
    assert rundir.list("") == []
    rundir.helper.process.stdin.close()
    assert rundir.helper.process.wait(5) == 0


def test_output_survives_the_helper(rundir, s3_url):
    sink = rundir.stream("logs/0000/n1/rank0")
    sink.write(b"one\n" * 100_000)
    deadline = time.monotonic() + 20
    while not stored(s3_url):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rundir.helper.process.kill()
    rundir.helper.process.wait()
    rundir.tend()
    sink.write(b"two")
    sink.close()
    rundir.close()
    assert stored(s3_url) == b"one\n" * 100_000 + b"two"
    assert not os.path.exists(sink.folder)


PROGRAMS = {
    "import sys; sys.exit(3)": "is llmops, with what this store needs",
    "import time; time.sleep(60)": "did not answer within",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_helper_that_does_not_work_is_one_line(program):
    helper = Helper([sys.executable, "-c", program], "s3://runs/x")
    started = time.monotonic()
    with pytest.raises(StoreError, match=PROGRAMS[program]):
        helper.call("list", 1.0, name="")
    assert time.monotonic() - started < 5
    helper.close(0)


class Flaky(PosixStore):
    """A store that is out of reach while ``down``."""

    down = False

    def put(self, path, data):
        if self.down:
            raise ClusterError("out of reach")
        super().put(path, data)


def test_output_waits_for_a_store_that_is_out_of_reach(tmp_path, capsys):
    store = Flaky(tmp_path / "store")
    spool = Spool(str(tmp_path / "spool"))
    reader = SpoolReader(store, "rank0", tmp_path / "spool")
    store.down = True
    spool.write(b"x" * PART_BYTES)
    assert not reader.tend()
    assert not reader.tend(everything=True)
    spool.write(b"the end")
    store.down = False
    assert reader.tend(everything=True)
    assert b"".join(store.get(name) for name in store.list()) == b"x" * PART_BYTES + b"the end"
    assert capsys.readouterr().err.count("\n") == 2  # gone, and back


def test_a_spool_is_bounded_and_says_what_it_lost(tmp_path):
    spool = Spool(str(tmp_path / "spool"))
    block = b"y" * FILE_BYTES
    for _ in range(2 * MAX_FILES + 40):
        spool.write(block)
    held = sum(path.stat().st_size for path in (tmp_path / "spool").iterdir())
    assert held <= 2 * (MAX_FILES + 1) * FILE_BYTES
    store = PosixStore(tmp_path / "store")
    assert SpoolReader(store, "rank0", tmp_path / "spool").tend(everything=True)
    spool.write(b"back\n")
    assert SpoolReader(store, "rank0", tmp_path / "spool").tend(everything=True)
    names = store.list()
    assert b"bytes of output are lost]\nback\n" in b"".join(store.get(name) for name in names[-2:])
