"""Does Kubernetes work here: the server, our rights, kinds, queues, quotas, and the time that pods have to leave."""

from __future__ import annotations

import email.utils
import secrets
import time
from collections.abc import Mapping, Sequence

from llmops.backends.k8s import client, discover
from llmops.backends.k8s.client import Api
from llmops.backends.k8s.explain import ApiError
from llmops.backends.k8s.resources import WORKLOADS
from llmops.backends.k8s.submit import DRY_RUN
from llmops.config.schema import K8sCluster, pod_grace_seconds
from llmops.sites import k8s
from llmops.sites.checks import Check, Result
from llmops.sites.stores import offset_check

SECTION = "kubernetes"
_WORKLOAD = ("create", "get", "list", "delete")
_OTHER = ("create", "patch", "delete")
# (group, resource, verb) of all that the verbs of llmops do; the Role of k8s/base/launcher.yaml is the same.
COMMON = [
    *(("", resource, verb) for resource in ("configmaps", "services") for verb in _OTHER),
    ("", "pods", "list"),
    ("", "pods", "watch"),
    ("", "pods/log", "get"),
    ("", "events", "list"),
]
KINDS = {
    workload: [(resource.group, resource.plural, verb) for verb in _WORKLOAD]
    for workload, resource in WORKLOADS.items()
}
KINDS["trainjob"] += [("trainer.kubeflow.org", "trainingruntimes", verb) for verb in _OTHER]
GANGS = {"scheduling.volcano.sh": "volcano", "scheduling.x-k8s.io": "coscheduling"}
ROLE = "ask for the Role of k8s/base in namespace {}: kubectl apply -k k8s/base, and a RoleBinding to you"


def line(name: str, result: Result, found: str, remedy: str = "") -> Check:
    """A check of this section."""
    return Check(SECTION, name, result, found, remedy)


def connect(cluster: K8sCluster) -> tuple[Api, str]:
    """The API server that a run would use, and its namespace."""
    context, namespace = client.current(cluster.context, cluster.kubeconfig)
    return client.connect(context, cluster.kubeconfig), cluster.namespace or namespace


def server(cluster: K8sCluster) -> list[Check]:
    """Does it answer, is it new enough, and what time has it?"""
    api, namespace = connect(cluster)
    text, numbers = k8s.version(api)
    where = f"context {api.context}" if api.context else "the cluster around this pod"
    checks = [line("API server", "ok", f"{api.server} ({where}, namespace {namespace})")]
    oldest = ".".join(map(str, k8s.OLDEST))
    if numbers < k8s.OLDEST:
        remedy = f"upgrade to {oldest} or later: restarts rely on what pod failure policies do since then"
        checks.append(line("version", "fail", f"{text}, older than {oldest}", remedy))
    else:
        checks.append(line("version", "ok", text))
    before = time.time()
    date = api.date()
    stamp = email.utils.parsedate_to_datetime(date).timestamp() if date else None
    if stamp is not None:
        offset = stamp - min(max(stamp, before - 1), time.time())
        checks.append(offset_check(SECTION, "the API server", offset))
    return checks


def rights(cluster: K8sCluster) -> list[Check]:
    """May we do what the verbs do, and does the namespace take it?"""
    api, namespace = connect(cluster)
    served = discover.served(api)
    chosen = discover.choose(api) if cluster.workload == "auto" else cluster.workload
    asked = {"all runs": COMMON, **{workload: KINDS[workload] for workload in served}}
    if cluster.gang != "none":
        group = next(group for group, gang in GANGS.items() if gang == cluster.gang)
        asked[cluster.gang] = [(group, "podgroups", verb) for verb in _OTHER]
    flat = [(what, right) for what, each in asked.items() for right in each]
    answers = k8s.allowed(api, namespace, [right for _, right in flat])
    denied: dict[str, list[str]] = {what: [] for what in asked}
    for (what, right), yes in zip(flat, answers, strict=True):
        if not yes:
            denied[what].append(_named(*right))
    checks = [_workloads(cluster, served, chosen)]
    for what, missing in denied.items():
        needed = what in ("all runs", chosen, cluster.gang)
        if missing:
            found = f"may not {', '.join(missing)}"
            checks.append(line(f"rights: {what}", "fail" if needed else "warn", found, ROLE.format(namespace)))
        else:
            checks.append(line(f"rights: {what}", "ok", f"all {len(asked[what])}"))
    if not denied["all runs"]:
        checks.append(_dry_run(api, namespace))
    return checks


def _named(group: str, resource: str, verb: str) -> str:
    return f"{verb} {resource}.{group}" if group else f"{verb} {resource}"


def _workloads(cluster: K8sCluster, served: Sequence[str], chosen: str) -> Check:
    if chosen not in served:
        remedy = f"choose cluster.workload={served[0]}, or have the operator of {chosen} installed"
        return line("workloads", "fail", f"{chosen} is not served; there are: {', '.join(served)}", remedy)
    auto = f"; auto takes {chosen}" if cluster.workload == "auto" else f"; cluster.workload={chosen}"
    return line("workloads", "ok", f"{', '.join(served)}{auto}")


def _dry_run(api: Api, namespace: str) -> Check:
    """What no review of rights tells: is there the namespace, and do quotas and webhooks take an object of ours?"""
    name = f"llmops-doctor-{secrets.token_hex(4)}"
    item = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"key": "value"}}
    try:
        api.post(f"/api/v1/namespaces/{namespace}/configmaps", item, DRY_RUN)
    except ApiError as error:
        found, _, remedy = str(error).partition("; ")
        return line("dry run", "fail", found, remedy or f"ask the administrator of namespace {namespace}")
    return line("dry run", "ok", f"namespace {namespace} would take a ConfigMap")


def surroundings(cluster: K8sCluster, save_s: float) -> list[Check]:
    """Queues, gangs, quotas, and how long a pod has to leave."""
    api, namespace = connect(cluster)
    known = k8s.groups(api)
    nodes = k8s.nodes(api)
    return [
        *_queues(api, namespace, cluster, known),
        _gangs(cluster, known),
        *_quotas(k8s.quotas(api, namespace)),
        _grace(cluster, save_s, k8s.spot(nodes or [])),
        *_gpus(cluster, nodes),
    ]


def _queues(api: Api, namespace: str, cluster: K8sCluster, known: Mapping[str, Sequence[str]]) -> list[Check]:
    wanted = cluster.queue
    if "kueue.x-k8s.io" not in known:
        if wanted:
            remedy = "set cluster.queue=null, or have Kueue installed: without it the run stays suspended for ever"
            return [line("queues", "fail", f"cluster.queue={wanted}, and there is no Kueue", remedy)]
        return [line("queues", "ok", "no Kueue: pods start as soon as they fit")]
    found = k8s.queues(api, namespace, known)
    if found is None:
        remedy = "ask your administrator for the name of your queue, for cluster.queue"
        return [line("queues", "warn", f"Kueue is here, and its queues in {namespace} may not be listed", remedy)]
    names = [k8s.name(each) for each in found]
    if wanted and wanted not in names:
        have = f"choose one of {', '.join(names)}" if names else "ask for a LocalQueue there, as k8s/kueue makes one"
        return [line("queues", "fail", f"cluster.queue={wanted} is not in {namespace}", have)]
    asleep = {k8s.name(each): why for each in found if (why := k8s.inactive(each))}
    if wanted in asleep or (asleep and len(asleep) == len(names)):
        told = "; ".join(f"{queue}: {why}" for queue, why in asleep.items() if wanted in (None, queue))
        bad: Result = "fail" if wanted in asleep else "warn"
        return [line("queues", bad, told, "tell the administrator of Kueue: it admits nothing from there")]
    if not names:
        remedy = "ask for a LocalQueue, as k8s/kueue makes one, if this cluster starts nothing without"
        return [line("queues", "warn", f"Kueue is here, without a queue in {namespace}", remedy)]
    chosen = f"; cluster.queue={wanted}" if wanted else "; none is set (cluster.queue)"
    told = ", ".join(f"{name} (admits nothing)" if name in asleep else name for name in names)
    return [line("queues", "ok", f"{told}{chosen}")]


def _gangs(cluster: K8sCluster, known: Mapping[str, Sequence[str]]) -> Check:
    there = [gang for group, gang in GANGS.items() if group in known]
    if cluster.gang != "none" and cluster.gang not in there:
        remedy = "set cluster.gang=none, or have that scheduler installed"
        return line("gangs", "fail", f"cluster.gang={cluster.gang}, whose PodGroup is not served", remedy)
    return line("gangs", "ok", ", ".join(there) or "no gang scheduler (cluster.gang); Kueue and JobSet do without")


def _quotas(found: Sequence[k8s.Object] | None) -> list[Check]:
    checks = []
    for resource, (used, hard) in k8s.quota_gpus(found or []).items():
        told = f"{used} of {hard} {resource} are used in the namespace"
        if hard.isdigit() and used.isdigit() and int(used) >= int(hard):
            remedy = "wait until others are done, or ask for more: pods beyond it are never made"
            checks.append(line("quota", "warn", told, remedy))
        else:
            checks.append(line("quota", "ok", told))
    return checks


def _grace(cluster: K8sCluster, save_s: float, spot_s: int | None) -> Check:
    grace = pod_grace_seconds(cluster, save_s)
    source = "cluster.grace_s" if cluster.grace_s is not None else "checkpoint.save_seconds + 30"
    found = f"pods have {grace} s to save and leave ({source}), not Kubernetes' own 30"
    if grace < save_s:
        remedy = f"set cluster.grace_s={save_s + 30:.0f}: checkpoint.save_seconds is {save_s:g}"
        return line("grace period", "fail", found, remedy)
    if spot_s is not None and save_s > spot_s - 5:
        remedy = f"set checkpoint.save_seconds={max(spot_s - 10, 1)} or less on these, and save often"
        return line("grace period", "warn", f"{found}; spot nodes are taken back after {spot_s} s", remedy)
    return line("grace period", "ok", found)


def _gpus(cluster: K8sCluster, nodes: Sequence[k8s.Object] | None) -> list[Check]:
    if nodes is None:
        return []  # most users may not look at nodes
    kinds = k8s.gpus(nodes)
    if not kinds:
        return [line("GPUs", "ok", f"none on {len(nodes)} nodes")]
    told = ", ".join(
        f"{k8s.count(number)} with {per} {resource}" + f" ({value})" * bool(value)
        for resource, per, _, value, number in kinds
    )
    if (cluster.gpus_per_node or 0) and cluster.gpu_resource not in {kind[0] for kind in kinds}:
        return [line("GPUs", "fail", told, f"set cluster.gpu_resource={kinds[0][0]}")]
    return [line("GPUs", "ok", told)]
