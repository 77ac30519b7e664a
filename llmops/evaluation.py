"""Runs that evaluate (``task=eval``) or serve (``task=serve``) another run, and those that go along with a training
(``eval.every=commit``)."""

from __future__ import annotations

from typing import Any

import msgspec

from llm.checkpoint.format import CheckpointError
from llm.eval.watch import select
from llm.utils.config import ConfigError, DistConfig
from llmops.config import rules
from llmops.config.compose import Composed, to_yaml
from llmops.config.schema import K8sCluster, LocalCluster, RunConfig, SlurmCluster
from llmops.errors import ClusterError, UserError
from llmops.runs import records
from llmops.runs.ssh_storage import open_storage
from llmops.runs.store import Store, open_store

SUFFIX = "-eval"  # of the name of a run that evaluates another


def resolve(composed: Composed, runs: Store) -> Composed:
    """With ``run`` as the URL of what it means, and a name. Raises UserError where there is no checkpoint.

    ``run`` is a name or an id among ``runs``, or the path or URL of a run's directory.
    """
    config = composed.config
    assert config.run is not None  # as the rules want it
    if "://" in config.run or config.run.startswith("/"):
        there = f"ssh://{runs.login}{config.run}" if runs.login and config.run.startswith("/") else config.run
        found = records.load_run(open_store(there))
        if not found.store.exists("config.yaml"):
            raise UserError(f"run={config.run}: there is no run; give its name, its id, or its folder or URL")
    else:
        found = records.find_run(runs.url, config.run)
    if found.record is not None and found.record.kind != "llm":
        raise UserError(f"run={config.run}: {found.id} is no run of the built-in trainer, so it has no checkpoints")
    if not config.follow:
        try:
            select(open_storage(found.store), "newest" if config.step == "every" else config.step)
        except ConfigError as error:
            raise UserError(f"run={config.run}: {error}") from error
        except CheckpointError as error:
            raise UserError(f"run={config.run}: {error}; `llmops ckpt verify {found.id}` looks closer") from error
        except OSError as error:
            raise ClusterError(f"run={config.run}: {error}") from error
    name = config.name or _name(found.name, f"-{config.task}")
    return _composed(msgspec.structs.replace(config, run=found.store.job_url, name=name))


def companion(config: RunConfig, name: str) -> RunConfig:
    """What evaluates each commit of the training called ``name``, but for its ``run``.

    Raises UserError for what cannot run.
    """
    found = msgspec.structs.replace(
        config,
        task="eval",
        run="its training",
        step="every",
        follow=True,
        name=_name(name),
        cluster=_one_node(config.cluster, config.eval.ranks),
        dist=DistConfig(backend=config.dist.backend, timeout_s=config.dist.timeout_s),
        eval=msgspec.structs.replace(config.eval, every="never"),
    )
    try:
        rules.check(found)
    except UserError as error:
        raise UserError(f"eval.every=commit: the run that would evaluate: {error}") from error
    return found


def follow(config: RunConfig, run: records.Run) -> Composed:
    """The configuration of a :func:`companion` now that its training, ``run``, is submitted."""
    cluster = config.cluster
    if isinstance(cluster, SlurmCluster) and run.job_id:
        # It would hold its node while the training is still in the queue.
        after = ",".join(filter(None, (cluster.dependency, f"after:{run.job_id}")))
        cluster = msgspec.structs.replace(cluster, dependency=after)
    return _composed(msgspec.structs.replace(config, run=run.store.job_url, cluster=cluster))


def _one_node(cluster: Any, ranks: int) -> LocalCluster | SlurmCluster | K8sCluster:
    changed: dict[str, Any] = {"nodes": 1, "ranks_per_node": ranks}
    if getattr(cluster, "gpus_per_node", None):
        changed["gpus_per_node"] = min(ranks, cluster.gpus_per_node)
    found: LocalCluster | SlurmCluster | K8sCluster = msgspec.structs.replace(cluster, **changed)
    return found


def _name(name: str, suffix: str = SUFFIX) -> str:
    return name[: 100 - len(suffix)] + suffix


def _composed(config: RunConfig) -> Composed:
    data = msgspec.to_builtins(config)
    return Composed(config, to_yaml(data), data)
