"""Inside each job: keeps what the program returned, where the launcher finds it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

RETURNED = ".llmops-returned.json"


class KeepReturn(Callback):
    """Writes the return value as JSON into the job's output folder; one that JSON does not know is kept as null."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Hydra's, after the program has returned or raised."""
        if job_return.status.name != "COMPLETED" or os.environ.get("RANK", "0") != "0":
            return
        try:
            text = json.dumps({"value": job_return.return_value})
        except (TypeError, ValueError):
            text = json.dumps({"value": None})
        target = Path(config.hydra.runtime.output_dir, RETURNED)
        aside = target.with_name(f"{RETURNED}.{os.getpid()}")
        aside.write_text(text)
        aside.replace(target)
