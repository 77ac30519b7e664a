"""``python -m tests.checkpoint.rank_program``: starts ranks that save checkpoints and do nothing else.

One process imports torch and forks whatever the tests order on its standard input: a test that kills ranks need not pay
for that import each time. What a tensor holds after a step is a function of the step, so that whoever loads a
checkpoint can tell whether it is the one that was saved.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import s3fs  # noqa: F401 - imported once, for all
import torch
import torch._dynamo  # DTensor would import it at its first use, in every rank
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import llm.checkpoint.probe as probe_module
import llm.train.logging as metrics_module
import llm.train.saver as saver_module
import llm.utils.object_storage as storage_module
from llm.checkpoint.format import CheckpointError, Commit, DamagedError
from llm.checkpoint.lineage import folders, is_committed, newest_commit, read_manifest
from llm.checkpoint.retention import Retention
from llm.train.checkpoint import Checkpointer
from llm.train.logging import Metrics
from llm.train.pieces import local_pieces
from llm.train.resharding import load
from llm.train.world import World, connect
from llm.utils.config import DistConfig
from llm.utils.sharding import chunk
from llm.utils.storage import open_storage
from tests.checkpoint.ranks import LIMIT, NOTHING, REPORT, ROLLBACK, SAVE, STOP


def shapes(megabytes: float) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    """Tensor -> shape, type, whether it is sharded. ``model.w`` has about ``megabytes``."""
    return {
        "model.w": ((max(int(megabytes * 4096), 3), 64), torch.float32, True),
        "model.odd": ((7, 3), torch.int64, True),
        "model.replica": ((128,), torch.bfloat16, False),
        "optim.step": ((), torch.float32, False),
    }


def content(name: str, shape: tuple[int, ...], dtype: torch.dtype, step: int) -> Tensor:
    """The whole tensor after ``step``; every row and every step differ."""
    count = 1
    for size in shape:
        count *= size
    values = torch.arange(count, dtype=torch.int64) * (2 * step + 1) + len(name) + 31 * step
    return (values % (128 if dtype == torch.bfloat16 else 16_777_213)).to(dtype).view(shape)


class Rank:
    """One rank of an attempt."""

    def __init__(self, order: dict[str, Any], rank: int) -> None:
        self.order, self.rank, self.folder = order, rank, Path(order["folder"])
        self.nursery = os.getppid()
        self.log = os.open(self.folder / f"rank{rank}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.counter = os.open(self.folder / f"step{rank}", os.O_WRONLY | os.O_CREAT, 0o644)
        saver_module.GRACE_S = order["grace_s"]
        metrics_module.PART_SECONDS = 0.3
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(order["ranks"]),
            LOCAL_WORLD_SIZE=str(order["ranks"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(order["port"]),
        )
        self.world = connect(DistConfig(backend="gloo", timeout_s=120), rank, order["ranks"], rank)
        storage = open_storage(order["url"])
        attempt = order["attempt"]
        self.metrics = Metrics(active=rank == 0)
        generation, resume = self.agree(storage, attempt)
        if rank == 0:
            self.metrics.open(storage, attempt)
        keep = Retention(keep_last=order["keep_last"])
        self.checkpointer = Checkpointer(storage, self.world, attempt, generation, keep, order["limit_s"])
        self.shapes = shapes(order["megabytes"])
        self.tensors = self.make(0)
        self.checkpointer.attach(self.tensors)
        self.checkpointer.check_store()
        self.step = 0
        if resume is not None:
            self.go_back(resume)
        self.writer = self.checkpointer.saver.writer_pid
        self.part_failed, self.commands = False, 0
        if order["forks"] and (pid := os.fork()) >= 0:  # as data loaders do: it holds whatever pipes this rank has
            if pid == 0:
                signal.pause()
                os._exit(0)
            self.say("forked", pid=pid)
        self.say("ready", writer=self.writer, resumed=None if resume is None else resume.path)

    def agree(self, storage: Any, attempt: int) -> tuple[int, Commit | None]:
        """Generation, and what to resume from, as the trainer finds them."""
        mine = [0] * 5
        if self.rank == 0:
            taken = [commit.generation for commit in folders(storage) if commit.attempt == attempt]
            newest = newest_commit(storage)
            mine[0] = max(taken, default=-1) + 1
            if newest is not None:
                mine[1:] = [1, newest.attempt, newest.generation, newest.step]
        generation, has, *name = self.world.from_first(mine)
        return generation, Commit(attempt=name[0], generation=name[1], step=name[2]) if has else None

    def make(self, step: int) -> dict[str, Tensor]:
        mesh = init_device_mesh("cpu", (self.world.size,)) if self.world.grouped else None
        made: dict[str, Tensor] = {}
        for name, (shape, dtype, sharded) in self.shapes.items():
            whole = content(name, shape, dtype, step)
            if mesh is None or not sharded:
                made[name] = whole
                continue
            begin, end = chunk(shape[0], self.rank, self.world.size)
            made[name] = DTensor.from_local(
                whole[begin:end].clone(), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
        return made

    def local(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def expected(self, name: str, step: int) -> Tensor:
        shape, dtype, sharded = self.shapes[name]
        whole = content(name, shape, dtype, step)
        if not sharded or not self.world.grouped:
            return whole
        begin, end = chunk(shape[0], self.rank, self.world.size)
        return whole[begin:end]

    def go_back(self, commit: Commit) -> None:
        state = self.checkpointer.load(commit)
        self.step = state["step"]
        for name in self.shapes:
            assert torch.equal(self.local(name), self.expected(name, self.step)), f"{name} is not that of {self.step}"

    def say(self, event: str, **values: Any) -> None:
        os.write(self.log, json.dumps({"event": event, "step": getattr(self, "step", 0), **values}).encode() + b"\n")

    def command(self) -> list[int]:
        """What the test wants after this step: rank 0 looks, and all hear."""
        mine = [NOTHING, 0, 0, 0]
        if self.rank == 0:
            path = self.folder / f"command{self.commands}.json"
            if path.exists():
                self.commands += 1
                mine = json.loads(path.read_text())
        return self.world.from_first(mine)

    def run(self) -> None:
        """Steps, until the test says stop."""
        while True:
            if os.getppid() != self.nursery:
                raise SystemExit("whoever started this has gone")
            self.checkpointer.fence()
            self.step += 1
            for name in self.shapes:
                self.local(name).copy_(self.expected(name, self.step))
            if self.rank == 0:
                self.metrics.write("step", step=self.step)
            os.pwrite(self.counter, b"%020d" % self.step, 0)
            if self.world.any(self.part_failed) and self.rank == 0:
                self.checkpointer.abandon("another rank could not write its part")
            self.part_failed = False
            self.note(self.checkpointer.poll())
            code, *argument = self.command()
            if code == SAVE or (self.order["every"] and self.step % self.order["every"] == 0):
                self.save()
            if code == STOP:
                break
            if code == ROLLBACK:
                self.note(self.checkpointer.wait())
                self.go_back(Commit(attempt=argument[0], generation=argument[1], step=argument[2]))
                self.say("back")
            if code == LIMIT:
                self.checkpointer.limit_s = argument[0] / 1000
            if code == REPORT:
                self.report()
            time.sleep(self.order["step_s"])
        try:
            self.note(self.checkpointer.wait())
        except CheckpointError as error:
            self.say("last_failed", reason=str(error))
        self.metrics.close()
        writer = self.checkpointer.saver._writer
        self.checkpointer.close()
        self.say("left", code=None if writer is None else writer._process.returncode)

    def save(self) -> None:
        commit = self.checkpointer.save(
            self.step, {"step": self.step}, self.metrics.hand_over() if self.rank == 0 else None
        )
        self.say("begun", commit=commit.path, blocked_s=self.checkpointer.blocked_s)
        if self.order["twice"]:  # and another, at once
            self.order["twice"] = False
            self.step += 1
            for name in self.shapes:
                self.local(name).copy_(self.expected(name, self.step))
            self.save()

    def note(self, events: Any) -> None:
        for event in events:
            if event.reason is not None:
                self.part_failed = True
                self.say("failed", commit=event.commit.path, reason=event.reason)
            elif event.committed:
                self.metrics.committed()
                self.say("committed", commit=event.commit.path, warning=event.warning)
            else:
                self.say("written", commit=event.commit.path)
        if (pid := self.checkpointer.saver.writer_pid) not in (None, self.writer):
            self.writer = pid
            self.say("replaced", writer=pid)

    def report(self) -> None:
        processes = {"rank": os.getpid(), "writer": self.writer}
        found = {}
        for name, pid in processes.items():
            status = Path(f"/proc/{pid}/status").read_text()
            resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
            found[name] = {"files": len(os.listdir(f"/proc/{pid}/fd")), "kilobytes": resident}
        self.say("report", **found)


def check(order: dict[str, Any]) -> dict[str, Any]:
    """Load every checkpoint folder that there is, whole, in this process alone."""
    storage = open_storage(order["url"])
    world = World(0, 1, 0, torch.device("cpu"), grouped=False)
    good, refused, bad = [], [], []
    wanted = shapes(order["megabytes"])
    for commit in folders(storage):
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype, _) in wanted.items()}
        try:
            if not is_committed(storage, commit):
                try:
                    read_manifest(storage, commit)
                except DamagedError:
                    refused.append(commit.path)
                    continue
            manifest = read_manifest(storage, commit)
            load(storage, commit, manifest, local_pieces(tensors), world)
        except (CheckpointError, OSError) as error:
            bad.append(f"{commit.path}: {error}")
            continue
        wrong = [
            name
            for name, tensor in tensors.items()
            if not torch.equal(tensor, content(name, tuple(tensor.shape), tensor.dtype, commit.step))
        ]
        if wrong or manifest.state != {"step": commit.step}:
            bad.append(f"{commit.path}: {wrong} are not what was saved")
        else:
            good.append(commit.path)
    newest = newest_commit(storage)
    lines: dict[str, list[int]] = {}
    for attempt in storage.list("metrics"):
        text = b"".join(storage.read(f"metrics/{attempt}/{part}") for part in storage.list(f"metrics/{attempt}"))
        lines[attempt] = [json.loads(line)["step"] for line in text.splitlines()]
    return {
        "good": good,
        "refused": refused,
        "bad": bad,
        "newest": newest.path if newest else None,
        "lines": lines,
    }


def child(order: dict[str, Any], rank: int) -> None:
    """What a forked process does; never returns."""
    code = 1
    folder = Path(order["folder"])
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        output = os.open(folder / f"output{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(order["environment"])
        torch.set_num_threads(1)
        if order["do"] == "train":
            from llm.train.__main__ import main as train

            storage_module.PATIENCE_S = probe_module.ANSWER_S = order["patience_s"]
            size, port = order["ranks"], order["port"]
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            (folder / f"code{rank}").write_text(str(train(order["arguments"])))
        elif order["do"] == "check":
            aside = folder / "check.tmp"
            aside.write_text(json.dumps(check(order)))
            aside.rename(folder / "check.json")
        else:
            made = Rank(order, rank)
            made.run()
            if made.world.grouped:
                dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Fork what is ordered, one JSON object per line; answer with the process ids."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for them
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pids = []
        for rank in range(order["ranks"]):
            if (pid := os.fork()) == 0:
                child(order, rank)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)


if __name__ == "__main__":
    main()
