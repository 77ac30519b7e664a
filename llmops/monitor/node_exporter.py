"""``python -m llmops.monitor.node_exporter``: serves the metrics of one node of a run, while its supervisor lives.

The supervisor starts it, writes one line of JSON to its standard input, and closes that to end it:

    {"run_url", "attempt", "node", "name", "control", "bind", "address", "port", "ranks": {rank: process id}}

It tells the run store where it listens, and where rank 0 does, for discovery.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from llm.utils.metrics_server import TEXT, Server, join_bind
from llmops.errors import ClusterError, UserError
from llmops.monitor.targets import Endpoints, write_endpoints
from llmops.runs.model import AttemptEnd
from llmops.runs.store import Store, open_store

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

LOOK_S = 1.0  # for rank 0's port, until it is known
RETRY_S = 20.0  # of a store that does not answer
GPU_EVERY_S = 15.0
GPU_S = 10.0  # for one answer
CANNOT = 2  # exit code: another start would change nothing
GPU_QUERY = [
    "nvidia-smi",
    "--query-gpu=index,memory.used,memory.total,utilization.gpu",
    "--format=csv,noheader,nounits",
]
_TICKS, _PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor says of the node. ``bind`` is the address to listen on, ``address`` the one to tell."""

    run_url: str
    attempt: int
    node: int
    name: str
    control: str
    bind: str
    address: str
    port: int
    ranks: dict[str, int]


class Node:
    """What is known of the node; collected anew for each scrape."""

    def __init__(self, about: About) -> None:
        self.about = about
        self.control = Path(about.control)
        self.ended: dict[str, int] = {}  # attempts before this one, by the reason of their end
        self.gpus: list[tuple[str, float, float, float]] = []  # index, bytes used, bytes in all, share of time busy

    def collect(self) -> Iterator[Metric]:
        """All families."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        ranks = {rank: (self._beat(rank), _process(pid)) for rank, pid in self.about.ranks.items()}
        now = time.time()

        def by_rank(name: str, text: str, values: dict[str, float | None], counts: bool = False) -> Metric:
            kind = CounterMetricFamily if counts else GaugeMetricFamily
            family = kind(f"llmops_node_{name}", text, labels=["rank"])
            for rank, value in values.items():
                if value is not None:
                    family.add_metric([rank], value)
            return family

        yield by_rank(
            "rank_step", "Last step of the rank's heartbeat.", {rank: b.step for rank, (b, _) in ranks.items()}
        )
        ages = {rank: None if b.time is None else max(now - b.time, 0.0) for rank, (b, _) in ranks.items()}
        yield by_rank("rank_heartbeat_age_seconds", "Seconds since the rank's last heartbeat.", ages)
        yield by_rank(
            "rank_up", "Whether the rank's process runs.", {rank: float(p.up) for rank, (_, p) in ranks.items()}
        )
        memory = {rank: p.memory for rank, (_, p) in ranks.items()}
        yield by_rank("rank_memory_bytes", "Resident memory of the rank's own process.", memory)
        cpu = {rank: p.cpu_s for rank, (_, p) in ranks.items()}
        yield by_rank(
            "rank_cpu_seconds", "Processor time of the rank and of its children that ended.", cpu, counts=True
        )
        stop = float((self.control / "stop").exists())
        yield GaugeMetricFamily(
            "llmops_node_stop_requested", "Whether the ranks were told to save and leave.", value=stop
        )
        yield GaugeMetricFamily("llmops_node_attempt", "Number of this attempt at the run.", value=self.about.attempt)
        restarts = CounterMetricFamily(
            "llmops_node_restarts",
            "Attempts at the run before this one, by the reason of their end.",
            labels=["reason"],
        )
        for reason, count in self.ended.items():
            restarts.add_metric([reason], count)
        yield restarts
        if self.gpus:
            yield from self._gpu_families()

    def _gpu_families(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        texts = (
            ("memory_used_bytes", "Memory of the GPU in use, by whatever process."),
            ("memory_total_bytes", "Memory that the GPU has."),
            ("utilization_ratio", "Share of the time in which the GPU did something."),
        )
        for position, (name, text) in enumerate(texts, 1):
            family = GaugeMetricFamily(f"llmops_node_gpu_{name}", text, labels=["gpu"])
            for gpu in self.gpus:
                family.add_metric([gpu[0]], float(gpu[position]))
            yield family

    def train_port(self) -> int | None:
        """Where rank 0 serves its metrics, once it has said so, if it is on this node."""
        if "0" not in self.about.ranks:
            return None
        port = _json(self.control / "metrics.0").get("port")
        return port if type(port) is int and 0 < port <= 65535 else None

    def _beat(self, rank: str) -> _Beat:
        path = self.control / f"heartbeat.{rank}"
        step = _json(path).get("step")
        try:
            written = path.stat().st_mtime
        except OSError:
            return _Beat(None, None)
        return _Beat(float(step) if type(step) is int else None, written)


class _Beat(msgspec.Struct, frozen=True):
    step: float | None
    time: float | None


class _Process(msgspec.Struct, frozen=True):
    up: bool
    memory: float | None = None
    cpu_s: float | None = None


def _process(pid: int) -> _Process:
    """What /proc says. A number that was used again would be of another session: the ranks lead their own."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return _Process(up=False)
    state, session = fields[0], int(fields[3])
    if state == "Z" or session != pid:
        return _Process(up=False)
    return _Process(True, float(fields[21]) * _PAGE, sum(int(field) for field in fields[11:15]) / _TICKS)


def _json(path: Path) -> dict[str, Any]:
    """What a rank has written; nothing where it has not, or is just writing."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def ends(run: Store, attempt: int) -> dict[str, int]:
    """How the attempts before ``attempt`` have ended, by reason."""
    found: Counter[str] = Counter()
    for name in run.list("attempts"):
        if name.isdigit() and int(name) < attempt:
            try:
                found[msgspec.json.decode(run.get(f"attempts/{name}/end.json"), type=AttemptEnd).reason] += 1
            except (FileNotFoundError, msgspec.MsgspecError):
                found["lost"] += 1  # its supervisor died with it
    return dict(found)


def watch_gpus(node: Node) -> None:
    """Ask for the GPUs' state now and then. Ends where there is nobody to ask, or no answer."""
    while True:
        try:
            done = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=GPU_S, check=True)
        except (OSError, subprocess.SubprocessError):
            node.gpus = []
            return
        node.gpus = parse_gpus(done.stdout)
        time.sleep(GPU_EVERY_S)


def parse_gpus(text: str) -> list[tuple[str, float, float, float]]:
    """Lines of nvidia-smi; what a device does not tell (``[N/A]``) is not a number, and its line is left out."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        try:
            used, total, busy = (float(field) for field in fields[1:4])
        except ValueError:
            continue
        found.append((fields[0], used * 2**20, total * 2**20, busy / 100))
    return found


def publish(node: Node, port: int) -> None:
    """Tell the store where this node listens, and again once its rank 0 does. A store that is away is asked later."""
    about = node.about
    store: Store | None = None
    told: Endpoints | None = None
    while told is None or (told.train is None and "0" in about.ranks):
        train = node.train_port()
        wanted = Endpoints(
            node=about.name,
            address=join_bind(about.address, port),
            train=None if train is None else join_bind(about.address, train),
            time=time.time(),
        )
        pause = LOOK_S
        if told is None or told.train != wanted.train:
            try:
                if store is None:
                    store = open_store(about.run_url)
                    node.ended = ends(store, about.attempt)
                write_endpoints(store, about.attempt, about.node, wanted)
                told = wanted
            except (ClusterError, UserError, OSError) as error:
                print(f"llmops: where metrics are served could not be stored: {error}", file=sys.stderr, flush=True)
                pause = RETRY_S
        time.sleep(pause)


def main() -> int:
    """Serve until the end of standard input."""
    from prometheus_client import CollectorRegistry, generate_latest

    try:
        about = msgspec.json.decode(sys.stdin.buffer.readline(), type=About)
    except msgspec.MsgspecError as error:
        print(f"llmops: the node's exporter is started by its supervisor, not by hand: {error}", file=sys.stderr)
        return CANNOT
    node = Node(about)
    registry = CollectorRegistry()
    registry.register(node)
    try:
        server = Server(about.bind, about.port, {"/metrics": (TEXT, lambda: generate_latest(registry))})
    except OSError as error:
        where = join_bind(about.bind, about.port)
        print(f"llmops: no metrics are served at {where}: {error}", file=sys.stderr, flush=True)
        return CANNOT
    threading.Thread(target=watch_gpus, args=(node,), daemon=True).start()
    threading.Thread(target=publish, args=(node, server.server_port), daemon=True).start()
    while os.read(0, 4096):  # returns nothing once the supervisor is gone, or done
        pass
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a store or a GPU hold nobody up
