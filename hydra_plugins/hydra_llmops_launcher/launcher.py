"""The launcher: each job is the program itself, started again with that job's overrides, under llmops' supervisor."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.hydra_llmops_launcher.callback import RETURNED

if TYPE_CHECKING:
    from llmops.sweep.model import TrialRow

_LOG = logging.getLogger(__name__)
_LEFT = ("pending", "running", "preempted", "unknown")
_OURS = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweep.", "hydra.mode")
_KEEP = f"+hydra.callbacks.llmops._target_={__name__.rpartition('.')[0]}.callback.KeepReturn"


class LlmopsLauncher(Launcher):
    """See :class:`LlmopsConf` for the settings."""

    def __init__(
        self,
        backend: str,
        name: str | None,
        runs_url: str | None,
        max_parallel: int | None,
        wait: bool,
        poll_s: float,
        overrides: Sequence[str],
    ) -> None:
        self.backend, self.name, self.runs_url, self.max_parallel = backend, name, runs_url, max_parallel
        self.wait, self.poll_s, self.overrides = wait, poll_s, list(overrides)
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's, before :meth:`launch`."""
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One study for all jobs. Without ``wait`` they count as completed, with None as their value."""
        from llmops import studies
        from llmops.errors import ClusterError, UserError

        assert self.config is not None
        folders = [self._folder(number, each) for number, each in enumerate(job_overrides, initial_job_idx)]
        commands = [self._command(folder, each) for folder, each in zip(folders, job_overrides, strict=True)]
        fixed = ["code.enabled=false", "sweep.objective=none", *self.overrides]
        try:
            prepared = studies.prepare(
                fixed,
                backend=self.backend,
                name=self.name or str(self.config.hydra.job.name),
                command=commands[0],
                commands=commands,
                runs_url=self.runs_url,
                max_parallel=self.max_parallel,
            )
            study = studies.start(prepared)
        except (UserError, ClusterError) as error:
            raise RuntimeError(f"llmops: {error}") from error
        _LOG.info("%s: %d jobs submitted; `llmops sweep status %s`", study.id, len(commands), study.id)
        returns = [self._return(folder, each) for folder, each in zip(folders, job_overrides, strict=True)]
        if self.wait:
            self._collect(study.id, folders, returns)
        return returns

    def _collect(self, study_id: str, folders: Sequence[Path], returns: Sequence[JobReturn]) -> None:
        """Wait for all jobs, however long the cluster takes, and fetch what they returned."""
        from llmops import studies
        from llmops.errors import ClusterError

        rows: list[TrialRow] = []
        while not rows or any(row.state in _LEFT for row in rows):
            try:
                rows = studies.trials(studies.find(study_id, self.runs_url))
            except ClusterError as error:
                _LOG.warning("%s: %s; looking again", study_id, error)
            time.sleep(self.poll_s)
        for row, folder, found in zip(rows, folders, returns, strict=True):
            if row.state == "complete":
                kept = folder / RETURNED
                found.return_value = json.loads(kept.read_text())["value"] if kept.exists() else None
            else:
                found.status = JobStatus.FAILED
                found.return_value = RuntimeError(f"{row.id}: {row.state} {row.reason}; `llmops logs {row.id}`")

    def _folder(self, number: int, overrides: Sequence[str]) -> Path:
        """The job's output folder, as Hydra would choose it."""
        assert self.config is not None
        assert self.hydra_context is not None
        sweep = self.config.hydra.sweep
        subdir = str(OmegaConf.to_container(sweep, resolve=False)["subdir"])  # type: ignore[index, call-overload]
        if subdir == "${hydra.job.num}":
            subdir = str(number)
        else:
            one: Any = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            one.hydra.job.num = number
            subdir = str(one.hydra.sweep.subdir)
        return Path(str(sweep.dir), subdir).absolute()

    def _command(self, folder: Path, overrides: Sequence[str]) -> list[str]:
        """The program as it was started, for one job: its own flags, and no sweep."""
        assert self.config is not None
        module = getattr(sys.modules["__main__"], "__spec__", None)
        program = ["-m", module.name.removesuffix(".__main__")] if module else [str(Path(sys.argv[0]).absolute())]
        asked: Any = OmegaConf.to_container(self.config.hydra.overrides, resolve=False)
        hydras = [each for each in asked["hydra"] if not each.lstrip("+~").startswith(_OURS)]
        where = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        own = [f"hydra.run.dir='{where}'", _KEEP]
        return [sys.executable, *program, *_flags(sys.argv[1:]), *overrides, *hydras, *own]

    def _return(self, folder: Path, overrides: Sequence[str]) -> JobReturn:
        found = JobReturn()
        found.overrides, found.working_dir = list(overrides), str(folder)
        found.cfg, found.status, found.return_value = self.config, JobStatus.COMPLETED, None
        return found


def _flags(arguments: Sequence[str]) -> list[str]:
    """Hydra's flags with their values, without those that ask for a sweep."""
    kept: list[str] = []
    waiting = False
    for each in arguments:
        if waiting or each.startswith("-"):
            waiting = each in ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
            if each not in ("--multirun", "-m"):
                kept.append(each)
    return kept
