"""Commands that are torchrun, which starts workers of its own and has habits that cost a preempted job its state.

It answers TERM by killing the process groups of its workers, DataLoader workers first of all; it dies of USR1; and it
has 30 s of patience. So it is started deaf, never told anything, and its workers are told where they want to be.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from llmops.agent import processes

_MODULES = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch")
_PATIENCE_S = 30  # torchrun's own
_WORKER = b"TORCHELASTIC_RUN_ID"  # in the environment of its workers


def is_torchrun(command: Sequence[str]) -> bool:
    """Whether the command, up to its script, names torchrun or Accelerate's launcher, which is built on it."""
    for index, word in enumerate(command):
        name, following = os.path.basename(word), command[index + 1] if index + 1 < len(command) else ""
        if name == "torchrun" or (name == "accelerate" and following == "launch"):
            return True
        if word == "-m":
            return following in _MODULES
        if name.endswith((".py", ".sh")):
            break
    return False


def environment(spec: dict[str, Any], node: int, master_addr: str, master_port: int) -> dict[str, str]:
    """Defaults of torchrun's options: how its nodes find each other, and if the command is one, its deafness.

    What the command line gives wins.
    """
    found = {"PET_NNODES": str(spec["nodes"]), "PET_NODE_RANK": str(node)}
    if spec["nodes"] > 1:  # on one node it finds a free port by itself
        found.update(PET_MASTER_ADDR=master_addr, PET_MASTER_PORT=str(master_port))
    if is_torchrun(spec["command"]):
        found["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
        found["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(max(_PATIENCE_S, float(spec["stop"]["save_s"]))))
    return found


def tell_workers(top: int, agent_id: str, number: int) -> set[int]:
    """Signal the workers that have a handler, and return which. ``top``: the process that was started.

    One without a handler is deaf, as all that torchrun starts, and would go on.
    """
    told = set()
    for pid in _workers(top, agent_id):
        try:
            if _handles(pid, number):
                os.kill(pid, number)
                told.add(pid)
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return told


def _workers(top: int, agent_id: str) -> list[int]:
    alive = processes.marked(agent_id)
    parents = {pid: _parent(pid) for pid in alive}
    elastic = {pid for pid in alive if _is_worker(pid)}
    # What a worker starts has its environment: a DataLoader's processes are none of ours.
    return [pid for pid in elastic if parents[pid] not in elastic] or [pid for pid in alive if parents[pid] == top]


def _is_worker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return any(each.startswith(_WORKER + b"=") for each in file.read().split(b"\0"))
    except OSError:
        return False


def _parent(pid: int) -> int:
    try:
        return int(_status(pid, "PPid"))
    except OSError:
        return 0


def _handles(pid: int, number: int) -> bool:
    return bool(int(_status(pid, "SigCgt"), 16) >> (number - 1) & 1)


def _status(pid: int, key: str) -> str:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return line.split()[1]
    raise FileNotFoundError(f"/proc/{pid}/status has no {key}")
