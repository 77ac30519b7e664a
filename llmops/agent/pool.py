"""A study on this machine: as many trials at a time as it has room for, each with a supervisor of its own."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import IO, Any

from llmops.agent import carry
from llmops.agent.local import start_ticks
from llmops.agent.log import log
from llmops.agent.rundir import RunDir, is_url, open_rundir
from llmops.agent.signals import STOP_SIGNALS, SignalPipe

POLL_S = 3.0  # between two looks whether the study was cancelled


def devices(environ: dict[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [each for each in chosen.split(",") if each and each != "-1"]
    numbers = [int(name[6:]) for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
    return [str(number) for number in sorted(numbers)]


def room(spec: dict[str, Any], gpus: int, cpus: int) -> int:
    """How many trials fit on the machine: by its GPUs where it has some, else by its processors. At least one."""
    ranks = int(spec["ranks_per_node"])
    return max(gpus // ranks if gpus else cpus // (ranks * int(spec["threads_per_rank"])), 1)


class Pool:
    """One submission of a study. Trials live on when it dies; those that it had not started stay unstarted."""

    def __init__(self, rundir: RunDir, study: str, submission: int, spec: dict[str, Any]) -> None:
        self.rundir, self.study, self.submission, self.spec = rundir, study, submission, spec
        self.folder = f"job/{submission:04d}"
        self.devices = devices(dict(os.environ))
        cpus = len(os.sched_getaffinity(0))
        self.parallel = int(spec["array"]["parallel"] or room(spec, len(self.devices), cpus))
        self.running: dict[int, subprocess.Popen[bytes]] = {}  # by slot

    def run(self, signals: SignalPipe) -> int:
        """Until all trials have ended, or the study is cancelled; 1 when one of them failed."""
        waiting = list(range(int(self.spec["array"]["size"])))
        failed = 0
        log(f"{len(waiting)} trials, {self.parallel} at a time")
        with selectors.DefaultSelector() as selector:
            selector.register(signals, selectors.EVENT_READ)
            while waiting or self.running:
                if waiting and self.rundir.exists(f"{self.folder}/intent.json"):
                    log(f"the study was cancelled; {len(waiting)} trials are not started")
                    waiting = []
                for slot in range(self.parallel):
                    if waiting and slot not in self.running:
                        self.running[slot] = self._start(waiting.pop(0), slot)
                if selector.select(POLL_S):
                    signals.read()  # what a stop signal means is recorded, not in its name: looked for above
                for slot, process in list(self.running.items()):
                    if process.poll() is not None:
                        failed += process.returncode != 0
                        del self.running[slot]
        return 1 if failed else 0

    def _start(self, index: int, slot: int) -> subprocess.Popen[bytes]:
        command, source = carry.starter(sys.executable)
        command += ["local", "--study", self.study, "--submission", str(self.submission)]
        environment = {**os.environ, "LLMOPS_ELEMENT": str(index)}
        ranks = int(self.spec["ranks_per_node"])
        if self.devices:
            mine = [self.devices[(slot * ranks + rank) % len(self.devices)] for rank in range(ranks)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
        output = self._log_file(index)
        try:
            return subprocess.Popen(
                command, env=environment, stdin=source, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        finally:
            if output is not None:
                output.close()

    def _log_file(self, index: int) -> IO[bytes] | None:
        """Where the element's supervisor writes; None for where this pool does."""
        if is_url(self.study):
            return None
        return open(self.rundir.path(f"{self.folder}/element-{index:04d}.log"), "ab")


def main(study: str, submission: int) -> int:
    """Entry point of ``agent.pyz pool``."""
    signals = SignalPipe((*STOP_SIGNALS, signal.SIGCHLD))
    rundir = open_rundir(study)
    spec = rundir.get(f"job/{submission:04d}/spec.json")
    if spec is None:
        raise FileNotFoundError(f"{rundir.path('job')}/{submission:04d}/spec.json is not there")
    job_id = f"{socket.gethostname()}:{os.getpid()}:{start_ticks(os.getpid())}"
    rundir.create(f"job/{submission:04d}/job.json", {"job_id": job_id, "by": "job", "time": time.time()})
    try:
        return Pool(rundir, study, submission, spec).run(signals)
    finally:
        rundir.close()
