"""The supervisor in a replica of a TorchX app: as in a pod, with what TorchX tells of the place."""

from __future__ import annotations

import signal
import socket

from llmops.agent.k8s import supervise
from llmops.agent.node import own_address
from llmops.agent.pod import Place
from llmops.agent.rundir import RunDir
from llmops.agent.signals import STOP_SIGNALS, SignalPipe

LOOPBACK = "127.0.0.1"
ELSEWHERE = "192.0.2.1"  # of no machine: only the route to it matters, and nothing is sent


def address(main: str) -> str:
    """What other machines can reach this one by, if it is replica 0.

    ``main``: the host of replica 0, where the scheduler tells it; some tell itself only that it is ``localhost``.
    """
    found = socket.gethostbyname(main) if main else LOOPBACK
    if not found.startswith("127."):
        return found
    try:
        return own_address(ELSEWHERE)
    except OSError:  # there is no route to anywhere else
        return socket.gethostbyname(socket.gethostname())


def main(rundir: RunDir, submission: int, node: int, host: str) -> int:
    """Entry point of ``agent.pyz torchx``, the program of every replica. ``host``: of replica 0, or empty."""
    # Before anything that takes time: what has no handler, the first process of a container never hears.
    signals = SignalPipe((*STOP_SIGNALS, signal.SIGCHLD))
    spec = rundir.get(f"job/{submission:04d}/spec.json")
    if spec is None:
        raise FileNotFoundError(f"{rundir.path(f'job/{submission:04d}')}/spec.json is not there")
    # Only the address of replica 0 counts: the others look it up in the run directory.
    alone = node > 0 or spec["nodes"] == 1 or spec["options"]["one_machine"]
    own = LOOPBACK if alone else address(host)
    place = Place(node, own, f"{spec['options']['name']}-{node}", socket.gethostname())
    return supervise(rundir, submission, place, signals)
