"""Real training runs for the tests: every rank a process of its own, joined over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llm.checkpoint.format import Commit
from llm.checkpoint.lineage import newest_commit, read_manifest, read_part
from llm.utils.storage import open_storage
from tests.conftest import free_ports

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 90.0


def tiny(**changes: Any) -> dict[str, Any]:
    """A config that trains in a second or two; ``changes`` are of the form section__key=value."""
    config: dict[str, Any] = {
        "model": {
            "name": "test",
            "vocab_size": 257,  # does not split evenly
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "ffn_dim": 176,
            "max_seq_len": 128,
            "tie_embeddings": True,
        },
        "train": {
            "max_steps": 60,
            "seq_len": 64,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "lr": 0.003,
            "warmup_steps": 5,
        },
        "dist": {"timeout_s": 60},
        "data": {"source": "embedded:shakespeare"},
        "eval": {"every_steps": 20, "batches": 2, "sample_prompts": ["To be", "HAMLET.\n"], "sample_tokens": 10},
        "checkpoint": {"every_steps": 25},
        "launcher": {"anything": "the trainer skips keys that are not its own"},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


@dataclass
class Attempt:
    """The processes of one attempt, with a control directory as the supervisor would make it."""

    run: Path
    control: Path
    ranks: list[subprocess.Popen[str]] = field(default_factory=list)

    def heartbeat(self, rank: int = 0) -> dict[str, Any]:
        """The last heartbeat of a rank; empty before the first."""
        try:
            return dict(json.loads((self.control / f"heartbeat.{rank}").read_text()))
        except FileNotFoundError:
            return {}

    def wait_for_step(self, step: int) -> None:
        """Return once rank 0 has finished ``step``."""
        self.wait_until(lambda: (self.heartbeat().get("step") or 0) >= step)

    def wait_until(self, happened: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not happened():
            if time.monotonic() > deadline or any(rank.poll() is not None for rank in self.ranks):
                self.kill()
                raise AssertionError(
                    f"it did not happen: {self.heartbeat()}, {[rank.communicate() for rank in self.ranks]}"
                )
            time.sleep(0.02)

    def stop(self) -> None:
        """Request a stop, as the supervisor does."""
        (self.control / "stop").write_text(json.dumps({"cause": "test", "deadline": time.time() + 60}))

    def signal_everything(self, number: int) -> None:
        """What a process tracker does: every process of the job gets the signal, loader workers included."""
        for rank in self.ranks:
            os.killpg(rank.pid, number)

    def finish(self) -> list[int]:
        """Exit codes of all ranks, after they left by themselves."""
        try:
            outputs = [rank.communicate(timeout=DEADLINE_S) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        codes = [rank.returncode for rank in self.ranks]
        if any(code not in (0, 75) for code in codes):
            print(*(text for output in outputs for text in output))
        return codes

    def kill(self) -> None:
        """SIGKILL to every process."""
        for rank in self.ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)


def start(run: Path, config: dict[str, Any], ranks: int, attempt: int = 0, resume: str | None = "newest") -> Attempt:
    """Start the ranks of an attempt. ``resume`` is a commit, ``"newest"``, or None for a start from scratch."""
    run.mkdir(exist_ok=True)
    control = run / f"control-{attempt}"
    control.mkdir()
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    if resume == "newest":
        commit = newest_commit(open_storage(str(run)))
        resume = commit.path if commit else None
    started = Attempt(run, control)
    port = free_ports(1)[0]
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "LLMOPS_RUN_ID": "test",
            "LLMOPS_ATTEMPT": str(attempt),
            "LLMOPS_RUN_URL": str(run),
            "LLMOPS_CONTROL_DIR": str(control),
            "LLMOPS_RESUME_FROM": resume or "",
        }
        started.ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "llm.train", "--config", str(file)],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    return started


def lines(run: Path, attempt: int, kind: str) -> list[dict[str, Any]]:
    """The metrics lines of one kind that an attempt wrote."""
    files = sorted((run / "metrics" / f"{attempt:04d}").glob("*.jsonl"))
    parsed = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in parsed if line["kind"] == kind]


def trajectory(run: Path, kind: str = "step") -> dict[int, tuple[Any, ...]]:
    """Step -> what must not change when a run is stopped and resumed, over all attempts of ``run``."""
    found: dict[int, tuple[Any, ...]] = {}
    for folder in sorted((run / "metrics").iterdir()):
        for line in lines(run, int(folder.name), kind):
            assert line["step"] not in found, f"step {line['step']} ran twice"
            found[line["step"]] = (line["loss"], line.get("lr"), line.get("grad_norm"), line.get("tokens"))
    return found


def fingerprints(run: Path, commit: Commit) -> list[dict[str, list[tuple[list[int], str]]]]:
    """What a commit holds: of each rank, tensor -> offset and checksums of its pieces."""
    storage = open_storage(str(run))
    manifest = read_manifest(storage, commit)
    parts = (read_part(storage, commit, manifest, rank) for rank in range(manifest.world_size))
    return [
        {name: [(piece.offset, piece.crc32c) for piece in tensor.pieces] for name, tensor in part.tensors.items()}
        for part in parts
    ]
