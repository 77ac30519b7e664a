"""From a checked config to a running trainer: join the ranks, agree on what to resume, train, and leave."""

from __future__ import annotations

import contextlib
import os
import sys

import msgspec
import torch
import torch.distributed as dist

from llm.checkpoint.format import CheckpointError, Commit
from llm.checkpoint.lineage import folders, newest_commit
from llm.data.format import DataError
from llm.train.checkpoint import Checkpointer
from llm.train.control import Control
from llm.train.dist import lay_out
from llm.train.exporter import Exporter
from llm.train.logging import Metrics
from llm.train.loop import Trainer
from llm.train.resharding import together
from llm.train.schedule import retention
from llm.train.sinks import Sinks
from llm.train.throughput import gpu_memory
from llm.train.world import World, connect
from llm.utils.config import TrainingConfig
from llm.utils.storage import Storage, open_storage


def run_attempt(
    config: TrainingConfig, run_url: str, control: Control, rank: int, size: int, local_rank: int, started: float
) -> int:
    """Train as rank ``rank`` of ``size``; returns the exit code."""
    metrics = Metrics(active=rank == 0)
    metrics.write("phase", at=started, phase="started")
    metrics.write("phase", phase="imported")
    prepare(config)
    control.heartbeat("connect")
    world = connect(config.dist, rank, size, local_rank)
    metrics.write("phase", phase="distributed")
    exporter = Exporter(control, lambda: gpu_memory(world.device))
    if rank == 0:
        exporter.start()
    control.heartbeat("load")
    storage = open_storage(run_url)
    try:
        attempt, generation, resume = agree(storage, world)
        saving = config.checkpoint
        keep, code = retention(saving), os.environ.get("LLMOPS_CODE", "")
        checkpointer = Checkpointer(
            storage, world, attempt, generation, keep, saving.save_seconds, code, snapshots=saving.snapshot_steps > 0
        )
        sinks = Sinks()
        layout = lay_out(config.dist, world)
        trainer = Trainer(config, layout, storage, control, metrics, checkpointer, exporter, sinks)
        checkpointer.check_store()  # before the first line of metrics: it says best what is wrong
        together(world, f"cannot write to {storage.url}", lambda: metrics.open(storage, attempt) if rank == 0 else None)
        if rank == 0:
            trainer.stream.keep_tokenizer(storage)
            run_id = os.environ.get("LLMOPS_RUN_ID") or storage.url.rstrip("/").rpartition("/")[2]
            sinks.open(config.logging, storage, attempt, run_id, msgspec.to_builtins(config))
        trainer.start(resume)
        metrics.write("phase", phase="loaded", step=trainer.progress.step)
        return trainer.run()
    except (CheckpointError, DataError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        exporter.close()
        if world.grouped:
            dist.destroy_process_group()


def prepare(config: TrainingConfig) -> None:
    """Threads, seeds and determinism, before anything is computed."""
    torch.set_num_threads(config.train.threads_per_rank)
    with contextlib.suppress(RuntimeError):  # may be set only once in a process
        torch.set_num_interop_threads(1)
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Not use_deterministic_algorithms(): the same switch, but it imports the compiler's settings too.
        torch.set_deterministic_debug_mode("error")
        torch.backends.cudnn.benchmark = False


def agree(storage: Storage, world: World) -> tuple[int, int, Commit | None]:
    """(attempt, generation, commit to resume from). Rank 0 looks; the others must not see a listing of their own."""
    mine = together(world, f"cannot read {storage.url}", lambda: _look(storage) if world.rank == 0 else [0] * 6)
    attempt, generation, has, *name = world.from_first(mine)
    return attempt, generation, Commit(attempt=name[0], generation=name[1], step=name[2]) if has else None


def _look(storage: Storage) -> list[int]:
    """Attempt, generation, whether there is a commit to resume from, and its attempt, generation and step."""
    taken = folders(storage)
    if (number := os.environ.get("LLMOPS_ATTEMPT")) is not None:
        attempt = int(number)
    else:
        seen = [commit.attempt for commit in taken] + [int(name) for name in storage.list("metrics") if name.isdigit()]
        attempt = max(seen, default=-1) + 1
    # Folders that this attempt left behind, whole or not, are never written again.
    generation = max((commit.generation for commit in taken if commit.attempt == attempt), default=-1) + 1
    given = os.environ.get("LLMOPS_RESUME_FROM")
    resume = newest_commit(storage) if given is None else Commit.parse(given) if given else None
    if resume is None:
        return [attempt, generation, 0, 0, 0, 0]
    return [attempt, generation, 1, resume.attempt, resume.generation, resume.step]
