"""From what a Kubernetes cluster says of itself to a configuration; what may not be asked is said to be so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmops.backends.k8s import client, discover
from llmops.backends.k8s.client import Api
from llmops.config.k8s_rules import DNS_NAME
from llmops.sites import k8s
from llmops.sites.k8s import Object, name
from llmops.sites.write import Draft, Line, names, other, safe_name

DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


@dataclass(frozen=True)
class Site:
    """Everything that was asked; None for what may not be listed."""

    server: str
    version: str
    context: str
    namespace: str
    workloads: Sequence[str]
    auto: str
    groups: Mapping[str, Sequence[str]]
    queues: Sequence[Object] | None
    classes: Sequence[Object] | None
    priorities: Sequence[Object] | None
    claims: Sequence[Object] | None
    quotas: Sequence[Object] | None
    namespaces: Sequence[Object] | None
    nodes: Sequence[Object] | None


def ask(tell: Callable[[str], None] = lambda what: None) -> Site:
    """Ask the current context's cluster. Raises :class:`ClusterError` when it does not answer."""
    context, namespace = client.current(None, None)
    api: Api = client.connect(context)
    version, _ = k8s.version(api)
    tell("what it serves")
    groups = k8s.groups(api)
    workloads = discover.served(api)
    tell("what the namespace has")
    return Site(
        api.server,
        version,
        context,
        namespace,
        workloads,
        discover.choose(api),
        groups,
        k8s.queues(api, namespace, groups),
        k8s.storage_classes(api),
        k8s.priority_classes(api),
        k8s.claims(api, namespace),
        k8s.quotas(api, namespace),
        k8s.namespaces(api),
        k8s.nodes(api),
    )


def draft(site: Site, image: str | None) -> Draft:
    """What is going to be written."""
    return Draft(
        "k8s",
        safe_name(site.context, "in-cluster"),
        [
            f"The Kubernetes cluster {site.server} ({site.version}) as the namespace {site.namespace} shows it:",
            "written by llmops init, and yours to edit.",
        ],
        [
            Line(
                "context", site.context or None, "of the kubeconfig" if site.context else "the cluster around the pod"
            ),
            _namespace(site),
            Line("image", image, "" if image else "must be set, here or as cluster.image=: your program's image"),
            Line("workload", "auto", f"takes {site.auto}", _workloads(site)),
            Line("nodes", 1, "pods; set it for each run: cluster.nodes=4"),
            *_gpus(site),
            *_quotas(site),
            *_queues(site),
            *_gangs(site),
            *_priorities(site),
            *_storage(site),
        ],
    )


def _namespace(site: Site) -> Line:
    others = [name(each) for each in site.namespaces or [] if name(each) != site.namespace]
    told = f"others here: {names(others)}" if others else ""
    return Line("namespace", site.namespace, "the context's", [told] if told else [])


def _workloads(site: Site) -> list[str]:
    return [other("workload", each) for each in site.workloads]


def _gpus(site: Site) -> list[Line]:
    if site.nodes is None:
        limited = k8s.quota_gpus(site.quotas or [])
        told = "Nodes may not be listed here, so ask how many GPUs one has: ranks_per_node, gpus_per_node"
        named = [Line("gpu_resource", resource, "as the quota calls it") for resource in list(limited)[:1]]
        return [Line(comment=told), *named]
    kinds = k8s.gpus(site.nodes)
    if not kinds:
        return [Line("ranks_per_node", 1, f"no GPUs on {len(site.nodes)} nodes")]
    resource, count, label, value, number = kinds[0]
    others = [line for kind in kinds[1:] for line in _kind(*kind)]
    lines = [
        Line("ranks_per_node", count, "one for each GPU"),
        Line("gpus_per_node", count, f"of {k8s.count(number)}" + f": {value}" * bool(value), others),
        Line("gpu_resource", resource),
    ]
    if label:
        lines.append(Line("node_selector", {label: value}, "so that all ranks have the same GPU"))
    tolerations = _tolerations(site.nodes, resource, label, value)
    lines += [Line("tolerations", tolerations, "these nodes are kept for those who say so")] if tolerations else []
    fit = [each for each in site.nodes if _is(each, resource, label, value)]
    least = fit[0]["status"]["allocatable"]
    told = (
        f"cpus, memory: such a node has {least.get('cpu')} and {least.get('memory')}, of which its own pods take some"
    )
    return [*lines, Line(comment=told)]


def _kind(resource: str, count: int, label: str, value: str, number: int) -> list[str]:
    lines = [other("ranks_per_node", count, f"for {k8s.count(number)}"), other("gpus_per_node", count)]
    lines.append(other("gpu_resource", resource))
    return [*lines, other("node_selector", {label: value})] if label else lines


def _is(node: Object, resource: str, label: str, value: str) -> bool:
    labels = node["metadata"].get("labels") or {}
    return resource in (node.get("status") or {}).get("allocatable", {}) and (not label or labels.get(label) == value)


def _tolerations(nodes: Sequence[Object], resource: str, label: str, value: str) -> list[dict[str, Any]]:
    """For taints that all nodes of this kind have, and that keep pods away."""
    per_node = [
        {
            (taint["key"], taint["effect"])
            for taint in (node.get("spec") or {}).get("taints") or []
            if taint.get("effect") in ("NoSchedule", "NoExecute") and not taint["key"].startswith("node.kubernetes.io/")
        }
        for node in nodes
        if _is(node, resource, label, value)
    ]
    common = set.intersection(*per_node) if per_node else set()
    return [{"key": key, "operator": "Exists", "effect": effect} for key, effect in sorted(common)]


def _quotas(site: Site) -> list[Line]:
    told = []
    for each in site.quotas or []:
        status = each.get("status") or {}
        used = status.get("used") or {}
        hard = status.get("hard") or {}
        told.append(f"{name(each)}: " + ", ".join(f"{key} {used.get(key, 0)} of {most}" for key, most in hard.items()))
    return [Line(comment="Quotas of the namespace; pods beyond them are never made:", others=told)] if told else []


def _queues(site: Site) -> list[Line]:
    if "kueue.x-k8s.io" not in site.groups:
        return []
    if site.queues is None:
        return [Line(comment="queue: Kueue is here, and its queues may not be listed; ask for the name of yours")]
    known = [each for each in site.queues if not k8s.inactive(each)]
    if not known:
        return [Line(comment="queue: Kueue is here, without a queue in this namespace that admits anything")]
    others = [other("queue", name(each), f"for {_cluster_queue(each)}") for each in known[1:]]
    return [Line("queue", name(known[0]), f"of Kueue, for {_cluster_queue(known[0])}", others)]


def _cluster_queue(queue: Object) -> str:
    return str((queue.get("spec") or {}).get("clusterQueue") or "no cluster queue")


def _gangs(site: Site) -> list[Line]:
    from llmops.sites.k8s_checks import GANGS

    there = [gang for group, gang in GANGS.items() if group in site.groups]
    return [Line(comment=f"gang: {' or '.join(there)} could place all pods together")] if there else []


def _priorities(site: Site) -> list[Line]:
    if site.priorities is None:
        return [Line(comment="priority_class: may not be listed")]
    ordered = sorted(site.priorities, key=lambda each: -int(each.get("value") or 0))
    told = [
        other(
            "priority_class",
            name(each),
            f"{each.get('value')}{', the default' if each.get('globalDefault') else ''}"
            f"{', never preempts' if each.get('preemptionPolicy') == 'Never' else ''}",
        )
        for each in ordered
    ]
    return [Line(comment="priority_class: none is set; there are", others=told)] if told else []


def _storage(site: Site) -> list[Line]:
    lines = []
    shared = [
        name(each)
        for each in site.claims or []
        if "ReadWriteMany" in ((each.get("spec") or {}).get("accessModes") or []) and DNS_NAME.fullmatch(name(each))
    ]
    if shared:
        told = [other("mounts", [{"path": "/runs", "pvc": each}]) for each in shared]
        lines.append(Line(comment="mounts: volumes here that many pods may write to, as for a run store:", others=told))
    if site.classes:
        told = [
            f"{name(each)}  ({each.get('provisioner')}"
            + (", the default)" if (each["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true" else ")")
            for each in site.classes
        ]
        lines.append(Line(comment="Storage classes, for volumes of your own (k8s/storage):", others=told))
    return lines
