"""Where metrics go beside the run directory's JSON lines: TensorBoard and Weights & Biases. Rank 0 alone writes.

What fails in mid-run is a warning, the first time; training goes on without that sink.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from llm.train import tensorboard
from llm.utils.config import ConfigError, LoggingConfig
from llm.utils.storage import Storage

PART_SECONDS = 30.0  # from one event file to the next
PUT_S = 30.0  # what an object store may take for one


class Sink(Protocol):
    """Takes the numbers of a kind, such as ``step`` or ``eval``, after a step."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Take them, without waiting for another machine."""

    def close(self) -> None:
        """Write everything out."""


class TensorBoard:
    """Event files ``tensorboard/<attempt>/events.out.tfevents.<part>``, each put once, whole.

    ``tensorboard --logdir RUN/tensorboard`` shows a run's attempts as curves beside each other. Every attempt has a
    folder of its own since TensorBoard drops what came before when the steps of one folder go back.
    """

    def __init__(self, storage: Storage, attempt: int) -> None:
        self._storage = storage
        self._folder = f"tensorboard/{attempt:04d}"
        self._part = len(storage.list(self._folder))
        self._data = b""
        self._began = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._putting: Future[None] | None = None

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        tags = {f"{kind}/{name}": value for name, value in values.items()}
        self._data += tensorboard.scalars(tags, step, time.time())
        if time.monotonic() - self._began >= PART_SECONDS and (self._putting is None or self._putting.done()):
            self._put()

    def close(self) -> None:
        """See :class:`Sink`."""
        if self._data:
            self._put()
        self._thread.shutdown()
        if self._putting is not None:
            self._putting.result()

    def _put(self) -> None:
        """Hand the next part to the thread; raises what became of the one before."""
        if self._putting is not None:
            self._putting.result()
        path, data = f"{self._folder}/{tensorboard.file_name(self._part)}", tensorboard.header(time.time()) + self._data
        self._part, self._data, self._began = self._part + 1, b"", time.monotonic()
        self._putting = self._thread.submit(lambda: self._storage.within(PUT_S).create(path, data))


class WandB:
    """One run of Weights & Biases for all attempts: its id is the run's.

    Its own step counter never goes back, as a run does that resumes from an earlier checkpoint; so the curves have
    ``trainer/step`` as their axis. The key is the library's business: WANDB_API_KEY, or what ``wandb login`` left.
    """

    def __init__(self, config: LoggingConfig, run_id: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"logging.wandb={config.wandb} needs the package wandb, which the job's Python does not have: "
                "pip install 'llmops[logging]' there, or set logging.wandb=off"
            ) from error
        # Offline it is a folder of this node; WANDB_DIR says where.
        self._run = wandb.init(
            project=config.wandb_project,
            id=run_id,
            name=run_id,
            resume="allow",
            mode="offline" if config.wandb == "offline" else "online",
            config=dict(settings),
            dir=os.environ.get("WANDB_DIR") or str(Path.cwd()),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("trainer/step", hidden=True)
        self._run.define_metric("*", step_metric="trainer/step")
        self.folder = Path(self._run.dir).parent

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        self._run.log({"trainer/step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        """See :class:`Sink`."""
        self._run.finish()


class Sinks:
    """All that the config asks for."""

    def __init__(self) -> None:
        self._sinks: dict[str, Sink] = {}

    def open(
        self, config: LoggingConfig, storage: Storage, attempt: int, run_id: str, settings: Mapping[str, Any]
    ) -> None:
        """Start them. ``settings`` is the config as plain values, for people to compare runs by.

        Raises ConfigError where a library is missing or says no, and OSError where the store does.
        """
        if config.tensorboard:
            self._sinks["tensorboard"] = TensorBoard(storage, attempt)
        if config.wandb != "off":
            try:
                self._sinks["wandb"] = WandB(config, run_id, settings)
            except ConfigError:
                raise
            except Exception as error:  # wandb has errors of many kinds: no key, no network, no project
                raise ConfigError(
                    f"logging.wandb={config.wandb}: {' '.join(str(error).split())}: "
                    "set WANDB_API_KEY in the job's environment, or logging.wandb=offline"
                ) from error

    def write(self, kind: str, step: int, **values: float | None) -> None:
        """Hand the numbers of ``step`` to every sink; what is None or no number is left out."""
        if not self._sinks:
            return
        numbers = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        for name in list(self._sinks):
            try:
                self._sinks[name].write(kind, step, numbers)
            except Exception as error:  # noqa: BLE001  # whatever it is, training is worth more
                self._drop(name, error)

    def close(self) -> None:
        """Write everything out."""
        for name in list(self._sinks):
            try:
                self._sinks.pop(name).close()
            except Exception as error:  # noqa: BLE001
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._sinks.pop(name, None)
        print(f"warning: nothing more goes to {name}: {error}", file=sys.stderr, flush=True)
