"""Studies: which ones a cluster can run, and what their one Job must say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmops.backends.base import ArrayLimits
from llmops.config.schema import K8sCluster
from llmops.errors import UserError

# Of a Job with backoffLimitPerIndex. The API takes more only with maxFailedIndexes, after which all its runs end.
MAX_INDEXES = 100_000


def limits(cluster: K8sCluster, parallel: int | None) -> ArrayLimits:
    """One Indexed Job for trials of one pod; for larger ones a workload each, whose pods only Kueue starts together.

    ``parallel``: trials at a time that were asked for. Raises :class:`UserError` for what cannot be run so.
    """
    if cluster.nodes > 1:
        if cluster.queue is None:
            raise UserError(
                f"cluster.nodes={cluster.nodes}: trials of {cluster.nodes} pods each need a Kueue queue that admits "
                "them as a whole, or they wait for each other's nodes: set cluster.queue=NAME, or cluster.nodes=1 with "
                "more cluster.gpus_per_node"
            )
        if parallel is not None:
            raise UserError(
                f"sweep.max_parallel={parallel}: trials of {cluster.nodes} pods run as the quota of "
                f"cluster.queue={cluster.queue} admits them; leave it out"
            )
        return ArrayLimits(elements=1)
    if cluster.workload not in ("auto", "job"):
        raise UserError(
            f"cluster.workload={cluster.workload}: a study of one-pod trials is one Indexed Job; set "
            "cluster.workload=job or auto"
        )
    if cluster.active_deadline_s is not None:
        raise UserError(
            f"cluster.active_deadline_s={cluster.active_deadline_s}: it would end all trials of the study together; "
            "set it to null, and sweep.trial_minutes for each trial"
        )
    return ArrayLimits(elements=MAX_INDEXES)


def admission(cluster: K8sCluster, parallel: int) -> dict[str, str]:
    """Runs that are independent start as the quota has room; without this Kueue waits until it has for all at once.

    Kueue refuses a minimum that is no less than the parallelism.
    """
    return {"kueue.x-k8s.io/job-min-parallelism": "1"} if cluster.queue and parallel > 1 else {}


def check(job: Mapping[str, Any], trials: int, source: str, cluster: K8sCluster) -> None:
    """A template for runs of several pods would start the first trial alone, or end all with the first that fails."""
    spec = job.get("spec") or {}
    where = "cluster.patches.Job" if "Job" in cluster.patches else source
    if spec.get("completionMode") != "Indexed" or spec.get("completions") != trials:
        raise UserError(f"{where}: the Job of a study must be Indexed with completions: {trials}, one for each trial")
    if "backoffLimitPerIndex" not in spec or "maxFailedIndexes" in spec:
        raise UserError(
            f"{where}: the Job of a study needs backoffLimitPerIndex and no maxFailedIndexes: one trial that fails "
            "must not end the others"
        )
