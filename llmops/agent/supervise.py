"""The life of a job's supervisor: may it run, then attempt after attempt until the policy says otherwise."""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Callable
from typing import Any

from llmops.agent import attempts
from llmops.agent.coordinator import Coordinator, Launcher, Rendezvous, StopRequest
from llmops.agent.follower import Follower
from llmops.agent.log import log
from llmops.agent.notify import Notifier
from llmops.agent.policy.common import Decision, Outcome
from llmops.agent.rundir import RunDir, StoreError
from llmops.agent.signals import SignalPipe

INTENT_POLL_S = 3.0
INTENT_PATIENCE_S = 3.0  # of a store that is no folder
OUTAGE_POLL_S = 20.0  # how often one that is out of reach is asked


class Supervisor:
    """What all backends' supervisors share.

    A backend adds how agents start, what a signal means and what comes next.
    """

    def __init__(
        self, rundir: RunDir, submission: int, job_id: str, restart: int, hosts: list[str], address: str
    ) -> None:
        self.rundir = rundir
        self.folder = f"job/{submission:04d}"
        spec = self.rundir.get(f"{self.folder}/spec.json")
        if spec is None:
            raise FileNotFoundError(f"{self.rundir.path(self.folder)}/spec.json is not there")
        self.spec: dict[str, Any] = spec
        self.submission, self.job_id, self.restart, self.hosts = submission, job_id, restart, hosts
        self.address = address
        self.refusal_code = self.superseded_code = 0  # what the job returns when it may not run, or no longer
        self._polled = 0.0
        self.notifier = Notifier(rundir, submission, spec)

    def may_run(self) -> str | None:
        """None when this job may claim attempts of the run, else why not.

        A submission that timed out may have been accepted twice; the first job to register is the only one that runs.
        A later submission supersedes all before it.
        """
        mine = {"job_id": self.job_id, "by": "job", "time": time.time()}
        if not self.rundir.create(f"{self.folder}/job.json", mine):
            holder = (self.rundir.get(f"{self.folder}/job.json") or {}).get("job_id")
            if holder != self.job_id:
                return f"job {holder} runs this submission already; {self.job_id} is a duplicate"
        if self.rundir.exists(f"{self.folder}/failed.json"):
            return "this submission was given up"
        later = [name for name in self.rundir.list("job") if name.isdigit() and int(name) > self.submission]
        if later:
            return f"superseded by submission {max(later)}"
        if self.cancelled():
            return "the run was cancelled"
        return None

    def cancelled(self) -> bool:
        """Whether somebody asked for the run to end. Durable: no signal can take it back."""
        return self.rundir.exists(f"{self.folder}/intent.json")

    def cancel_request(self, deadline: float) -> StopRequest | None:
        """The stop request that a cancellation calls for, or None when there is no cancellation."""
        try:
            intent = self.rundir.get(f"{self.folder}/intent.json", INTENT_PATIENCE_S)
        except StoreError as error:
            # A store out of reach must neither stop healthy ranks nor keep a signal waiting: it is asked again.
            log(f"whether the run is cancelled cannot be seen now: {error}")
            self._polled = time.monotonic() + OUTAGE_POLL_S - INTENT_POLL_S
            return None
        if intent is None:
            return None
        graceful = bool(intent.get("graceful"))
        return StopRequest("cancel", deadline if graceful else time.time(), abort=not graceful)

    def poll(self) -> StopRequest | None:
        """A cancellation that no signal announced, looked for every few seconds."""
        if time.monotonic() - self._polled < INTENT_POLL_S:
            return None
        self._polled = time.monotonic()
        return self.cancel_request(time.time() + float(self.spec["stop"]["local_grace_s"]))

    def gather(self, signals: SignalPipe, on_signal: Callable[[str], StopRequest | None]) -> StopRequest | None:
        """Wait for what the next attempt needs; a stop request that came meanwhile, or None."""
        return None

    def run(
        self,
        signals: SignalPipe,
        launch: Launcher,
        on_signal: Callable[[str], StopRequest | None],
        poll: Callable[[], StopRequest | None],
        decide: Callable[[Outcome], Decision],
        act: Callable[[Decision], int],
    ) -> int:
        """Run attempts until ``decide`` wants something else than another one here; then ``act`` on it."""
        rendezvous = Rendezvous(self.address)
        follower: Follower | None = None
        last: tuple[int, Outcome] | None = None

        def leave(decision: Decision) -> int:
            if follower is not None:
                if decision.action == "exit":
                    follower.finish()
                else:
                    follower.abandon()
            code = act(decision)
            if decision.action == "exit":
                self.notifier.finish()
            elif code != decision.exit_code and last is not None:
                refused = Decision("exit", decision.reason, code, detail="the scheduler refused to start it again")
                self.notifier.tell(*last, refused)
                self.notifier.finish()
            return code

        while True:
            refusal = self.may_run()
            if refusal:
                log(f"nothing to do: {refusal}")
                if follower is not None:
                    follower.finish()
                return self.refusal_code
            if follower is None and self.spec.get("study"):
                follower = Follower(self.rundir, self.submission, self.spec)
            if (stop := self.gather(signals, on_signal)) is not None:
                decision = decide(Outcome("stopped", stop=stop.record()))
                log(f"stopped before the attempt: {decision.detail or decision.reason}; next: {decision.action}")
                return leave(decision)
            try:
                record = attempts.claim(self.rundir, self.submission, self.job_id, self.restart, self.hosts)
            except attempts.Superseded as error:
                log(f"nothing to do: {error}")
                if follower is not None:
                    follower.abandon()
                return self.superseded_code
            number = record["number"]
            log(f"attempt {number} on {','.join(self.hosts)}, from {record['resume_from'] or 'scratch'}")
            outcome = Coordinator(self.spec, record, rendezvous, signals, on_signal, poll).run(launch)
            decision = decide(outcome)
            self._record_end(number, outcome, decision)
            last = (number, outcome)
            self.notifier.tell(number, outcome, decision)
            log(f"attempt {number} ended: {decision.reason}; next: {decision.action} {decision.detail}".rstrip())
            if decision.action == "again":
                stop = self._back_off(decision.delay_s, signals, on_signal)
                if stop is None:
                    continue
                # Stopped between two attempts: nothing to save, but the scheduler still wants us gone.
                decision = decide(Outcome("stopped", stop=stop.record()))
                log(f"stopped while waiting for the next attempt: {decision.reason}; next: {decision.action}")
            if decision.action != "again":
                return leave(decision)

    def history(self) -> attempts.History:
        """The failures so far. The attempt that just ended is included: without an end record it counts as failed."""
        return attempts.history(self.rundir, self.submission)

    def _record_end(self, number: int, outcome: Outcome, decision: Decision) -> None:
        self.rundir.create(
            f"attempts/{number:04d}/end.json",
            {
                "time": time.time(),
                "reason": decision.reason,
                "next": decision.next,
                "exit_codes": outcome.exit_codes,
                "first_step": outcome.first_step,
                "last_step": outcome.last_step,
                "saved": outcome.saved,
                "error": outcome.error,
                "failed_rank": outcome.failed_rank,
                "failed_host": outcome.failed_host,
                "stop": outcome.stop,
                "detail": decision.detail,
            },
        )

    def _back_off(
        self, delay_s: float, signals: SignalPipe, on_signal: Callable[[str], StopRequest | None]
    ) -> StopRequest | None:
        """Wait before the next attempt. A signal or a cancellation ends the wait and comes back as a stop request."""
        deadline = time.monotonic() + delay_s
        with selectors.DefaultSelector() as selector:
            selector.register(signals, selectors.EVENT_READ)
            while True:
                stop = self.cancel_request(time.time())
                left = deadline - time.monotonic()
                if stop or left <= 0:
                    return stop
                if selector.select(min(left, INTENT_POLL_S)):
                    for number in signals.read():
                        if number != signal.SIGCHLD:
                            stop = stop or on_signal(number.name)
                    if stop:
                        return stop
