"""The supervisor in a pod. Node 0's pod decides; the others do as it says, and look for the next when it is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from llmops.agent import attempts
from llmops.agent.coordinator import StopRequest
from llmops.agent.lobby import Fleet, Lobby
from llmops.agent.log import log
from llmops.agent.pod import STOP_MARGIN_S, TELL_S, Follower, Over, Place, over, reap_orphans, start_agent
from llmops.agent.policy.common import Decision, Outcome, after_failure
from llmops.agent.policy.k8s import codes, decide
from llmops.agent.rundir import RunDir, StoreError
from llmops.agent.signals import STOP_SIGNALS, SignalPipe
from llmops.agent.supervise import Supervisor

TICK_S = 1.0


class PodSupervisor(Supervisor):
    """Supervises the run, in the pod of node 0."""

    def __init__(self, rundir: RunDir, submission: int, spec: dict[str, Any], place: Place) -> None:
        options = spec["options"]
        self.place, self.exits = place, codes(options["workload"])
        self.grace_s, self.wait_s = float(options["grace_s"]), float(options["wait_s"])
        self.lobby = Lobby(rundir, submission, place.address, spec["nodes"])
        super().__init__(rundir, submission, options["job_id"], self.lobby.number, [place.host], place.address)
        self.refusal_code, self.superseded_code = self.exits.give_up, self.exits.stopped
        self.leaving = False  # this pod was told to go
        self.own_agent: int | None = None

    def gather(self, signals: SignalPipe, on_signal: Callable[[str], StopRequest | None]) -> StopRequest | None:
        """Wait until all pods are there; a request to stop, or too long a wait, ends it."""
        began, told = time.monotonic(), 0.0
        while missing := self.lobby.missing():
            now = time.monotonic()
            if now - began > self.wait_s:
                log(f"the pods of nodes {missing} did not come within {self.wait_s:.0f} s")
                self.leaving = True
                return StopRequest(f"nodes {missing} are missing", time.time())
            if now - told > TELL_S:
                told = now
                log(f"waiting for the pods of nodes {missing[:20]} of {self.spec['nodes']}")
            self.lobby.serve(TICK_S)
            stop = super().poll() or next(filter(None, (on_signal(each.name) for each in _stops(signals))), None)
            if stop is not None:
                return stop
        self.hosts = [self.place.host, *(self.lobby.members[node].host for node in range(1, self.spec["nodes"]))]
        return None

    def launch(self, environment: dict[str, str]) -> Fleet:
        """Start a node agent in every pod."""
        own = start_agent(0, self.spec["python"], environment)
        self.own_agent = own.pid
        return Fleet(self.lobby, own, environment)

    def on_signal(self, name: str) -> StopRequest | None:
        """This pod is deleted, evicted, drained or preempted: all look the same from inside."""
        self.leaving = True
        deadline = time.time() + self.grace_s - STOP_MARGIN_S
        return self.cancel_request(deadline) or StopRequest(f"{name} in the pod of node 0", deadline)

    def poll(self) -> StopRequest | None:
        """Cancellations, and other pods that were told to go."""
        reap_orphans(self.own_agent)
        for guest in self.lobby.leaving():
            deadline = time.time() + self.grace_s - STOP_MARGIN_S
            cause = f"the pod of node {guest.node} on {guest.host} was told to go"
            return self.cancel_request(deadline) or StopRequest(cause, deadline)
        return super().poll()

    def decide(self, outcome: Outcome) -> Decision:
        """Ask the policy."""
        return decide(outcome, self.leaving, self.cancelled(), self.history(), self.spec["retry"], self.exits)

    def act(self, decision: Decision) -> int:
        """Leave. The last words are for pods that a controller starts again although the job is over."""
        if decision.action == "exit":
            self.rundir.create(f"{self.folder}/over.json", {"exit_code": decision.exit_code, "time": time.time()})
            self.lobby.close({"type": "leave", "exit_code": decision.exit_code})
        return decision.exit_code

    def spent(self) -> str | None:
        """Why no further attempt is worth it: those before may have died with their pods, and nobody could decide."""
        history = self.history()
        if not history.failures:
            return None
        decision = after_failure(Outcome("lost"), history, self.spec["retry"])
        return decision.detail if decision.action == "exit" else None


def _stops(signals: SignalPipe) -> list[signal.Signals]:
    return [number for number in signals.read() if number != signal.SIGCHLD]


def main(rundir: RunDir, submission: int) -> int:
    """Entry point of ``agent.pyz k8s``, the first process of a pod's container."""
    # Before anything that takes time: what has no handler, the first process of a container never hears.
    signals = SignalPipe((*STOP_SIGNALS, signal.SIGCHLD))
    return supervise(rundir, submission, Place.of(dict(os.environ)), signals)


def supervise(rundir: RunDir, submission: int, place: Place, signals: SignalPipe) -> int:
    """Supervise the run, or follow the pod that does. Returns the exit code."""
    spec = rundir.get(f"job/{submission:04d}/spec.json")
    if spec is None:
        raise FileNotFoundError(f"{rundir.path(f'job/{submission:04d}')}/spec.json is not there")
    exits = codes(spec["options"]["workload"])
    try:
        if (code := over(rundir, submission)) is not None:
            log(f"nothing to do: the job is over, with exit code {code}")
            return code
        if place.node:
            return Follower(rundir, submission, spec, place, signals, exits).run()
        supervisor = PodSupervisor(rundir, submission, spec, place)
        if why := supervisor.spent():
            log(f"giving up: {why}")
            decision = Decision("exit", "failed", exits.give_up, detail=why)
            supervisor.notifier.tell(attempts.numbers(rundir)[-1], Outcome("lost"), decision)
            code = supervisor.act(decision)
            supervisor.notifier.finish()
            return code
        return supervisor.run(
            signals, supervisor.launch, supervisor.on_signal, supervisor.poll, supervisor.decide, supervisor.act
        )
    except Over as error:
        log(str(error))
        return error.code
    except (StoreError, ValueError, FileNotFoundError) as error:
        log(f"the supervisor cannot go on: {error}")
        return exits.give_up
    finally:
        for number in STOP_SIGNALS:  # the exit code is decided: a signal while the interpreter ends must not change it
            signal.signal(number, signal.SIG_IGN)
