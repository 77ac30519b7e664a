"""What a SLURM cluster can never run, told before it is queued.

Sbatch accepts most of it and leaves it pending for ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmops.config.schema import SlurmCluster, time_limit_seconds
from llmops.errors import UserError
from llmops.suggest import hint

# File systems that many machines mount. Anything else is taken for one machine's own disk.
SHARED = re.compile(
    r"^(nfs\d?|lustre|gpfs|beegfs|beegfs_nodev|ceph|cifs|smb3|9p|virtiofs|afs|pvfs2|orangefs|wekafs|panfs|glusterfs|"
    r"fuse\.(?!overlayfs|snapfuse|gvfsd).*)$"
)


@dataclass
class Partition:
    """The widest that one partition allows. None: no limit of its own."""

    up: bool = False
    nodes: int = 0
    cpus: int = 0
    memory_mb: int = 0
    time_s: int | None = None
    max_nodes: int | None = None
    gpus: int = 0


def parse_sinfo(text: str) -> tuple[dict[str, Partition], str | None]:
    """Partitions by name, and the default one, from ``sinfo -h -a -e -o '%P|%a|%D|%c|%m|%l|%s|%G'``."""
    partitions: dict[str, Partition] = {}
    default = None
    for line in text.splitlines():
        name, up, nodes, cpus, memory, limit, size, gres = (field.strip() for field in line.split("|"))
        if name.endswith("*"):
            name = default = name[:-1]
        partition = partitions.setdefault(name, Partition())
        partition.up = up == "up"
        partition.nodes += int(nodes)
        partition.cpus = max(partition.cpus, int(cpus.rstrip("+")))
        partition.memory_mb = max(partition.memory_mb, int(memory.rstrip("+")))
        partition.time_s = None if limit in ("infinite", "n/a") else time_limit_seconds(limit)
        most = size.split("-")[-1]
        partition.max_nodes = int(most) if most.isdigit() else None
        counts = re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres)
        partition.gpus = max(partition.gpus, sum(map(int, counts)))
    return partitions, default


def check_limits(cluster: SlurmCluster, sinfo: str) -> str:
    """Raise :class:`UserError` for what the partition cannot run; return the partition's name."""
    partitions, default = parse_sinfo(sinfo)
    name = cluster.partition or default
    if name is None:
        raise UserError(
            f"this cluster has no default partition: set cluster.partition to one of {', '.join(partitions)}"
        )
    for part in name.split(","):
        if part not in partitions:
            near = hint(part, partitions) or f"; this cluster has: {', '.join(sorted(partitions))}"
            raise UserError(f"cluster.partition={part}: there is no such partition{near}")
    problems = [_problem(cluster, part, partitions[part]) for part in name.split(",")]
    if all(problems):
        raise UserError(str(problems[0]))
    return name


def _problem(cluster: SlurmCluster, name: str, partition: Partition) -> str | None:
    if not partition.up:
        return f"cluster.partition={name} is not up: choose another, or wait"
    most = min(partition.nodes, partition.max_nodes or partition.nodes)
    if cluster.nodes > most:
        return f"cluster.nodes={cluster.nodes}: partition {name} gives a job at most {most} nodes"
    cpus = (cluster.cpus_per_rank or 1) * cluster.ranks_per_node
    if cpus > partition.cpus:
        return (
            f"cluster.cpus_per_rank={cluster.cpus_per_rank or 1} x cluster.ranks_per_node={cluster.ranks_per_node} "
            f"= {cpus}: a node of partition {name} has {partition.cpus} CPUs"
        )
    wanted = time_limit_seconds(cluster.time)
    if wanted is not None and partition.time_s is not None and wanted > partition.time_s:
        return (
            f"cluster.time={cluster.time} is more than partition {name} allows ({partition.time_s // 60} minutes): "
            "lower it; the run goes on in further attempts by itself"
        )
    memory = _megabytes(cluster.mem)
    if memory is not None and memory > partition.memory_mb:
        return f"cluster.mem={cluster.mem}: a node of partition {name} has {partition.memory_mb} MB"
    if (cluster.gpus_per_node or 0) > partition.gpus:
        return f"cluster.gpus_per_node={cluster.gpus_per_node}: a node of partition {name} has {partition.gpus} GPUs"
    return None


def _megabytes(text: str | None) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text or "", re.IGNORECASE)
    if not match:
        return None
    return float(match[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[match[2].upper()]


def check_reachable(run_dir: str, kind: str, machine: str, partition: str, hosts: Callable[[], str]) -> None:
    """Refuse a run directory on a machine's own disk, unless every node of the partition is that machine.

    ``kind``: the file system that it is on, there.
    """
    if SHARED.match(kind):
        return
    names = {line.strip() for line in hosts().splitlines() if line.strip()}
    if names and names <= {machine, machine.split(".")[0]}:
        return
    raise UserError(
        f"runs_url={Path(run_dir).parent} is on a {kind} file system of {machine}, which the nodes of partition "
        f"{partition} cannot reach: set runs_url or LLMOPS_RUNS_URL to a folder on a shared file system"
    )


def file_system(path: Path) -> str:
    """The type of the file system that ``path``, or the nearest folder above it that exists, is on."""
    nearest = path.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return kind_of(nearest.resolve(), Path("/proc/self/mounts").read_text(encoding="utf-8"))


def kind_of(nearest: Path, mounts: str) -> str:
    """The type of the file system that an existing path is on, where ``mounts`` are those of its machine."""
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        _, mount, type_, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        inside = nearest == Path(mount) or mount == "/" or str(nearest).startswith(mount + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, type_
    return kind
