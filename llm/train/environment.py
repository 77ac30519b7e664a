"""Which rank this process is, from whatever started it. Free of torch."""

from __future__ import annotations

import os

from llm.utils.config import ConfigError


def rank_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the environment: the usual variables, else SLURM's, else one process."""
    if "RANK" not in os.environ and "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        # submitit looks for the mark of its own jobs; a plain srun has the same SLURM variables without it.
        os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")
        given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ.update(given)
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        return rank, size, int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from error
