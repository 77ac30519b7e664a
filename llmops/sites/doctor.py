"""Which checks there are, for the backends that are asked about or seem to be here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from llmops import backends
from llmops.config import compose
from llmops.config.overrides import assign, key_of
from llmops.config.schema import K8sCluster, RunConfig, SlurmCluster
from llmops.errors import UserError
from llmops.runs.store import default_runs_url, open_store
from llmops.sites import checks, machine, slurm_checks, stores
from llmops.sites.checks import Check, Probe

Tell = Callable[[int, int, Sequence[str]], None]


def examine(
    overrides: Sequence[str],
    config_dir: Path | None,
    backend: str | None,
    runs_url: str | None,
    timeout: float,
    tell: Tell = lambda done, total, waiting: None,
) -> list[Check]:
    """All checks for a run of this configuration. ``timeout``: seconds for each. ``tell``: see :func:`checks.run`.

    Raises :class:`UserError` for a configuration that cannot be composed.
    """
    asked = backend is not None or any(key_of(each) == "cluster" for each in overrides)
    configs = {name: _config(overrides, config_dir, name) for name in _backends(overrides, config_dir, backend)}
    probes = [
        Probe(machine.SECTION, "python", machine.python),
        Probe(machine.SECTION, "torch", lambda: machine.gpus(timeout)),
    ]
    for name, config in configs.items():
        probes += _PROBES[name](config, timeout)
    probes += _stores(configs, runs_url, asked)
    return checks.run(probes, timeout, lambda done, waiting: tell(done, len(probes), waiting))


def _backends(overrides: Sequence[str], config_dir: Path | None, backend: str | None) -> list[str]:
    """Those that are asked for; else this machine, and what seems to be here."""
    if backend is not None and backend not in backends.NAMES:
        raise UserError(f"--backend {backend}: choose one of {', '.join(backends.NAMES)}")
    chosen = [each.partition("=")[2] for each in overrides if key_of(each) == "cluster"]
    if chosen:
        named = str(compose.group("cluster", chosen[-1], config_dir)["backend"])
        if backend not in (None, named):
            raise UserError(f"--backend {backend}: cluster={chosen[-1]} is for {named}; leave one of them out")
        return [named]
    if backend is not None:
        return [backend]
    return ["local", *(["slurm"] if _slurm_here() else []), *(["k8s"] if kubernetes_here() else [])]


def _config(overrides: Sequence[str], config_dir: Path | None, backend: str) -> RunConfig:
    own = [] if any(key_of(each) == "cluster" for each in overrides) else [f"cluster={backend}"]
    image = [assign("cluster.image", "none")] if backend == "k8s" else []
    # A program of one's own: whether a model's layout fits these ranks is not what is asked.
    program = assign("command", ["true"])
    return compose.load_config([*own, *overrides, *image, program], config_dir).config


def _slurm_here() -> bool:
    return any(shutil.which(name) for name in ("sbatch", "scontrol"))


def kubernetes_here() -> bool:
    """Is there a kubeconfig, or are we in a pod?"""
    files = (os.environ.get("KUBECONFIG") or "~/.kube/config").split(os.pathsep)
    try:
        there = any(Path(file).expanduser().is_file() for file in files if file)
    except RuntimeError:  # no home directory
        there = False
    return there or bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


def _local(config: RunConfig, timeout: float) -> list[Probe]:
    return [Probe("local", "local", machine.local)]


def _slurm(config: RunConfig, timeout: float) -> list[Probe]:
    cluster, save_s, name = config.cluster, config.checkpoint.save_seconds, slurm_checks.SECTION
    assert isinstance(cluster, SlurmCluster)
    if cluster.host is not None:
        raise UserError(f"cluster.host={cluster.host}: the doctor looks at its own machine; run it on that host")
    probes = [Probe(name, "commands", slurm_checks.commands)]
    if not _slurm_here():
        return probes  # the others would only say the same
    return [
        *probes,
        Probe(name, "controller", lambda: slurm_checks.controller(timeout, save_s)),
        Probe(name, "accounting", lambda: slurm_checks.accounting(timeout)),
        Probe(name, "test submission", lambda: slurm_checks.submission(timeout, cluster)),
    ]


def _k8s(config: RunConfig, timeout: float) -> list[Probe]:
    from llmops.sites import k8s_checks

    cluster, save_s, name = config.cluster, config.checkpoint.save_seconds, k8s_checks.SECTION
    assert isinstance(cluster, K8sCluster)
    absent = machine.lacks("k8s")
    if absent:
        remedy = "pip install 'llmops[k8s]'"
        missing = Check(name, "client", "fail", f"not installed: {', '.join(absent)}", remedy)
        return [Probe(name, "client", lambda: [missing])]
    return [
        Probe(name, "API server", lambda: k8s_checks.server(cluster)),
        Probe(name, "rights", lambda: k8s_checks.rights(cluster)),
        Probe(name, "queues", lambda: k8s_checks.surroundings(cluster, save_s)),
    ]


_PROBES: dict[str, Callable[[RunConfig, float], list[Probe]]] = {"local": _local, "slurm": _slurm, "k8s": _k8s}


def _stores(configs: dict[str, RunConfig], runs_url: str | None, asked: bool) -> list[Probe]:
    """A round trip for each place where runs would be, and whether the jobs of each backend reach it."""
    probes, urls = list[Probe](), dict[str, None]()
    for backend, config in configs.items():
        url = runs_url or config.runs_url or os.environ.get("LLMOPS_RUNS_URL")
        if url:
            urls[url] = None
            if backend != "local":
                probes.append(_reach(backend, config, url))
        elif backend == "local":
            urls[default_runs_url()] = None
        else:
            unset = stores.no_store(backend, asked)
            probes.append(Probe(stores.SECTION, unset.name, lambda unset=unset: [unset]))  # type: ignore[misc]
    return [*map(_trip, urls), *probes]


def _trip(url: str) -> Probe:
    if "://" in url:
        remedy = f"check {url}: the network, and the credentials and endpoint of this store (AWS_*)"
    else:
        remedy = f"check that the file server of {url} answers: ls {url}"
    return Probe(stores.SECTION, "round trip", lambda: stores.check(url), remedy)


def _reach(backend: str, config: RunConfig, url: str) -> Probe:
    name = f"reached from {backend}"

    def ask() -> list[Check]:
        store = open_store(url)
        if store.url.startswith("memory://"):
            found, remedy = "no job can reach the memory of this process", "give a path or an object store"
            return [Check(stores.SECTION, name, "fail", found, remedy)]
        backends.load(backend).check(config.cluster, f"{store.url}/run")
        shared = (
            "its nodes share this folder, as far as the kind of file system tells"
            if store.local_path
            else ("an object store; whether the nodes have its credentials and route is for the first run to show")
        )
        return [Check(stores.SECTION, name, "ok", shared)]

    return Probe(stores.SECTION, name, ask)
