"""The supervisor inside a SLURM allocation.

Node agents are the tasks of one ``srun``, and the batch host decides what comes next.
"""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from typing import Any

from llmops.agent import carry, scontrol
from llmops.agent.coordinator import StopRequest
from llmops.agent.log import log
from llmops.agent.policy.common import Decision, Outcome
from llmops.agent.policy.slurm import decide, stop_deadline
from llmops.agent.rundir import RunDir
from llmops.agent.signals import STOP_SIGNALS, SignalPipe
from llmops.agent.supervise import Supervisor


class SlurmSupervisor(Supervisor):
    """One SLURM job's supervisor, on its batch host."""

    def __init__(self, rundir: RunDir, submission: int) -> None:
        env = os.environ
        self.ref = scontrol.job_ref(dict(env))
        self.restarts = int(env.get("SLURM_RESTART_COUNT", "0"))
        hosts = scontrol.host_names(env.get("SLURM_JOB_NODELIST", env.get("SLURMD_NODENAME", "localhost")))
        address = scontrol.node_address(env["SLURMD_NODENAME"]) if len(hosts) > 1 else "127.0.0.1"
        super().__init__(rundir, submission, self.ref, self.restarts, hosts, address)
        self.options: dict[str, Any] = self.spec["options"]
        self.warning_s = float(self.options["signal_s"])
        self.job = scontrol.show_job(self.ref)
        self.kill_wait_s, self.grace_s = scontrol.kill_wait(env.get("SLURM_JOB_PARTITION", ""))
        self._warned = False

    def launch(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start one node agent a node. ``srun`` gets no signal of ours: it would forward it."""
        nodes = str(self.spec["nodes"])
        command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
        agent, source = carry.starter(self.spec["python"])
        # What srun reads, every task gets: this program itself, or nothing.
        command += ["--export=ALL", "--input=none"] if source == subprocess.DEVNULL else ["--export=ALL"]
        command += [*self.options["srun_args"], *carry.DEAF_START, *self.options["wrap"], *agent, "node"]
        return subprocess.Popen(command, env={**os.environ, **environment}, stdin=source, start_new_session=True)

    def on_signal(self, name: str) -> StopRequest | None:
        """A signal's meaning is not in its name: ask the controller how much time there is."""
        self.job = scontrol.show_job(self.ref, patience_s=3)
        asked = name != "SIGTERM"
        save_s = float(self.spec["stop"]["save_s"])
        deadline = stop_deadline(self.job, self.kill_wait_s, self.grace_s, asked, save_s, time.time())
        return self.cancel_request(deadline) or StopRequest(name, deadline)

    def poll(self) -> StopRequest | None:
        """Cancellations, and the time limit, should its warning not have come."""
        now = time.time()
        end = self.job.end_time
        if end is not None and not self._warned and now > end - self.warning_s:
            self._warned = True
            return StopRequest("time limit", max(end - 5.0, now + 1))
        return super().poll()

    def decide(self, outcome: Outcome) -> Decision:
        """Ask the policy, with what the controller says now."""
        self.job = scontrol.show_job(self.ref)
        return decide(
            outcome,
            self.job,
            self.restarts,
            self.cancelled(),
            self.history(),
            self.spec["retry"],
            time.time(),
            self.warning_s,
        )

    def act(self, decision: Decision) -> int:
        """Requeue, or only cut the wait of a requeue that is under way already."""
        if decision.action == "requeue":
            refused = scontrol.requeue(self.ref)
            if refused:
                log(f"requeue was refused ({refused}); queueing a successor")
                return self.succeed()
        if decision.action in ("requeue", "kick") and not scontrol.cut_wait(
            self.ref, int(self.options["requeue_delay_s"])
        ):
            log("the wait before the requeued job starts could not be cut; it will start when SLURM lets it")
        return decision.exit_code

    def succeed(self) -> int:
        """Queue a successor: a new submission of the same script that waits for this job to end."""
        number = self.submission + 1
        tag = f"{self.spec['tag'].rsplit('.', 1)[0]}.{uuid.uuid4().hex[:8]}"
        record = {
            "number": number,
            "tag": tag,
            "backend": "slurm",
            "created": time.time(),
            "successor_of": self.submission,
        }
        script_of = int(self.options.get("script_of", self.submission))
        options = {**self.options, "script_of": script_of}
        spec = {**self.spec, "submission": number, "tag": tag, "options": options}
        folder = f"job/{number:04d}"
        before = self.rundir.get(f"{self.folder}/submission.json") or {}
        if not self.rundir.create(f"{folder}/submission.json", {**before, **record}):
            log("somebody resumed the run already")
            return 0
        self.rundir.create(f"{folder}/spec.json", spec)
        script, argument, index = f"job/{script_of:04d}/sbatch.sh", number, None
        study = self.spec.get("study")
        if study is not None and "study_submission" in before and before["study_submission"] is not None:
            # An element of a study's array: the script is the study's, and the new job an array of this one element.
            argument, index = int(before["study_submission"]), os.environ["SLURM_ARRAY_TASK_ID"]
            script = f"{study['url'].rstrip('/')}/job/{argument:04d}/sbatch.sh"
        with self.rundir.local_copy(script) as path:
            job_id = scontrol.submit_successor(path, tag, self.ref, argument, index)
        if job_id is None:
            self.rundir.create(
                f"{folder}/failed.json", {"error": "the controller refused a successor", "time": time.time()}
            )
            log("the controller refused a successor: run `llmops resume` to go on")
            return 1
        job_id = job_id if index is None else f"{job_id}_{index}"
        self.rundir.create(f"{folder}/job.json", {"job_id": job_id, "by": "job", "time": time.time()})
        log(f"successor {job_id} queued")
        return 0


def main(rundir: RunDir, submission: int) -> int:
    """Entry point of ``agent.pyz slurm``, run by the batch script."""
    # Before anything that takes time: the batch script ignored stop signals until now.
    signals = SignalPipe(STOP_SIGNALS)
    supervisor = SlurmSupervisor(rundir, submission)
    return supervisor.run(
        signals, supervisor.launch, supervisor.on_signal, supervisor.poll, supervisor.decide, supervisor.act
    )
