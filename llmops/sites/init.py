"""``llmops init``: which cluster, what it says, and the file that comes of it."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llmops.config.overrides import assign
from llmops.errors import UserError
from llmops.resources import conf_dir
from llmops.sites import slurm_config, write
from llmops.sites.doctor import kubernetes_here
from llmops.sites.write import Draft

BACKENDS = ("slurm", "k8s")


@dataclass(frozen=True)
class Written:
    """The file, the option that it is, and the words of `llmops submit` that use it."""

    path: Path
    option: str
    use: str
    text: str


def init(
    backend: str | None,
    output: Path | None,
    force: bool,
    image: str | None = None,
    timeout: float = 60.0,
    tell: Callable[[str], None] = lambda what: None,
) -> Written:
    """Ask the cluster and write its configuration. ``timeout``: seconds for each of SLURM's commands.

    Raises :class:`UserError` for a place that will not do, and :class:`ClusterError` where nobody answers; then nothing
    is written.
    """
    backend = backend or _seen()
    if backend not in BACKENDS:
        raise UserError(
            f"--backend {backend}: choose slurm or k8s; this machine needs no configuration (cluster=local)"
        )
    if image is not None and backend != "k8s":
        raise UserError(f"--image {image}: is for --backend k8s; set cluster.container for SLURM")
    if output is not None:
        _free(write.place(output, "")[0], force)  # before anybody is asked
    draft = _ask(backend, image, timeout, tell)
    path, option = write.place(output, draft.name)
    _free(path, force)
    use = _use(path, option)
    unset = " cluster.image=IMAGE" * (backend == "k8s" and image is None)
    shown = f"llmops submit {use}{unset} {_run(int(draft.values.get('ranks_per_node', 1)))}"
    draft = replace(draft, head=[*draft.head, f"Use: {shown}"])
    write.check(draft, option, [assign("cluster.image", "none")] if backend == "k8s" and image is None else [])
    content = write.text(draft)
    write.save(path, content, force)
    return Written(path, option, shown, content)


def _seen() -> str:
    """The backend that is here, where it is only one."""
    slurm, kubernetes = shutil.which("scontrol") is not None, kubernetes_here()
    if slurm and kubernetes:
        raise UserError("SLURM and a kubeconfig are both here; say which is meant: --backend slurm or --backend k8s")
    if not slurm and not kubernetes:
        raise UserError(
            "neither SLURM's commands nor a kubeconfig are here; run this where jobs are submitted from, or set "
            "KUBECONFIG"
        )
    return "slurm" if slurm else "k8s"


def _ask(backend: str, image: str | None, timeout: float, tell: Callable[[str], None]) -> Draft:
    if backend == "slurm":
        tell("SLURM: partitions, nodes, accounts")
        return slurm_config.draft(slurm_config.ask(timeout))
    from llmops.sites import k8s_config

    tell("Kubernetes: the API server")
    return k8s_config.draft(k8s_config.ask(lambda what: tell(f"Kubernetes: {what}")), image)


def _free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise UserError(f"{path}: is there already; add --force to replace it, or --output for another place")


def _run(ranks: int) -> str:
    """What to submit first: the tiny recipe, whose batch of 16 sequences many numbers of ranks can share."""
    if ranks <= 2:
        return "recipe=tiny"
    return "recipe=tiny train.micro_batch_size=1" if 16 % ranks == 0 else "-- python train.py"


def _use(path: Path, option: str) -> str:
    """Of a file in the shipped folder, the option alone; else with its folder, short where that is possible."""
    folder = path.parent.parent
    if folder == conf_dir():
        return f"cluster={option}"
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    return f"--config-dir {shlex.quote(str(shown))} cluster={option}"
