"""A job that prepares data (``task=prepare_data``): what this machine can find out before it is submitted."""

from __future__ import annotations

import glob
from pathlib import Path

from llmops.config.schema import LocalCluster, RunConfig
from llmops.errors import UserError


def check_here(config: RunConfig) -> None:
    """Refuse inputs and a tokenizer that are not there, where the job runs on this machine. Raises UserError."""
    if config.task != "prepare_data" or not isinstance(config.cluster, LocalCluster):
        return
    for pattern in config.prepare.input:
        if "://" in pattern or Path(pattern).exists():
            continue
        if not any(glob.iglob(pattern, recursive=True)):  # noqa: PTH207 - Path.glob knows no absolute patterns
            raise UserError(f"prepare.input={pattern}: nothing matches; check the path (** goes into folders)")
    name = config.prepare.tokenizer
    if "://" not in name and "/" in name and not Path(name.partition("#")[0]).exists():
        raise UserError(f"prepare.tokenizer={name}: there is no such file or folder")
