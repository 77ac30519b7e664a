"""Logs of real runs, of a real object store, and of a thousand ranks in bounded memory."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmops.agent.output import STAMP, stamp
from llmops.monitor import logs
from llmops.monitor.log_streams import Selection
from llmops.runs.store import Store, open_store
from tests.launcher.harness import LLMOPS, TREE, Launcher

T0 = 1_770_000_000.0
RANKS = 1000
LINES, PER_RANK = 500, 200_000  # lines and bytes
MEMORY = 150 << 20
PAD = b"x" * 365
CAUSE = """Traceback (most recent call last):
  File "train.py", line 7, in <module>
    step()
ValueError: bad sample 17
"""
EFFECT = CAUSE.replace(
    "ValueError: bad sample 17", "torch.distributed.DistBackendError: NCCL error, remote process exited"
)
# Started by the test below; tells the peak of its child's memory, and when that wrote first.
MEASURE = """
import json, resource, subprocess, sys, time
began = time.monotonic()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
first = child.stdout.readline()
after = time.monotonic() - began
lines, ordered, before = 1, True, b""
for line in child.stdout:
    lines += 1
    now = line.rsplit(b" ", 1)[-1]
    ordered, before = ordered and before <= now, now
code = child.wait()
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([code, first.decode(), after, time.monotonic() - began, lines, ordered, peak]))
"""


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A failed run of a thousand ranks on 125 nodes, 200 kB each."""
    folder: Path = tmp_path_factory.mktemp("thousand") / "runs" / "20260202-024000-big-aaaa"
    record = {"id": folder.name, "name": "big", "owner": "ada", "host": "h", "created": T0, "backend": "slurm"}
    record |= {"kind": "llm", "command": [], "nodes": 125, "ranks_per_node": 8, "format": 1}
    start = {"number": 0, "submission": 0, "job_id": "1", "hosts": ["n0"], "time": T0}
    end: dict[str, Any] = {"time": T0 + 9000, "reason": "failed", "next": "end", "failed_rank": 3, "failed_host": "n0"}
    end["exit_codes"] = {str(rank): 1 for rank in range(RANKS)}
    for name, value in {"run": record, "attempts/0000/start": start, "attempts/0000/end": end}.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    count = LINES
    shared = [stamp(T0 + number)[:-1] for number in range(count)]
    for rank in range(RANKS):
        path = folder / f"logs/0000/n{rank // 8}/rank{rank}.000000.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        # The last word tells the order to who reads it.
        lines = [b"%s %s %07d\n" % (begin, PAD, number) for number, begin in enumerate(shared)]
        mine, late = (CAUSE, 0.5) if rank == 417 else (EFFECT, 1.0)
        begin = stamp(T0 + count + late)
        lines += [begin + line.encode() + b"\n" for line in mine.splitlines()]
        path.write_bytes(b"".join(lines))
    return folder.parent


def measured(root: Path, *arguments: str) -> tuple[int, str, float, float, int, bool, int]:
    env = {**os.environ, "LLMOPS_RUNS_URL": str(root), "PYTHONPATH": str(TREE)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *LLMOPS, "logs", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    code, first, after, took, lines, ordered, peak = json.loads(done.stdout)
    return code, first, after, took, lines, ordered, peak


def test_a_thousand_ranks_are_merged_in_bounded_memory(thousand: Path) -> None:
    code, first, after, took, lines, ordered, peak = measured(
        thousand, "--grep", r"\d{7}$", "--since", "2026-02-02T02:45Z"
    )
    assert code == 0
    assert lines == RANKS * (LINES - 300)
    assert ordered
    assert re.fullmatch(r"\[0/0\] x+ 0000300\n", first)
    assert peak < MEMORY, f"{peak >> 20} MiB"
    assert after < took / 2, "it begins before it has read all"


def test_the_first_lines_come_before_the_files_are_read(thousand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(thousand)).sub("20260202-024000-big-aaaa")
    from llmops.runs.records import load_run

    run, read = load_run(store), 0
    original = type(store).read

    def counting(self: Store, path: str, start: int, end: int | None = None) -> bytes:
        nonlocal read
        data = original(self, path, start, end)
        read += len(data)
        return data

    monkeypatch.setattr(type(store), "read", counting)
    lines = logs.tail(run)
    assert [next(lines).source for _ in range(3)] == ["0", "1", "2"]
    assert read < RANKS * PER_RANK / 10
    read = 0
    assert len(list(logs.tail(run, n=1))) == RANKS
    assert read < RANKS * 80_000


def test_the_first_of_a_thousand_to_fail(thousand: Path) -> None:
    code, first, _, _, lines, _, peak = measured(thousand, "--errors")
    assert (code, lines) == (1, 7)
    assert first.startswith("attempt 0, rank 417 on n52, 2026-02-02 ")
    assert peak < MEMORY, f"{peak >> 20} MiB"


def test_a_full_disk_of_descriptors_is_not_needed(thousand: Path) -> None:
    """Files are opened one after the other, however many there are."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = subprocess.run(
        [*LLMOPS, "logs", "--tail", "1"],
        env={**os.environ, "LLMOPS_RUNS_URL": str(thousand), "PYTHONPATH": str(TREE)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1])),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == RANKS


# Real runs


@pytest.fixture
def local(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path / "runs", "local")


TURNS = """
import os, pathlib, sys, time
rank, here = int(os.environ["RANK"]), pathlib.Path(os.environ["LLMOPS_CONTROL_DIR"])
attempt = os.environ["LLMOPS_ATTEMPT"]
deadline = time.monotonic() + 30
for turn in range(6):
    if turn % 2 == rank:
        print(f"attempt {attempt} turn {turn}", flush=True)
        time.sleep(0.05)  # what is stored within the same millisecond has no order
        (here / f"turn{turn}").touch()
    else:
        while not (here / f"turn{turn}").exists():
            assert time.monotonic() < deadline, "the other rank did not take its turn"
            time.sleep(0.001)
if attempt == "0" and rank == 1:
    raise ValueError("bad sample 17")
if attempt == "0":
    time.sleep(30)
"""


def test_ranks_of_a_real_run_are_merged_and_its_error_is_found(local: Launcher) -> None:
    options = ("code.enabled=false", "retry.backoff_s=0.1", "retry.max_no_progress=2", "cluster.ranks_per_node=2")
    run_id = local.submit(*options, command=(sys.executable, "-c", TURNS))
    local.wait(run_id, "finished")
    lines = [line for line in local.ok("logs", run_id).splitlines() if "turn " in line]
    assert lines == [f"[{attempt}/{turn % 2}] attempt {attempt} turn {turn}" for attempt in (0, 1) for turn in range(6)]
    raw = next(Path(local.root).glob(f"{run_id}/logs/0000/*/rank1.*.log")).read_bytes().splitlines()
    assert raw
    assert all(STAMP.match(line) for line in raw)
    error = json.loads((local.root / run_id / "attempts/0000/end.json").read_text())["error"]
    assert error.endswith("ValueError: bad sample 17")
    assert not re.search(r"\d{4}-\d\d-\d\dT", error), "the last lines stay as they were written"
    told = local.call("logs", run_id, "--errors")
    assert told.returncode == 1
    assert re.match(r"attempt 0, rank 1 on \S+, \d{4}-\d\d-\d\d \S+, exit code 1\n  Traceback", told.stdout)
    assert "\n  ValueError: bad sample 17\n" in told.stdout
    followed = local.ok("logs", "-f", run_id, "--grep", "turn [05]", "--since", "1h", "--rank", "0,1").splitlines()
    assert followed == [line for line in lines if line[-1] in "05"]


# An object store


def fill(url: str, make_run: Any) -> Any:
    make_run.runs_url = url
    made = make_run(nodes=5, ranks_per_node=8)
    made.submission()
    made.start(0)
    for rank in range(40):
        begin = [stamp(T0 + number / 10 + rank / 1000).decode() for number in range(60)]
        for part in range(2):
            numbers = range(part * 30, part * 30 + 30)
            text = "".join(f"{begin[number]}line {number}\n" for number in numbers)
            if part:
                text += "".join(f"{begin[59]}{line}\n" for line in (CAUSE if rank == 17 else EFFECT).splitlines())
            made.log(0, rank, text, node=f"n{rank // 8}", part=part)
    made.end(0, "failed", exit_codes={str(rank): 1 for rank in range(40)}, failed_rank=2, failed_host="n0")
    return made


def test_an_object_store(s3_url: str, make_run: Any) -> None:
    made = fill(s3_url, make_run)
    run = made.load()
    found = [(line.text, line.source) for line in logs.tail(run) if line.text.startswith("line")]
    assert found == [(f"line {number}", str(rank)) for number in range(60) for rank in range(40)]
    assert [line.text for line in logs.tail(run, rank=3, n=2)] == EFFECT.splitlines()[-2:]
    since = logs.tail(run, wanted=Selection(ranks=range(2), since=T0 + 5.9, pattern=re.compile("^line")))
    assert [line.text for line in since] == ["line 59", "line 59"]
    command = [*LLMOPS, "logs", "--runs-url", s3_url, run.id, "--errors"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=TREE, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("attempt 0, rank 17 on n2, ")
    assert "39 ranks: torch.distributed.DistBackendError" in done.stdout


def test_an_object_store_is_followed(s3_url: str, make_run: Any) -> None:
    make_run.runs_url = s3_url
    made = make_run()
    made.start(0)
    made.log(0, 0, f"{stamp(T0).decode()}a\n")
    script: list[Callable[[], None]] = [
        lambda: made.log(0, 1, f"{stamp(T0 + 1).decode()}b\n", node="n2"),
        lambda: made.log(0, 0, f"{stamp(T0 + 2).decode()}c\n", part=1),
    ]
    lines = logs.follow(made.load(), lambda: not script, poll_s=0.0, wait=lambda seconds: script.pop(0)())
    assert [f"{line.source} {line.text}" for line in lines] == ["0 a", "1 b", "0 c"]
