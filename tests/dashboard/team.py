"""Run directories of a team, as the launcher, the supervisor and the trainer would leave them."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from llmops.agent.local import start_ticks
from llmops.runs.records import SubmissionRecord, register_job, write_submission
from llmops.runs.store import open_store
from llmops.sweep.model import Result
from llmops.sweep.records import create_study, write_result
from tests.conftest import MadeRun, RunMaker
from tests.sweep.studies import rows, study


class Alive:
    """A process that does nothing: the supervisor that the local backend finds when it looks for a run's job."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        self.job_id = f"{socket.gethostname()}:{self.process.pid}:{start_ticks(self.process.pid)}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def submit(
    run: MadeRun, number: int, job_id: str | None, created: float, backend: str, config: str | None = None
) -> None:
    """One submission, at a time."""
    path = f"job/{number:04d}/config.yaml" if config else "config.yaml"
    if config:
        run.store.put(path, config.encode())
    record = SubmissionRecord(number=number, tag=f"tag-{number}", backend=backend, created=created, config=path)
    write_submission(run.store, record)
    if job_id:
        register_job(run.store, number, job_id, "launcher")


def lines(run: MadeRun, attempt: int, records: Iterable[dict[str, Any]]) -> None:
    """Adds to the attempt's metrics, as the trainer does."""
    path = Path(run.store.url, f"metrics/{attempt:04d}/000000.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write("".join(json.dumps(record) + "\n" for record in records))


def started(at: float) -> list[dict[str, Any]]:
    """The phases of start-up, for 40 seconds."""
    names = {"started": 0, "imported": 9, "distributed": 14, "loaded": 38, "first_step": 40}
    return [{"kind": "phase", "phase": name, "time": at + delay} for name, delay in names.items()]


def steps(
    first: int, last: int, at: float, step_s: float = 2.0, seed: int = 0, floor: float = 2.1, saves: int = 50
) -> list[dict[str, Any]]:
    """Steps ``first`` to ``last``, the first of which begins at ``at``, evaluated and saved now and then."""
    draw = random.Random(seed * 7919 + first)
    found: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        time = at + (step - first + 1) * step_s
        speed = 412_000 * (1 + 0.03 * draw.gauss(0, 1)) * (0.7 if draw.random() < 0.01 else 1)
        found.append(
            {
                "kind": "step",
                "step": step,
                "loss": floor + 8.5 * math.exp(-step / 90) + 1.1 * math.exp(-step / 700) + draw.gauss(0, 0.035),
                "lr": 3e-4,
                "grad_norm": 0.4 + 3 * math.exp(-step / 60) + abs(draw.gauss(0, 0.08)),
                "tokens": step * 824_000,
                "tokens_per_s": speed,
                "step_s": step_s,
                "data_s": 0.01,
                "mfu": speed / 412_000 * 0.431,
                "gpu_bytes": 71 << 30,
                "time": time,
            }
        )
        if step % saves == 0:
            found.append({"kind": "eval", "step": step, "loss": found[-1]["loss"] + 0.06, "time": time})
            staged = {
                "kind": "phase",
                "phase": "staged",
                "step": step,
                "seconds": 1.2,
                "waited_s": 0.1,
                "stall_s": step / 40,
            }
            found.append({**staged, "time": time})
            saved = {
                "kind": "phase",
                "phase": "saved",
                "step": step,
                "seconds": 4.0,
                "bytes": 9 << 30,
                "stall_s": step / 40,
            }
            found.append({**saved, "time": time + 1})
    return found


def output(run: MadeRun, attempt: int, last: int, ranks: int = 2) -> None:
    """What ranks print."""
    for rank in range(ranks):
        text = "".join(
            f"step {step} loss {10 / step:.3f} rank {rank}\n" for step in range(max(1, last - 300), last + 1)
        )
        run.log(attempt, rank, text)


def live(
    make: RunMaker, alive: Alive, name: str, now: float, done: int = 600, most: int = 5000, **changes: Any
) -> MadeRun:
    """A run that trains at ``now``, with so many steps behind it."""
    begun = now - 40 - 2 * done
    fields = {"backend": "local", "created": begun - 30, "max_steps": most, "nodes": 4, "ranks_per_node": 8, **changes}
    run = make(name, **fields)
    submit(run, 0, alive.job_id, begun - 30, "local")
    run.start(0, hosts=["gpu-a01", "gpu-a02", "gpu-a03", "gpu-a04"], time=begun, job_id=alive.job_id)
    lines(run, 0, started(begun) + steps(1, done, begun + 40, seed=make.count))
    return run


def interrupted(make: RunMaker, alive: Alive, name: str, now: float, **changes: Any) -> MadeRun:
    """A run that trains again, after a preemption, a crash, a hang and a resume with another learning rate."""
    hosts = [f"gpu-b{index:02d}" for index in range(8)]
    at = now - 6 * 3600
    run = make(name, backend="local", created=at, max_steps=12_000, nodes=8, ranks_per_node=8, **changes)
    run.store.put("config.yaml", b"train: {lr: 3.0e-4, max_steps: 10000}\n")
    submit(run, 0, "70012345", at, "local")
    first, ends = 1, [("preempted", 1400, 1400), ("failed", 2630, 2600), ("hung", 3870, 3850)]
    at += 1500
    for number, (reason, last, saved) in enumerate(ends):
        resume = f"checkpoints/step_{first - 1:08d}/{number - 1:04d}-0000" if number else None
        run.start(number, resume, hosts=hosts, time=at, job_id="70012345")
        lines(run, number, started(at) + steps(first, last, at + 40, seed=3))
        output(run, number, last)
        over = at + 40 + 2 * (last - first + 1) + (900 if reason == "hung" else 6)
        failed = {
            "failed_rank": 5,
            "failed_host": "gpu-b03",
            "error": "Traceback (most recent call last):\n  File "
            '"train.py", line 210, in step\nRuntimeError: NCCL error: unhandled system error\n',
        }
        more = failed if reason != "preempted" else {}
        run.end(
            number,
            reason,
            "requeue" if reason == "preempted" else "retry",
            time=over,
            first_step=first,
            last_step=last,
            **more,
        )
        at, first = over + (1300 if reason == "preempted" else 60), saved + 1
    submit(run, 1, alive.job_id, at, "local", "train: {lr: 1.0e-4, max_steps: 12000}\n")
    at += 240
    resume = f"checkpoints/step_{first - 1:08d}/0002-0000"
    run.start(3, resume, hosts=hosts, time=at, job_id=alive.job_id, submission=1)
    last = first + max(int((now - at - 40) / 2) - 1, 20)
    lines(run, 3, started(at) + steps(first, last, at + 40, seed=3))
    output(run, 3, last)
    return run


def over(make: RunMaker, name: str, at: float, reason: str = "finished", last: int = 400, **changes: Any) -> MadeRun:
    """A run that is over."""
    run = make(name, backend="local", created=at - 100, max_steps=400, nodes=2, ranks_per_node=8, **changes)
    submit(run, 0, "70011111", at - 100, "local")
    run.start(0, hosts=["gpu-c01", "gpu-c02"], time=at, job_id="70011111")
    lines(run, 0, started(at) + steps(1, last, at + 40, step_s=20.0, seed=make.count, floor=2.0 + make.count / 20))
    output(run, 0, last)
    error = (
        "Traceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory\n"
        if reason == "failed"
        else None
    )
    run.end(0, reason, time=at + 45 + 20 * last, first_step=1, last_step=last, error=error)
    return run


def sweep(runs_url: str, now: float, trials: int = 30) -> str:
    """A study whose trials have all ended; its id."""
    name = "20260131-120000-lr-search-abcd-sweep"
    record = msgspec.structs.replace(study(), id=name, created=now - 7200, trials=trials)
    create_study(runs_url, record, b"train: {}\n", b"{}")
    store = open_store(runs_url).sub(name)
    submission = SubmissionRecord(number=0, tag="t", backend="local", created=now - 7200, trials=[[0, trials - 1]])
    write_submission(store, submission)
    register_job(store, 0, "gone:1:1", "launcher")
    for row in rows(trials):
        write_result(
            store,
            Result(
                trial=row.trial,
                outcome=row.state,  # type: ignore[arg-type]
                time=now - 60,
                value=row.value,
                step=row.step,
                attempts=1,
                seconds=row.seconds,
                params=row.params,
            ),
        )
    return name


def team(make: RunMaker, alive: Alive, now: float) -> dict[str, str]:
    """A store as a team has it; ids by name."""
    week = 7 * 86400
    for back in range(9, 0, -1):
        over(make, f"baseline-{back}", now - back * week, owner="bob", last=300 + 10 * back)
        ended = "finished" if back % 3 else "failed"
        over(make, f"ablation-{back}", now - back * week + 90_000, ended, last=100 + 33 * back, owner="eve")
    over(make, "no-weight-decay", now - 90_000, "cancelled", last=120, owner="eve")
    over(make, "long-context-128k", now - 60_000, "failed", last=210, owner="bob")
    found = {
        "interrupted": interrupted(make, alive, "llama-8b-main", now, owner="ada"),
        "first": live(make, alive, "llama-8b-lr3e-4", now - 3, 900, owner="ada"),
        "second": live(make, alive, "llama-8b-lr1e-3", now - 2, 700, owner="ada"),
        "third": live(make, alive, "mixture-of-experts-16x", now - 4, 1100, owner="bob"),
        "stalled": live(make, alive, "data-mix-v7", now - 400, 300, owner="eve"),
    }
    waiting = make("eval-harness", backend="local", created=now - 500, owner="bob", kind="command", max_steps=None)
    submit(waiting, 0, None, now - 500, "local")
    ids = {key: run.load().id for key, run in found.items()}
    return {**ids, "study": sweep(make.runs_url, now)}


if __name__ == "__main__":
    import time

    folder = sys.argv[1]
    supervisor = Alive()
    print(json.dumps(team(RunMaker(folder), supervisor, time.time())), flush=True)
    os.waitpid(supervisor.process.pid, 0)
