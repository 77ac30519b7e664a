"""Kubernetes through its API: Indexed Job, JobSet, PyTorchJob or TrainJob, one pod for each node of the run.

A study of one-pod runs is one Indexed Job; of larger runs each has a workload of its own.

Nothing here is imported before it is needed: the official client alone takes longer than the rest of the launcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops.agent.rundir import is_url
from llmops.backends.base import ArrayLimits, Look, Rejected, Submission
from llmops.errors import ClusterError, UserError
from llmops.job import JobSpec, JobView

if TYPE_CHECKING:
    from llmops.backends.k8s.client import Api
    from llmops.backends.k8s.logs import PodLine
    from llmops.backends.k8s.resources import JobId
    from llmops.config.schema import K8sCluster


class K8sBackend:
    """Jobs of any cluster that the kubeconfig knows, or of the one that this process runs inside."""

    name = "k8s"
    text_name = "manifest.yaml"
    own_image = True

    def check(self, cluster: K8sCluster, run_url: str) -> None:
        """Refuse what no pod could reach. The rest is the API server's to say, in the dry run."""
        if is_url(run_url):
            return
        run, mounts = Path(run_url), [Path(mount.path) for mount in cluster.mounts]
        if not any(mount == run or mount in run.parents for mount in mounts):
            raise UserError(
                f"runs_url: the folder {run.parent} is on this machine, and no entry of cluster.mounts brings it into "
                f"the pods; add one (path: {run.parent}, with pvc: or host_path:), or set runs_url to an object store"
            )

    def options(self, cluster: K8sCluster, spec_values: Mapping[str, Any]) -> dict[str, Any]:
        """Where the job will be, and what it will be called: all that is needed to ask about it."""
        from llmops.backends.k8s import client, discover, manifests
        from llmops.backends.k8s.resources import ARRAY, JobId
        from llmops.config.schema import pod_grace_seconds

        context, namespace = client.current(cluster.context, cluster.kubeconfig)
        kubeconfig = str(Path(cluster.kubeconfig).expanduser().absolute()) if cluster.kubeconfig else ""
        workload: str = ARRAY if spec_values["trials"] and cluster.nodes == 1 else cluster.workload
        if workload == "auto":
            workload = discover.choose(_connect(context, kubeconfig))
        name = manifests.object_name(spec_values["tag"], spec_values["run_id"])
        job = JobId(context, cluster.namespace or namespace, workload, name, kubeconfig)
        return {
            "job_id": str(job),
            "workload": workload,
            "namespace": job.namespace,
            "context": context,
            "name": name,
            "image": cluster.image,
            "grace_s": pod_grace_seconds(cluster, float(spec_values["save_s"])),
            "wait_s": cluster.wait_s,
            # On a node's own network others may have the port: there it is a free one.
            "metrics_port": None if cluster.host_network else manifests.METRICS_PORT,
        }

    def render(self, cluster: K8sCluster, spec: JobSpec, agent: Path | None) -> str:
        """All objects, as YAML, the workload last."""
        from llmops.backends.k8s import manifests

        return manifests.render(cluster, spec, agent)

    def submit(self, submission: Submission) -> str:
        """A dry run of every object, then the objects; see :func:`llmops.backends.k8s.submit.submit`."""
        from llmops.backends.k8s import manifests
        from llmops.backends.k8s.submit import submit

        job = _job_id(str(submission.spec.options["job_id"]))
        try:
            api = _connect(job.context, job.kubeconfig)
        except ClusterError as error:
            raise Rejected(str(error)) from error
        submit(api, job.namespace, manifests.load(submission.text))
        return str(job)

    def look(self, job_ids: Sequence[str], tags: Sequence[str] = ()) -> Look:
        """For each namespace one list of pods and one of each kind of workload; events only where pods tell nothing.

        Tags are looked for where the jobs are, and in the current context's namespace: a tag does not say where.
        """
        from llmops.backends.k8s.look import look_at
        from llmops.backends.k8s.resources import JobId

        views: dict[str, JobView] = {}
        places: dict[tuple[str, str, str], list[JobId]] = {}
        for text in dict.fromkeys(job_ids):
            job = JobId.parse(text)
            if job is None:
                views[text] = JobView(text, "unreachable", "this is no job id of Kubernetes")
            else:
                places.setdefault((job.kubeconfig, job.context, job.namespace), []).append(job)
        for (kubeconfig, context, _), jobs in places.items():
            try:
                views |= look_at(_connect(context, kubeconfig), jobs)
            except (ClusterError, UserError) as error:
                views |= {str(job): JobView(str(job), "unreachable", str(error)) for job in jobs}
        found: dict[str, str] = {}
        try:
            found = self._find(tags, places) if tags else {}
        except (ClusterError, UserError) as error:
            # Nobody's view is hidden by a tag that cannot be looked for now; `find` says why.
            views["unreachable"] = JobView("unreachable", "unreachable", str(error))
        asked = [text for text in found.values() if text not in views]
        if asked:
            views |= self.look(asked).views
        return Look(views, found)

    def find(self, tag: str) -> str | None:
        """The job that carries this tag, in the current context's namespace."""
        return self._find((tag,), ()).get(tag)

    def array_limits(self, cluster: K8sCluster, parallel: int | None) -> ArrayLimits:
        """See :func:`llmops.backends.k8s.arrays.limits`."""
        from llmops.backends.k8s import arrays

        return arrays.limits(cluster, parallel)

    def element(self, job_id: str, index: int) -> str:
        """One index of an Indexed Job; a workload of its own is its only element."""
        from llmops.backends.k8s.resources import JobId

        job = JobId.parse(job_id)
        return job_id if job is None else str(job.element(index))  # `look` says what is wrong with it

    def cancel(self, job_ids: Sequence[str], graceful: bool) -> None:
        """Delete, and let the pods end first: their supervisors save or do not, as the recorded intent says.

        Elements of arrays are left to their supervisors, which look for the intent every few seconds: a pod that is
        deleted is made again, and to delete pods is no right that a launcher needs.
        """
        failed: ClusterError | None = None
        for text in job_ids:
            try:
                job = _job_id(text)
                if job.position is not None:
                    continue
                api = _connect(job.context, job.kubeconfig)
                api.delete(job.resource.path(job.namespace, job.name), "Foreground")
            except ClusterError as error:
                failed = failed or error
        if failed is not None:
            raise ClusterError(f"{failed}; the cancellation is recorded, so the run will not start again") from failed

    def logs(self, job_id: str, n: int | None = None, done: Callable[[], bool] | None = None) -> Iterator[PodLine]:
        """What the job's pods have printed; with ``done`` also what they print from now on, until it says True."""
        from llmops.backends.k8s import logs

        job = _job_id(job_id)
        api = _connect(job.context, job.kubeconfig)
        return logs.tail(api, job, n) if done is None else logs.follow(api, job, done, n)

    def _find(self, tags: Sequence[str], places: Sequence[tuple[str, str, str]] | Mapping[Any, Any]) -> dict[str, str]:
        from llmops.backends.k8s import client, manifests
        from llmops.backends.k8s.look import find_by_tag

        context, namespace = client.current(None, None)
        names = {manifests.object_name(tag, tag.rsplit(".", 2)[0]): tag for tag in tags}
        found: dict[str, str] = {}
        for kubeconfig, where, space in dict.fromkeys([("", context, namespace), *places]):
            found |= {tag: str(job) for tag, job in find_by_tag(_connect(where, kubeconfig), space, names).items()}
        return found


def _job_id(text: str) -> JobId:
    from llmops.backends.k8s.resources import JobId

    job = JobId.parse(text)
    if job is None:
        raise ClusterError(f"{text!r} is no job id of Kubernetes (<context>/<namespace>/<workload>/<name>[/<index>])")
    return job


@functools.lru_cache(maxsize=16)
def _connect(context: str, kubeconfig: str) -> Api:
    """One connection pool for each API server, for the life of the process."""
    from llmops.backends.k8s.client import connect

    return connect(context, kubeconfig or None)
