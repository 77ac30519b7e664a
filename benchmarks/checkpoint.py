"""Checkpoints side by side with stock torch.distributed.checkpoint and with raw copies of the same bytes, in one run.

    .venv/bin/python benchmarks/checkpoint.py [--rounds 7] [--quick] [--only ROW ...] [--json FILE]

Needs `pip install -e .[train,s3,bench,dev]`; the S3 server is SeaweedFS on this machine. Two ranks (gloo, one thread)
hold a model sharded by FSDP and its AdamW state, 353 MB in 252 tensors. The contestants take turns; a ratio is the
median of those of each round, and after it come the least and the greatest. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import checkpoint_ours as ours
import checkpoint_peers as peers
import checkpoint_scale as scale
import torch
from checkpoint_memory import Peak, memory
from checkpoint_ranks import FEW_LAYERS, LAYERS, Team, enter
from checkpoint_store import BUCKET, disk_limit, link, s3_server
from rich.console import Console
from rich.table import Table

TRIP_S, RATE = 0.020, 5e6  # the throttled link: round trip, bytes per second of a connection
DISK_RATE = 40 << 20  # bytes per second of the limited disk
BIG = 400 << 20  # bytes of one tensor
HELPER = 128e6  # bytes that saving may take on top of the staging buffer
OURS, RAW, DCP, FAST = "ours", "raw copy", "DCP", "DCP, 4 threads, no sync"
WARM = "raw copy, into warm memory"  # what no load can beat: the memory was used before, and nothing is checked
Contestants = dict[str, Callable[[int], float]]


@dataclass
class Line:
    """One contestant in one row. ``ratio`` is to what the row is measured against."""

    row: str
    name: str
    value: float  # median; seconds unless the row says otherwise
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    bar: float | None = None
    unit: str = "s"
    note: str = ""

    @property
    def mark(self) -> str:
        """Is the bar kept?"""
        if self.bar is None or self.ratio is None:
            return ""
        return "[green]ok[/]" if self.ratio <= self.bar else "[red]over[/]"


@dataclass
class Bench:
    """Options and what has been found."""

    folder: Path
    rounds: int
    quick: bool
    console: Console
    lines: list[Line] = field(default_factory=list)
    _names: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def fresh(self, what: str) -> Path:
        """A folder that did not exist; those before it are emptied, and what they left is on the disk."""
        for old in self.folder.glob(f"{what}-*"):
            shutil.rmtree(old)
        new = self.folder / f"{what}-{next(self._names)}"
        new.mkdir()
        os.sync()
        return new

    def step(self) -> int:
        """A step that was never saved."""
        return next(self._names)

    def compare(
        self, row: str, contestants: Contestants, bar: float, size: int, rounds: int = 0, slow: str | None = None
    ) -> None:
        """Let them take turns; the first is what the others are measured against, and ``bar`` is for us.

        ``size`` is in bytes. ``slow`` has a turn in the first round alone.
        """
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        names = list(contestants)
        rounds = rounds or self.rounds
        for turn in range(rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if name == slow and turn != 1:
                    continue
                with self.console.status(f"{row}: round {turn} of {rounds}, {name}"):
                    seconds = contestants[name](turn)
                if turn:  # the first warms up whatever can be warm
                    taken[name].append(seconds)
        first = taken[names[0]]
        for name in names:
            ratios = [a / b for a, b in zip(taken[name], first, strict=False)]
            note = f"{size / statistics.median(taken[name]) / 1e6:.0f} MB/s"
            self.add(row, name, taken[name], ratios, bar if name == OURS else None, note=note)

    def add(
        self, row: str, name: str, values: list[float], ratios: list[float], bar: float | None, **more: str
    ) -> None:
        """Keep medians, and show them."""
        line = Line(row, name, statistics.median(values), bar=bar, **more)
        if ratios:
            line.ratio, line.low, line.high = statistics.median(ratios), min(ratios), max(ratios)
        self.lines.append(line)
        ratio = "" if line.ratio is None else f"{line.ratio:.2f} ({line.low:.2f} to {line.high:.2f})"
        self.console.print(f"{row}: {name}: {line.value:.4g} {line.unit} {ratio} {line.note}")


# --- object store ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def store(
    bench: Bench, trip_s: float = 0.0, rate: float = 0.0
) -> Iterator[tuple[dict[str, str], object, dict[str, str]]]:
    """(environment of the server, the link before it, environment through the link)."""
    with s3_server(bench.fresh("s3") / "data") as direct, link(direct, trip_s, rate) as (wire, slow):
        yield direct, wire, slow


def save_s3(bench: Bench) -> None:
    """Save to S3."""
    with store(bench) as (direct, _, _), Team(2, LAYERS, environment=direct) as team:
        _save_s3(bench, "save to S3", team, bench.rounds)


def save_slow(bench: Bench) -> None:
    """Save to S3 through a throttled link."""
    with store(bench, TRIP_S, RATE) as (_, _, slow), Team(2, FEW_LAYERS, environment=slow) as team:
        _save_s3(bench, "save to S3, throttled", team, max(bench.rounds // 2, 1))


def _save_s3(bench: Bench, row: str, team: Team, rounds: int) -> None:
    root = f"s3://{BUCKET}/save"
    team.call(ours.open_run, f"{root}/ours")
    contestants: Contestants = {
        RAW: lambda turn: team.slowest(peers.raw_upload, f"save/raw-{turn}"),
        OURS: lambda turn: max(each[0] for each in team.call(ours.save, bench.step())),
        DCP: lambda turn: team.slowest(peers.dcp_save, f"{root}/dcp-{turn}"),
        FAST: lambda turn: team.slowest(peers.dcp_save, f"{root}/fast-{turn}", thread_count=4, sync_files=False),
    }
    bench.compare(row, contestants, 1.15, team.bytes, rounds)


def load_s3(bench: Bench) -> None:
    """Load from S3, at the same and at other numbers of ranks."""
    with store(bench) as (direct, wire, slow):
        _load_s3(bench, "load from S3", LAYERS, direct, wire, slow, bench.rounds)


def load_slow(bench: Bench) -> None:
    """Load from S3 through a throttled link."""
    with store(bench, TRIP_S, RATE) as (_, wire, slow):
        _load_s3(bench, "load from S3, throttled", FEW_LAYERS, slow, wire, slow, 1 if bench.quick else 2)


def _load_s3(bench: Bench, row: str, layers: int, direct: dict, wire: object, counted: dict, rounds: int) -> None:
    root = f"s3://{BUCKET}/load"
    with Team(2, layers, environment=direct) as team:
        team.call(ours.open_run, f"{root}/ours")
        commit = team.call(ours.save, 1)[0][1]
        team.call(peers.dcp_save, f"{root}/dcp")
        team.call(peers.raw_upload, "load/raw")
    slow = DCP if direct is counted else None  # minutes
    for ranks in (2,) if slow else (2, 1, 3):
        with Team(ranks, layers, environment=direct) as team:
            team.call(ours.open_run, f"{root}/ours")
            contestants: Contestants = {
                RAW: lambda _, team=team: team.slowest(peers.raw_download, "load/raw"),
                WARM: lambda _, team=team: team.slowest(peers.raw_download, "load/raw", warm=True),
                OURS: lambda _, team=team: team.slowest(ours.load, commit),
                DCP: lambda _, team=team: team.slowest(peers.dcp_load, f"{root}/dcp"),
            }
            bench.compare(f"{row}, {ranks} ranks", contestants, 1.3, team.bytes, rounds, slow)
            team.call(ours.reach, counted)
            team.call(ours.open_run, f"{root}/ours")
            for name, work in contestants.items():  # once more, to count
                if name == slow:
                    continue
                before = wire.down
                work(0)
                fetched = [float(wire.down - before)]
                bar = 1.05 if name == OURS else None
                ratio = [fetched[0] / team.bytes]
                bench.add(f"bytes fetched from S3, {ranks} ranks", name, fetched, ratio, bar, unit="bytes")


# --- disk ------------------------------------------------------------------------------------------------------------


def save_disk(bench: Bench) -> None:
    """Save to disk."""
    with Team(2) as team:
        contestants = _disk_savers(bench, team)
        contestants["DCP, fsspec"] = lambda _: team.slowest(peers.dcp_save, f"file://{bench.fresh('fsspec')}/x")
        bench.compare("save to disk", contestants, 1.1, team.bytes)


def _disk_savers(bench: Bench, team: Team) -> Contestants:
    def save(_: int) -> float:
        team.call(ours.open_run, str(bench.fresh("ours")))
        return max(each[0] for each in team.call(ours.save, 1))

    return {
        RAW: lambda _: team.slowest(peers.raw_save, str(bench.fresh("raw"))),
        OURS: save,
        DCP: lambda _: team.slowest(peers.dcp_save, str(bench.fresh("dcp"))),
    }


def load_disk(bench: Bench) -> None:
    """Load from disk, everything in the page cache."""
    raw, mine, dcp = bench.fresh("raw"), bench.fresh("ours"), bench.fresh("dcp")
    with Team(2) as team:
        team.call(ours.open_run, str(mine))
        commit = team.call(ours.save, 1)[0][1]
        team.call(peers.raw_save, str(raw))
        team.call(peers.dcp_save, str(dcp))
    for ranks in (1, 2, 3):
        with Team(ranks) as team:
            team.call(ours.open_run, str(mine))
            bench.compare(
                f"load from disk, {ranks} ranks", _disk_loaders(team, raw, mine, commit, dcp), 1.5, team.bytes
            )


def _disk_loaders(team: Team, raw: Path, mine: Path, commit: object, dcp: Path) -> Contestants:
    def warm(folder: Path) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    while stream.read(8 << 20):
                        pass

    def timed(folder: Path, *work: object) -> Callable[[int], float]:
        def run(_: int) -> float:
            warm(folder)
            return team.slowest(*work)

        return run

    return {
        RAW: timed(raw, peers.raw_load, str(raw)),
        WARM: timed(raw, peers.raw_load, str(raw), True),
        OURS: timed(mine, ours.load, commit),
        DCP: timed(dcp, peers.dcp_load, str(dcp)),
    }


def growth(bench: Bench) -> None:
    """Save to disk and load from there by 1 to 8 ranks, the same state spread over them."""
    for ranks in (1, 2, 4, 8):
        with Team(ranks) as team:
            bench.compare(f"growth: save to disk, {ranks} ranks", _disk_savers(bench, team), 1.1, team.bytes)
            raw, mine, dcp = bench.fresh("raw"), bench.fresh("ours"), bench.fresh("dcp")
            team.call(ours.open_run, str(mine))
            commit = team.call(ours.save, 1)[0][1]
            team.call(peers.raw_save, str(raw))
            team.call(peers.dcp_save, str(dcp))
            loaders = _disk_loaders(team, raw, mine, commit, dcp)
            bench.compare(f"growth: load from disk, {ranks} ranks", loaders, 1.5, team.bytes)


# --- what training notices -------------------------------------------------------------------------------------------


def blocked(bench: Bench) -> None:
    """Training blocked by an asynchronous save to disk."""
    with Team(2) as team:
        team.call(ours.open_run, str(bench.fresh("ours")))
        contestants: Contestants = {
            "warm memcpy": lambda _: team.slowest(peers.memcpy),
            OURS: lambda _: team.slowest(ours.blocked, bench.step()),
            "DCP async_save": lambda _: team.slowest(peers.dcp_blocked, str(bench.fresh("dcp"))),
            "DCP async_save, reused staging": lambda _: team.slowest(
                peers.dcp_blocked, str(bench.fresh("dcp")), reuse=True
            ),
        }
        bench.compare("training blocked", contestants, 1.5, team.bytes)


def memory_peak(bench: Bench) -> None:
    """Peak extra memory of a rank that saves to S3, with its helper processes."""
    for title, options in (("", {}), (", one tensor of 400 MiB", {"big": BIG})):
        with store(bench) as (direct, _, _):
            for name in (OURS, DCP, FAST):
                with Team(2, environment=direct, **options) as team:
                    # What any save brings with it, such as the SDK, is there before.
                    team.call(peers.dcp_small, f"s3://{BUCKET}/small-{name[:4]}")
                    _memory(bench, f"memory of a save to S3{title}", name, team)


def _memory(bench: Bench, row: str, name: str, team: Team) -> None:
    pids = [process.pid for process in team.processes]
    before = [memory(pid) for pid in pids]
    staged = [0] * team.size
    with Peak(pids) as peak:
        if name == OURS:
            team.call(ours.open_run, f"s3://{BUCKET}/memory")
            for _ in range(2):
                team.call(ours.save, bench.step())
            staged = team.call(ours.staging)
        else:
            options = {"thread_count": 4, "sync_files": False} if name == FAST else {}
            team.call(peers.dcp_save, f"s3://{BUCKET}/{len(name)}-{bench.step()}", **options)
    extra = [after - start for after, start in zip(peak.peaks, before, strict=True)]
    allowed = [size + HELPER for size in staged]
    worst = max(range(team.size), key=lambda rank: extra[rank] / allowed[rank])
    note = f"staging {staged[worst] / 1e6:.0f} MB" if name == OURS else ""
    bar = 1.0 if name == OURS else None
    bench.add(row, name, [extra[worst] / 1e6], [extra[worst] / allowed[worst]], bar, unit="MB", note=note)


def steps(bench: Bench) -> None:
    """Steps while a save drains to a rate-limited disk, or where there is no such thing, through the throttled link."""
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(disk_limit(bench.folder, DISK_RATE))
        if group is not None:
            row, environment = f"steps while a save drains to a disk of {DISK_RATE >> 20} MiB/s", {}
        else:
            row, (_, _, environment) = (
                "steps while a save drains through the link",
                stack.enter_context(store(bench, TRIP_S, RATE)),
            )
        team = stack.enter_context(Team(2, LAYERS if group else FEW_LAYERS, environment=environment))
        if group is not None:
            team.call(enter, str(group))

        def place(what: str) -> str:
            return str(bench.fresh(what)) if group else f"s3://{BUCKET}/{what}-{bench.step()}"

        def run(start: Callable, *arguments: object) -> list[float]:
            found = team.call(ours.steps, start, *arguments)
            return [max(each) for each in zip(*found, strict=True)]

        def mine() -> list[float]:
            team.call(ours.open_run, place("ours"))
            return run(ours.begin, 1)

        contestants = {
            OURS: mine,
            "DCP async_save": lambda: run(peers.dcp_begin, place("dcp")),
            "DCP async_save, reused staging": lambda: run(peers.dcp_begin, place("dcp"), "THREAD", True),
            "DCP async_save in a process": lambda: run(peers.dcp_begin, place("dcp"), "PROCESS"),
        }
        found: dict[str, list[list[float]]] = {name: [] for name in contestants}
        for turn in range(max(bench.rounds // 2, 1) + 1):
            for name, work in contestants.items():
                with bench.console.status(f"{row}: round {turn}, {name}"):
                    taken = work()
                if turn:
                    found[name].append(taken)
        alone = [each[0] for taken in found.values() for each in taken]
        bench.add(row, "without a save", alone, [], None)
        for name, taken in found.items():
            ratios = [busy / rest for rest, busy, _ in taken]
            note = f"drained in {statistics.median(each[2] for each in taken):.1f} s"
            bench.add(row, name, [each[1] for each in taken], ratios, 1.3 if name == OURS else None, note=note)


def manifest(bench: Bench) -> None:
    """Manifests of many tensors and ranks, simulated."""
    tensors, ranks = (10_000, 128) if bench.quick else (100_000, 1024)
    for name, seconds in scale.measure(tensors, ranks, bench.fresh("manifest")).items():
        unit = "bytes" if "bytes" in name else "s"
        bench.add(f"manifest of {tensors:,} tensors x {ranks:,} ranks", name, [seconds], [], None, unit=unit)


ROWS = {
    "save-s3": save_s3,
    "save-slow": save_slow,
    "load-s3": load_s3,
    "load-slow": load_slow,
    "save-disk": save_disk,
    "load-disk": load_disk,
    "blocked": blocked,
    "memory": memory_peak,
    "steps": steps,
    "growth": growth,
    "manifest": manifest,
}


def machine() -> str:
    """Where this runs."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return (
        f"{len(os.sched_getaffinity(0))} cores ({names[0] if names else platform.machine()}), {total:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}; load {load:.1f}"
    )


def show(bench: Bench) -> None:
    """The table."""
    table = Table("", "median", "ratio", "least to greatest", "bar", "", "", title="medians of interleaved rounds")
    for row, lines in itertools.groupby(bench.lines, lambda line: line.row):
        table.add_section()
        table.add_row(f"[bold]{row}[/]")
        for line in lines:
            table.add_row(
                f"  {line.name}",
                f"{line.value / 1e6:,.1f} MB" if line.unit == "bytes" else f"{line.value:.3f} {line.unit}",
                "" if line.ratio is None else f"{line.ratio:.2f}",
                "" if line.low is None or line.low == line.high else f"{line.low:.2f} to {line.high:.2f}",
                "" if line.bar is None else f"≤ {line.bar}",
                line.mark,
                line.note,
            )
    bench.console.print(table)


def main() -> int:
    """Measure and print. The exit code says nothing about the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two rounds of everything")
    parser.add_argument("--only", choices=ROWS, action="append", help="a row; may be given several times")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    command = " ".join(["benchmarks/checkpoint.py", *sys.argv[1:]])
    console.print(f"{command}\n{machine()}\n")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmops-bench-", dir=options.folder) as name:
        bench = Bench(Path(name), 2 if options.quick else options.rounds, options.quick, console)
        for row in options.only or ROWS:
            ROWS[row](bench)
    show(bench)
    console.print(f"{time.monotonic() - began:.0f} s")
    if options.json:
        found = {"command": command, "machine": machine(), "lines": [asdict(line) for line in bench.lines]}
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
