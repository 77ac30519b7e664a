"""Schedulers of TorchX that llmops has no backend for: AWS Batch, Docker on this machine, and others.

A job is known by its app's name, which is chosen before the app is made: ``<scheduler>/[<place>/]<name>``, where the
place is a host or a queue. Whether jobs are there is asked with one list of apps for each scheduler, whatever their
number. TorchX is imported when it is needed, since it takes longer than the rest of the launcher.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmops.agent.rundir import is_url
from llmops.backends.base import Ambiguous, ArrayLimits, Look, Rejected, Submission
from llmops.config.schema import TorchxCluster
from llmops.errors import ClusterError, UserError
from llmops.job import JobSpec, JobView

IN_PROCESS = ("local_cwd",)  # TorchX itself is their parent, and forgets them when it ends


class TorchxBackend:
    """One app for each submission, of one role with one replica for each node."""

    name = "torchx"
    text_name = "app.yaml"
    own_image = False  # as the cluster that was checked last has it

    def check(self, cluster: TorchxCluster, run_url: str) -> None:
        """The scheduler, its options, and all else that can be seen without asking it."""
        from llmops.backends.torchx import app, schedulers

        name = str(cluster.scheduler)
        schedulers.check_name(name)
        self.own_image = cluster.image is not None
        if cluster.image is None and name not in IN_PROCESS:
            raise UserError(f"cluster.image is not set: {name} runs jobs in an image; add -o image=...")
        if cluster.image is not None and name in IN_PROCESS:
            raise UserError(
                f"cluster.image={cluster.image}: {name} runs jobs in this machine's environment; leave it out"
            )
        if cluster.nodes > 1 and name == "gcp_batch":
            raise UserError(f"cluster.nodes={cluster.nodes}: {name} tells every replica that it is the first; set 1")
        _request(cluster, app.describe(cluster, "llmops", run_url, ["true"]), run_url)

    def options(self, cluster: TorchxCluster, spec_values: Mapping[str, Any]) -> dict[str, Any]:
        """What the app is called: all that is needed to ask about it; and what its supervisors must know."""
        tag, run_id = str(spec_values["tag"]), str(spec_values["run_id"])
        name, scheduler = f"llmops-{run_id[-4:]}-{tag[-8:]}", str(cluster.scheduler)
        place = socket.gethostname() if scheduler in IN_PROCESS else cluster.options.get("queue", "")
        return {
            "job_id": "/".join(part for part in (scheduler, place, name) if part),
            "name": name,
            "workload": "torchx",
            "one_machine": scheduler in IN_PROCESS,
            "grace_s": cluster.grace_s,
            "wait_s": cluster.wait_s,
        }

    def render(self, cluster: TorchxCluster, spec: JobSpec, agent: Path | None) -> str:
        """The app, and as a comment the request that TorchX makes of it."""
        from llmops.backends.torchx import app

        plain = app.describe(cluster, spec.options["name"], spec.run_url, app.command(spec, agent))
        request, shown = _request(cluster, plain, str(_log_folder(spec)))
        text: str = yaml.safe_dump(request, sort_keys=False, allow_unicode=True, width=120)
        comment = "".join(f"#   {line}\n" for line in shown.rstrip().splitlines())
        return (
            f"# {spec.run_id}, submission {spec.submission}: the app, as it is handed to TorchX\n{text}"
            f"# The request that TorchX makes of it, but for the random end of its name:\n{comment}"
        )

    def submit(self, submission: Submission) -> str:
        """Hand the app over. A name that is there already means that an earlier answer was lost."""
        from llmops.backends.torchx import app, processes, schedulers

        request, spec = yaml.safe_load(submission.text), submission.spec
        scheduler, name, job_id = str(request["scheduler"]), spec.options["name"], str(spec.options["job_id"])
        if scheduler in IN_PROCESS:
            try:
                processes.start(name, request, _log_folder(spec) / "torchx.log", submission.hidden_env)
            except OSError as error:
                raise Rejected(f"its keeper cannot be started: {error.strerror}") from error
            return job_id
        try:
            there = schedulers.apps(scheduler)
        except ClusterError as error:  # nothing was sent
            raise Rejected(str(error)) from error
        if name in there:
            return job_id
        try:
            with schedulers.connected(scheduler) as connected, schedulers.sent_once():
                values = schedulers.options(connected, scheduler, request["options"])
                connected.schedule(connected.submit_dryrun(app.app_def(request["app"]), values))
        except Exception as error:  # whatever the scheduler's library raises
            try:
                there = schedulers.apps(scheduler)
            except ClusterError:
                raise Ambiguous(schedulers.one_line(error)) from error
            if name not in there:
                raise Rejected(schedulers.one_line(error)) from error
        return job_id

    def look(self, job_ids: Sequence[str], tags: Sequence[str] = ()) -> Look:
        """One list of apps for each scheduler. Tags are not looked for: a job's id is known before it is made."""
        views: dict[str, JobView] = {}
        asked: dict[str, list[str]] = {}
        for job_id in dict.fromkeys(job_ids):
            asked.setdefault(_parse(job_id)[0], []).append(job_id)
        for scheduler, ids in asked.items():
            try:
                views |= _processes(ids) if scheduler in IN_PROCESS else _apps(scheduler, ids)
            except (ClusterError, UserError) as error:
                views |= {job_id: JobView(job_id, "unreachable", str(error)) for job_id in ids}
        return Look(views, {})

    def find(self, tag: str) -> str | None:
        """None: see :meth:`look`."""
        return None

    def array_limits(self, cluster: TorchxCluster, parallel: int | None) -> ArrayLimits:
        """TorchX knows no arrays."""
        raise UserError("a study cannot run through TorchX, which knows no arrays; use --backend slurm, k8s or local")

    def element(self, job_id: str, index: int) -> str:
        """There is none."""
        return job_id

    def cancel(self, job_ids: Sequence[str], graceful: bool) -> None:
        """Tell the scheduler; where the state is saved first, the supervisors see the recorded intent themselves."""
        from llmops.backends.torchx import processes, schedulers

        for job_id in [] if graceful else job_ids:
            scheduler, place, name = _parse(job_id)
            if scheduler in IN_PROCESS:
                if place != socket.gethostname():
                    raise UserError(f"{job_id} runs on {place}: cancel it there")
                processes.end(name)
                continue
            try:
                found = schedulers.apps(scheduler).get(name) or schedulers.ask(scheduler, place, name)
                if found is not None:
                    schedulers.cancel(scheduler, found[0])
            except ClusterError as error:
                what = "the cancellation is recorded, so the run will not start again"
                raise ClusterError(f"{error}; {what}") from error


def _processes(job_ids: Sequence[str]) -> dict[str, JobView]:
    from llmops.backends.torchx import processes

    views = {}
    for job_id in job_ids:
        _, host, name = _parse(job_id)
        if host != socket.gethostname():
            views[job_id] = JobView(job_id, "unreachable", f"it runs on {host}; ask there")
        elif processes.alive(name):
            views[job_id] = JobView(job_id, "running")
        else:
            views[job_id] = JobView(job_id, "gone", "its processes are gone")
    return views


def _apps(scheduler: str, job_ids: Sequence[str]) -> dict[str, JobView]:
    from llmops.backends.torchx import schedulers

    views, listed = {}, schedulers.apps(scheduler)
    for job_id in job_ids:
        _, place, name = _parse(job_id)
        found = listed.get(name) or schedulers.ask(scheduler, place, name)
        gone = JobView(job_id, "gone", f"{scheduler} knows no such app")
        views[job_id] = JobView(job_id, found[1]) if found else gone
    return views


def _request(cluster: TorchxCluster, plain: dict[str, Any], log_folder: str) -> tuple[dict[str, Any], str]:
    """All that is handed to TorchX, and the request that it makes of it. Raises :class:`UserError` when it refuses."""
    from llmops.backends.torchx import app, schedulers

    name, given = str(cluster.scheduler), dict(cluster.options)
    if name in IN_PROCESS:  # else TorchX makes a folder each time
        given.setdefault("log_dir", log_folder)
    built = app.app_def(plain)
    with schedulers.connected(name) as scheduler, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what TorchX would like to know, too
        values = schedulers.options(scheduler, name, given)
        try:
            shown = repr(scheduler.submit_dryrun(built, values))
        except Exception as error:  # whatever the scheduler's library raises for what it cannot express
            raise UserError(f"TorchX's {name} refuses the app: {schedulers.one_line(error)}") from error
    return {"scheduler": name, "options": given, "app": plain}, shown


def _parse(job_id: str) -> tuple[str, str, str]:
    """Scheduler, place (empty where it does not matter) and app's name."""
    scheduler, *place, name = job_id.split("/")
    return scheduler, "/".join(place), name


def _log_folder(spec: JobSpec) -> Path:
    """Where TorchX keeps what the replicas' supervisors print."""
    if not is_url(spec.run_url):
        return Path(spec.run_url, "job", f"{spec.submission:04d}", "torchx")
    import platformdirs

    state = Path(platformdirs.user_state_dir("llmops", appauthor=False))
    return state / "torchx" / f"{spec.run_id}.{spec.submission}"
