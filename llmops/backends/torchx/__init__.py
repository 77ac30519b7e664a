"""Schedulers of TorchX that llmops has no backend for: AWS Batch, Docker on this machine, and others.

A job is known by its app's name, which is chosen before the app is made: ``<scheduler>/[<host>/]<name>``. Whether it is
there is asked with one list of apps for each scheduler, whatever the number of jobs. TorchX is imported when it is
needed, since it takes longer than the rest of the launcher.
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
        if cluster.image is None and name not in schedulers.WITHOUT_IMAGE:
            raise UserError(f"cluster.image is not set: {name} runs jobs in an image; add -o image=...")
        if cluster.image is not None and name in schedulers.WITHOUT_IMAGE:
            raise UserError(
                f"cluster.image={cluster.image}: {name} runs jobs in this machine's environment; leave it out"
            )
        _request(cluster, app.describe(cluster, "llmops", run_url, ["true"]), run_url)

    def options(self, cluster: TorchxCluster, spec_values: Mapping[str, Any]) -> dict[str, Any]:
        """What the app is called: all that is needed to ask about it; and what its supervisors must know."""
        tag, run_id = str(spec_values["tag"]), str(spec_values["run_id"])
        name = f"llmops-{run_id[-4:]}-{tag[-8:]}"
        host = f"{socket.gethostname()}/" if cluster.scheduler in IN_PROCESS else ""
        return {
            "job_id": f"{cluster.scheduler}/{host}{name}",
            "name": name,
            "workload": "torchx",
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
        name, job_id = str(request["scheduler"]), str(spec.options["job_id"])
        if name in IN_PROCESS:
            try:
                processes.start(
                    spec.options["name"], request, _log_folder(spec) / "torchx.log", list(submission.hidden_env)
                )
            except OSError as error:
                raise Rejected(f"its keeper cannot be started: {error.strerror}") from error
            return job_id
        try:
            there = schedulers.apps(name)
        except ClusterError as error:  # nothing was sent
            raise Rejected(str(error)) from error
        if spec.options["name"] in there:
            return job_id
        try:
            with schedulers.connected(name) as scheduler:
                values = schedulers.options(scheduler, name, request["options"])
                scheduler.schedule(scheduler.submit_dryrun(app.app_def(request["app"]), values))
        except Exception as error:
            try:
                there = schedulers.apps(name)
            except ClusterError:
                raise Ambiguous(schedulers.one_line(error)) from error
            if spec.options["name"] not in there:
                raise Rejected(schedulers.one_line(error)) from error
        return job_id

    def look(self, job_ids: Sequence[str], tags: Sequence[str] = ()) -> Look:
        """One list of apps for each scheduler. Tags are not looked for: a job's id is known before it is made."""
        from llmops.backends.torchx import processes, schedulers

        views: dict[str, JobView] = {}
        asked: dict[str, list[tuple[str, str]]] = {}
        for job_id in dict.fromkeys(job_ids):
            scheduler, host, name = _parse(job_id)
            if scheduler not in IN_PROCESS:
                asked.setdefault(scheduler, []).append((job_id, name))
            elif host != socket.gethostname():
                views[job_id] = JobView(job_id, "unreachable", f"it runs on {host}; ask there")
            else:
                there = bool(processes.alive(name))
                views[job_id] = (
                    JobView(job_id, "running") if there else JobView(job_id, "gone", "its processes are gone")
                )
        for scheduler, jobs in asked.items():
            try:
                there_ = schedulers.apps(scheduler)
            except (ClusterError, UserError) as error:
                views |= {job_id: JobView(job_id, "unreachable", str(error)) for job_id, _ in jobs}
                continue
            for job_id, name in jobs:
                state = there_[name][1] if name in there_ else "gone"
                views[job_id] = JobView(job_id, state, "" if name in there_ else f"{scheduler} knows no such app")
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
            scheduler, host, name = _parse(job_id)
            if scheduler in IN_PROCESS:
                if host != socket.gethostname():
                    raise UserError(f"{job_id} runs on {host}: cancel it there")
                processes.end(name)
                continue
            found = schedulers.apps(scheduler).get(name)
            if found is None:
                continue
            with schedulers.connected(scheduler) as connected:
                try:
                    connected.cancel(found[0])
                except Exception as error:
                    what = "the cancellation is recorded, so the run will not start again"
                    raise ClusterError(f"TorchX's {scheduler}: {schedulers.one_line(error)}; {what}") from error


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
    """Scheduler, host (empty where it does not matter) and app's name."""
    scheduler, *host, name = job_id.split("/")
    return scheduler, "/".join(host), name


def _log_folder(spec: JobSpec) -> Path:
    """Where TorchX keeps what the replicas' supervisors print."""
    if not is_url(spec.run_url):
        return Path(spec.run_url, "job", f"{spec.submission:04d}", "torchx")
    import platformdirs

    state = Path(platformdirs.user_state_dir("llmops", appauthor=False))
    return state / "torchx" / f"{spec.run_id}.{spec.submission}"
