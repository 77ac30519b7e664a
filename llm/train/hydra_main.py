"""``python -m llm.train [--multirun] key=value ...``: trainings as an ordinary Hydra application.

Each job's run directory is Hydra's output directory of that job, so a job that is requeued goes on from its own
checkpoints. The launchers (basic, joblib, submitit) and sweepers are Hydra's; llmops has no part in it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import msgspec
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm.train.control import EXIT_STOPPED, Control
from llm.train.environment import rank_environment
from llm.utils.config import ConfigError, TrainingConfig, check

REQUEUE_S = 120.0  # that a rank waits to be ended with its job, which rank 0 has requeued
_ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Compose from ``sys.argv`` and train, here or where the launcher says."""
    # What hydra.job.name is worked out from: it names the log, and submitit's jobs.
    os.environ.setdefault("HYDRA_MAIN_MODULE", "llm.train")
    # Not as a decorator: a launcher pickles `train` by its name, which must be this very function.
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(train)()


def conf_dir() -> Path:
    """Folder of the Hydra groups: a wheel carries it as ``llmops/_conf``, the tree has it beside the package."""
    for folder in (_ROOT / "llmops" / "_conf", _ROOT / "conf"):
        if folder.is_dir():
            return folder
    raise CompactHydraException(f"{_ROOT}: there is no folder llmops/_conf or conf; install llmops again")


def train(cfg: DictConfig) -> float | None:
    """One training; returns its last held-out loss, or None on other ranks and where there is none.

    Raises CompactHydraException, which launchers report, when it fails, and SystemExit when it was stopped.
    """
    started = time.time()
    # Under llmops' supervisor, as with hydra/launcher=llmops, the run and its signals are the supervisor's.
    supervised = os.environ.get("LLMOPS_RUN_URL")
    run_url = supervised or HydraConfig.get().runtime.output_dir
    try:
        config = training_config(cfg)
        join_submitit()
        rank, size, local_rank = rank_environment()
        check(config, size)

        from llm.train.attempt import run_attempt

        control: Control
        if supervised:
            control = Control(rank, os.environ.get("LLMOPS_CONTROL_DIR"))
            code = run_attempt(config, run_url, control, rank, size, local_rank, started)
        else:
            control = SignalledControl(rank)
            with control.signals():
                code = run_attempt(config, run_url, control, rank, size, local_rank, started)
    except ConfigError as error:
        raise CompactHydraException(f"error: {error}") from error
    if code == EXIT_STOPPED:
        if isinstance(control, SignalledControl):
            control.requeue()
        sys.exit(EXIT_STOPPED)
    if code:
        raise CompactHydraException(f"error: the training in {run_url} failed; its log says why")
    return held_out_loss(run_url) if rank == 0 else None


def training_config(cfg: DictConfig) -> TrainingConfig:
    """The trainer's part of a composed configuration. Raises :class:`ConfigError`."""
    try:
        sections = {
            name: OmegaConf.to_container(cfg[name], resolve=True, throw_on_missing=True)
            for name in TrainingConfig.__struct_fields__
        }
        return msgspec.convert(sections, TrainingConfig)
    except (OmegaConfBaseException, msgspec.ValidationError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def join_submitit() -> None:
    """Let submitit say which rank this process is, where it has several tasks and the environment says nothing."""
    if "SUBMITIT_EXECUTOR" in os.environ and "RANK" not in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        found = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if found.local_world_size == found.world_size:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # a node may not find itself by its own name


def held_out_loss(run_url: str) -> float | None:
    """What the newest checkpoint knows of the held-out loss."""
    from llm.checkpoint.lineage import newest_commit, read_manifest
    from llm.utils.storage import open_storage

    storage = open_storage(run_url)
    commit = newest_commit(storage)
    loss: Any = read_manifest(storage, commit).state.get("evaluation_loss") if commit else None
    return loss if isinstance(loss, float) else None


class SignalledControl(Control):
    """Nobody supervises this training: signals of its job, or of a person, ask it to save and leave."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self._received: int | None = None
        self._requeue: Any = None  # submitit's handler of the signal before a job's end, which requeues the job

    def stop_requested(self) -> bool:
        """Has a signal arrived?"""
        return self._received is not None

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take the signals that mean a stop while the block runs; all handlers are as before after it."""
        numbers = [signal.SIGTERM]
        if "SUBMITIT_EXECUTOR" in os.environ:
            from submitit.core.job_environment import JobEnvironment

            # submitit answers SIGTERM itself, by going on; what counts is the signal that it asks SLURM for.
            numbers = [JobEnvironment._usr_sig()]
            self._requeue = signal.getsignal(numbers[0])
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def requeue(self) -> None:
        """Have submitit requeue the job, whose state is saved, if it may be; elsewhere there is nothing to do."""
        if callable(self._requeue):
            # Requeues and exits on rank 0, raises where the job has timed out too often, and returns on other ranks.
            self._requeue(self._received or signal.SIGUSR2, None)
            time.sleep(REQUEUE_S)  # one that left earlier than rank 0 would have srun kill it before it requeues

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received = number
