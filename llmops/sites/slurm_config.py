"""From what a SLURM cluster says of itself to a configuration: one partition chosen, the rest as comments."""

from __future__ import annotations

import grp
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llmops.errors import ClusterError, UserError
from llmops.runs.records import whoami
from llmops.sites import slurm
from llmops.sites.slurm import Association, Node, Partition, Qos
from llmops.sites.write import Draft, Line, names, other, safe_name

SHORTEST_S = 600  # a limit that leaves no time to train, beside the warning before it, is not written
MAX_PARTITIONS = 30  # in comments


@dataclass(frozen=True)
class Site:
    """Everything that was asked. ``trouble``: what the accounting said instead of an answer."""

    config: dict[str, str]
    partitions: Sequence[Partition]
    nodes: Sequence[Node]
    associations: Sequence[Association]
    qos: Sequence[Qos]
    trouble: str
    user: str


def ask(timeout: float) -> Site:
    """Ask the controller, and the accounting where it answers. Raises :class:`ClusterError` when the first does not."""
    config, _ = slurm.settings(timeout)
    partitions, nodes = slurm.partitions(timeout), slurm.nodes(timeout)
    user = whoami()[0]
    accounts, qos, trouble = list[Association](), list[Qos](), ""
    try:
        accounts = slurm.associations(timeout, user, config.get("ClusterName", ""))
        qos = slurm.qos(timeout)
    except ClusterError as error:
        trouble = str(error)
    return Site(config, partitions, nodes, accounts, qos, trouble, user)


def draft(site: Site) -> Draft:
    """What is going to be written. Raises :class:`UserError` where no partition is up."""
    cluster = site.config.get("ClusterName", "")
    part = choose(site)
    machines = _nodes(site, part)
    return Draft(
        "slurm",
        safe_name(cluster, "site"),
        [
            f"The SLURM cluster {cluster} ({site.config.get('SLURM_VERSION', '')}) as it is for the user {site.user}:",
            "written by llmops init, and yours to edit.",
            "It describes one partition; what else the cluster has is in the comments.",
        ],
        [
            _partition(site, part),
            *_size(machines),
            _time(site, part),
            *_account(site),
            _qos(site, part),
            *_notes(site, part),
        ],
    )


def choose(site: Site) -> Partition:
    """The partition with the GPUs, or the default one: of those that are up and that the user may use."""
    may = [part for part in site.partitions if part.up and _may(site, part)]
    if not may:
        have = names([part.name for part in site.partitions]) or "none"
        raise UserError(f"no partition is up that {site.user} may use (there are: {have}); ask for access, or wait")
    gpus = {part.name: sum(sum(node.gpus.values()) for node in _nodes(site, part)) for part in may}
    with_gpus = [part for part in may if gpus[part.name]]
    default = next((part for part in may if part.default), None)
    if default is not None and (default in with_gpus or not with_gpus):
        return default
    return max(with_gpus or may, key=lambda part: gpus[part.name])


def _may(site: Site, part: Partition) -> bool:
    """As far as accounts and groups tell. Root is never refused by SLURM, but by DisableRootJobs."""
    mine = {each.account for each in site.associations if each.partition in ("", part.name)}
    allowed, denied = part.fields.get("AllowAccounts", "ALL"), part.fields.get("DenyAccounts", "")
    if allowed != "ALL" and mine and not mine & set(allowed.split(",")):
        return False
    if denied and mine and mine <= set(denied.split(",")):
        return False
    groups = part.fields.get("AllowGroups", "ALL")
    return groups == "ALL" or os.getuid() == 0 or bool(_groups() & set(groups.split(",")))


def _groups() -> set[str]:
    found = set()
    for number in os.getgroups():
        try:
            found.add(grp.getgrgid(number).gr_name)
        except KeyError:
            continue  # a group without a name is in no list
    return found


def _nodes(site: Site, part: Partition) -> list[Node]:
    """Of a partition; those that are down only where all are."""
    all_ = [node for node in site.nodes if part.name in node.partitions]
    return [node for node in all_ if node.usable] or all_


def _partition(site: Site, chosen: Partition) -> Line:
    rest = [part for part in site.partitions if part.name != chosen.name]
    others = [other("partition", part.name, _facts(site, part)) for part in rest[:MAX_PARTITIONS]]
    others += [f"and {len(rest) - MAX_PARTITIONS} more: sinfo shows them"] if len(rest) > MAX_PARTITIONS else []
    return Line("partition", chosen.name, _facts(site, chosen), others)


def _facts(site: Site, part: Partition) -> str:
    machines = _nodes(site, part)
    kinds = Counter((node.cpus, node.memory_mb, tuple(sorted(node.gpus.items()))) for node in machines)
    told = [
        f"{count} nodes of {cpus} CPUs, {memory / 1024:.0f} GiB" + "".join(f", {_gpu(*gpu)}" for gpu in gpus)
        for (cpus, memory, gpus), count in kinds.most_common(3)
    ]
    told += [f"and {len(kinds) - 3} other kinds of nodes"] if len(kinds) > 3 else []
    told += [] if machines else ["no nodes"]
    told.append(f"at most {_limit(part.max_time_s)}" if part.max_time_s else "no time limit")
    told += [f"at most {part.max_nodes} nodes a job"] if part.max_nodes else []
    told += [] if _may(site, part) else ["not for you"]
    return ", ".join(told if part.up else ["not up", *told])


def _gpu(kind: str, count: int) -> str:
    return f"{count} x {kind or 'GPU'}"


def _size(machines: Sequence[Node]) -> list[Line]:
    """One rank for each GPU of a node, and its share of the CPUs, of the kind of node that most are."""
    with_gpus = [node for node in machines if node.gpus]
    lines = [Line("nodes", 1, "set it for each run: cluster.nodes=4")]
    if not with_gpus:
        cpus = min((node.cpus for node in machines), default=1)
        return [*lines, Line("ranks_per_node", 1, "no GPUs here"), Line(comment=f"cpus_per_rank: at most {cpus}")]
    gpus, _ = Counter(tuple(sorted(node.gpus.items())) for node in with_gpus).most_common(1)[0]
    count = sum(number for _, number in gpus)
    same = [node for node in with_gpus if tuple(sorted(node.gpus.items())) == gpus]
    cpus = min(node.cpus for node in same) // count
    typed = [
        other("gres", f"gpu:{kind}:{n}", "instead of gpus_per_node, for this type alone") for kind, n in gpus if kind
    ]
    features = sorted({feature for node in machines for feature in node.features})
    lines += [
        Line("ranks_per_node", count, "one for each GPU"),
        Line("gpus_per_node", count, ", ".join(_gpu(*each) for each in gpus), typed),
    ]
    lines += [Line("cpus_per_rank", cpus, f"a node has {min(node.cpus for node in same)}")] if cpus else []
    if features:
        lines.append(Line(comment=f"constraint: features of these nodes are {names(features)}"))
    return lines


def _time(site: Site, part: Partition) -> Line:
    """The longest that all limits allow: the run is requeued when it is reached."""
    walls = [part.max_time_s, *(each.max_wall_s for each in _default_qos(site)), *_account_walls(site)]
    limits = [wall for wall in walls if wall]
    usual = f"; without it {_limit(part.default_time_s)}" if part.default_time_s else ""
    if not limits:
        return Line(comment=f"time: no limit here{usual or '; a shorter one, as 4:00:00 in quotes, may start sooner'}")
    least = min(limits)
    if least < SHORTEST_S:
        return Line(
            comment=f"time: at most {_limit(least)}; the run is warned before that, so it must exceed the warning"
        )
    return Line("time", _limit(least), f"the longest allowed, at which the run is requeued{usual}")


def _default_qos(site: Site) -> list[Qos]:
    default = next((each.default_qos for each in site.associations if each.default_qos), "")
    return [each for each in site.qos if each.name == default] if default else []


def _account_walls(site: Site) -> list[int | None]:
    return [each.max_wall_s for each in site.associations[:1]]


def _account(site: Site) -> list[Line]:
    accounts = list(dict.fromkeys(each.account for each in site.associations))
    if site.trouble:
        return [Line(comment=f"account: the accounting does not tell ({site.trouble})")]
    if not accounts:
        return [Line(comment=f"account: {site.user} has none in the accounting")]
    others = [other("account", each) for each in accounts[1:]]
    return [Line("account", accounts[0], "your default one" if others else "your only one", others)]


def _qos(site: Site, part: Partition) -> Line:
    mine = sorted({name for each in site.associations for name in each.qos})
    known = {each.name: each for each in site.qos}
    told = []
    for name in mine:
        wall = known[name].max_wall_s if name in known else None
        told.append(other("qos", name, f"at most {_limit(wall)}" if wall else ""))
    own = part.fields.get("QoS", "N/A")
    forced = f"; the partition's own is {own}" if own not in ("N/A", "") else ""
    return Line(comment=f"qos: the cluster's choice{forced}" + ("; yours are" if told else ""), others=told)


def _notes(site: Site, part: Partition) -> list[Line]:
    wait = slurm.number(site.config.get("KillWait", ""), 30)
    largest = slurm.number(site.config.get("MaxArraySize", ""), 1001) - 1
    mode = part.preempt_mode or site.config.get("PreemptMode", "OFF")
    way = "its jobs never make way" if mode == "OFF" else f"PreemptMode={mode}, GraceTime={part.grace_s} s"
    room = f"a stopped run has {part.grace_s + wait - 5} s to save, which checkpoint.save_seconds must fit"
    memory = part.fields.get("DefMemPerCPU") or part.fields.get("DefMemPerNode") or "UNLIMITED"
    default = (
        "all of a node's"
        if memory == "UNLIMITED"
        else f"{memory} MB " + ("a CPU" if part.fields.get("DefMemPerCPU") else "a node")
    )
    return [
        Line(comment=f"mem: without it a job gets {default}"),
        Line(comment=f"Preemption: {way}, KillWait={wait} s: {room}. `llmops doctor` says more."),
        Line(comment=f"A sweep may have {largest:,} trials in one array (MaxArraySize)."),
    ]


def _limit(seconds: int | None) -> str:
    """As sbatch reads it: ``2-00:00:00`` or ``04:00:00``."""
    if seconds is None:
        return "no limit"
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock
