"""The supervisor between attempts: who may run, and what a signal means while it waits."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from llmops.agent import attempts
from llmops.agent.coordinator import StopRequest
from llmops.agent.rundir import RunDir
from llmops.agent.signals import SignalPipe
from llmops.agent.supervise import Supervisor


@pytest.fixture
def supervisor(tmp_path):
    """A supervisor of submission 0, as job 17."""
    rundir = RunDir(str(tmp_path))
    rundir.create("job/0000/spec.json", {"stop": {"local_grace_s": 5}})
    return Supervisor(rundir, 0, "17", 0, ["n1"], "127.0.0.1")


@pytest.fixture
def signals():
    """The pipe, with the handlers put back afterwards."""
    before = signal.getsignal(signal.SIGUSR2)
    yield SignalPipe([signal.SIGUSR2])
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGUSR2, before)


def test_the_first_job_to_register_runs(supervisor):
    assert supervisor.may_run() is None
    assert supervisor.may_run() is None  # asked before every attempt
    double = Supervisor(supervisor.rundir, 0, "18", 0, ["n1"], "127.0.0.1")
    assert "18 is a duplicate" in str(double.may_run())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("job/0000/failed.json", "given up"),
        ("job/0001/submission.json", "superseded by submission 0001"),
        ("job/0000/intent.json", "cancelled"),
    ],
)
def test_who_may_not_run(supervisor, name, why):
    supervisor.rundir.create(name, {"intent": "end"})
    assert why in str(supervisor.may_run())


def test_a_supervisor_that_outlived_its_job_claims_nothing(supervisor):
    """A node that lost its connection: the job runs elsewhere, as restart 1, while this one thinks it is restart 0."""
    attempts.claim(supervisor.rundir, 0, "17", 1, ["n2"])
    with pytest.raises(attempts.Superseded, match="restart 1"):
        attempts.claim(supervisor.rundir, 0, "17", 0, ["n1"])
    assert attempts.claim(supervisor.rundir, 0, "17", 1, ["n2"])["number"] == 1
    assert attempts.claim(supervisor.rundir, 1, "19", 0, ["n2"])["number"] == 2


def test_waiting_ends_by_itself(supervisor, signals):
    assert supervisor._back_off(0.05, signals, lambda name: StopRequest(name, 0)) is None


def test_a_signal_while_waiting_is_a_stop_request(supervisor, signals):
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2))
    timer.start()
    stop = supervisor._back_off(60, signals, lambda name: StopRequest(name, 0))
    timer.join()
    assert stop is not None
    assert stop.cause == "SIGUSR2"


def test_a_cancellation_while_waiting_is_seen(supervisor, signals):
    supervisor.rundir.create("job/0000/intent.json", {"intent": "end", "graceful": False})
    stop = supervisor._back_off(60, signals, lambda name: None)
    assert stop is not None
    assert (stop.cause, stop.abort) == ("cancel", True)
