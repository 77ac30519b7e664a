"""The supervisor in a replica of a TorchX app: as in a pod, with what TorchX tells of the place."""

from __future__ import annotations

import signal
import socket

from llmops.agent.k8s import supervise
from llmops.agent.node import own_address
from llmops.agent.pod import Place
from llmops.agent.rundir import RunDir
from llmops.agent.signals import STOP_SIGNALS, SignalPipe

ELSEWHERE = "192.0.2.1"  # of no machine: only the route to it matters, and nothing is sent


def address(node: int, nodes: int, main: str) -> str:
    """What the other replicas can reach this one by. ``main``: the host of replica 0, where the scheduler tells it."""
    if nodes == 1:
        return "127.0.0.1"
    if main:
        return own_address(main) if node else socket.gethostbyname(main)
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
    name = socket.gethostname()
    place = Place(node, address(node, spec["nodes"], host), f"{spec['options']['name']}-{node}", name)
    return supervise(rundir, submission, place, signals)
