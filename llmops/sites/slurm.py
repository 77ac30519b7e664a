"""What a SLURM cluster says of itself: settings, partitions, nodes, and the user's accounts."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmops.backends.slurm_machine import Here
from llmops.config.schema import time_limit_seconds
from llmops.errors import ClusterError

# POWERED_DOWN and its like are none of these: such a node starts when a job wants it.
DOWN = re.compile(r"\b(DOWN|DRAIN|FAIL|FUTURE|NOT_RESPONDING|UNKNOWN|MAINT)")
_PAIR = re.compile(r"(?:^| )([A-Za-z][\w/:]*)=")


@dataclass(frozen=True)
class Node:
    """One machine; ``gpus``: their type (empty where it has no name) and number."""

    name: str
    partitions: Sequence[str]
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int]
    features: Sequence[str]
    usable: bool


@dataclass(frozen=True)
class Partition:
    """As ``scontrol show partition`` has it. Times in seconds; None: no limit."""

    name: str
    default: bool
    up: bool
    max_time_s: int | None
    default_time_s: int | None
    max_nodes: int | None
    grace_s: int
    preempt_mode: str
    fields: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Association:
    """One account that the user may charge."""

    account: str
    partition: str
    qos: Sequence[str]
    default_qos: str
    max_wall_s: int | None


@dataclass(frozen=True)
class Qos:
    """Limits and preemption of a quality of service."""

    name: str
    max_wall_s: int | None
    grace_s: int
    preempt_mode: str
    preempts: str


def ask(timeout: float, *command: str) -> str:
    """The output of one of SLURM's commands. Raises :class:`ClusterError` with its complaint."""
    code, output, errors = Here().call(*command, timeout=timeout)
    if code:
        told = errors or " ".join(output.split()) or f"it returned {code}"
        raise ClusterError(f"{' '.join(command[:3])}: {told}; is the daemon up, and this machine one of its clients?")
    return output


def settings(timeout: float) -> tuple[dict[str, str], float | None]:
    """``scontrol show config``, and how far the controller's clock is before ours, in seconds."""
    before = time.time()
    text = ask(timeout, "scontrol", "show", "config")
    return parse_config(text), clock_offset(text, before, time.time())


def clock_offset(text: str, before: float, after: float) -> float | None:
    """Of the controller, which dates its answer to a second; asked between ``before`` and ``after`` (epoch seconds)."""
    found = re.search(r"^Configuration data as of (\S+)", text, re.MULTILINE)
    try:
        stamp = time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S")) if found else None
    except ValueError:
        return None
    return None if stamp is None else stamp - min(max(stamp, before - 1), after)


def parse_config(text: str) -> dict[str, str]:
    """Settings by name; empty for ``(null)``."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip().removeprefix("(null)") for name, _, value in pairs}


def partitions(timeout: float) -> list[Partition]:
    """Those that the user may see."""
    return parse_partitions(ask(timeout, "scontrol", "-o", "show", "partition"))


def parse_partitions(text: str) -> list[Partition]:
    """Of ``scontrol -o show partition``."""
    found = []
    for fields in map(pairs, text.splitlines()):
        if "PartitionName" not in fields:
            continue
        most, grace = fields.get("MaxNodes", ""), fields.get("GraceTime", "0")
        found.append(
            Partition(
                fields["PartitionName"],
                fields.get("Default") == "YES",
                fields.get("State") == "UP",
                seconds(fields.get("MaxTime", "")),
                seconds(fields.get("DefaultTime", "")),
                int(most) if most.isdigit() else None,
                int(grace) if grace.isdigit() else 0,
                fields.get("PreemptMode", ""),
                fields,
            )
        )
    return found


def nodes(timeout: float) -> list[Node]:
    """All nodes."""
    return parse_nodes(ask(timeout, "scontrol", "-o", "show", "node"))


def parse_nodes(text: str) -> list[Node]:
    """Of ``scontrol -o show node``."""
    found = []
    for fields in map(pairs, text.splitlines()):
        if "NodeName" not in fields:
            continue
        cpus = fields.get("CPUEfctv") or fields.get("CPUTot") or "0"  # without those kept for the system
        features = fields.get("ActiveFeatures", "(null)").removeprefix("(null)")
        found.append(
            Node(
                fields["NodeName"],
                [name for name in fields.get("Partitions", "").split(",") if name],
                int(cpus),
                int(fields.get("RealMemory", "0")) - int(fields.get("MemSpecLimit", "0")),
                parse_gpus(fields.get("Gres", "")),
                [name for name in features.split(",") if name],
                not DOWN.search(fields.get("State", "")),
            )
        )
    return found


def parse_gpus(gres: str) -> dict[str, int]:
    """GPUs by type of ``gpu:h100:8(S:0-1),nvme:1``."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,()]+(?=:)))?:(\d+)", gres):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def associations(timeout: float, user: str, cluster: str) -> list[Association]:
    """The user's accounts on this cluster, the default one first."""
    fields = "account,partition,qos,defaultqos,maxwall"
    where = [f"user={user}", f"cluster={cluster}"]
    rows = ask(timeout, "sacctmgr", "-nP", "show", "assoc", *where, f"format={fields}")
    default = ask(timeout, "sacctmgr", "-nP", "show", "user", user, "format=defaultaccount").strip()
    return parse_associations(rows, default)


def parse_associations(rows: str, default: str) -> list[Association]:
    """Of ``sacctmgr -nP``; ``default``: the name of the default account."""
    found = []
    for line in rows.splitlines():
        account, partition, qos, default_qos, wall = (line.split("|") + [""] * 5)[:5]
        names = [name for name in qos.split(",") if name]
        found.append(Association(account, partition, names, default_qos, seconds(wall)))
    return sorted(found, key=lambda each: each.account != default)


def qos(timeout: float) -> list[Qos]:
    """Every quality of service that the accounting knows."""
    return parse_qos(
        ask(timeout, "sacctmgr", "-nP", "show", "qos", "format=name,maxwall,gracetime,preemptmode,preempt")
    )


def parse_qos(rows: str) -> list[Qos]:
    """Of ``sacctmgr -nP``."""
    split = ((line.split("|") + [""] * 5)[:5] for line in rows.splitlines() if line)
    return [Qos(name, seconds(wall), seconds(grace) or 0, mode, over) for name, wall, grace, mode, over in split]


def pairs(line: str) -> dict[str, str]:
    """``A=1 B=two words`` as a dict."""
    marks = [*_PAIR.finditer(line)]
    ends = [*(mark.start() for mark in marks[1:]), len(line)]
    return {mark[1]: line[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)}


def seconds(text: str) -> int | None:
    """A time as SLURM prints it; None for none."""
    try:
        return time_limit_seconds(text.strip()) if text.strip() not in ("", "NONE", "n/a") else None
    except ValueError:  # 00:00:00: none either
        return None


def number(setting: str, absent: int) -> int:
    """The number at the start of ``30 sec``."""
    found = re.match(r"\d+", setting)
    return int(found[0]) if found else absent


def options(setting: str) -> dict[str, str]:
    """``a,b=2`` as a dict."""
    parts = (part.partition("=") for part in setting.split(",") if part)
    return {name.strip(): value.strip() for name, _, value in parts}
