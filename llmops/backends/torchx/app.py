"""A job as a TorchX ``AppDef``: one role, whose every replica runs our supervisor.

The app is kept as plain data, so that what was rendered is what is submitted.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops.agent.rundir import is_url
from llmops.config.schema import TorchxCluster
from llmops.errors import UserError
from llmops.job import JobSpec

if TYPE_CHECKING:
    from torchx.specs import AppDef

ROLE = "nodes"
UNSAID = -1  # as TorchX has it
# TorchX fills these in: a replica's number, and the name of the variable that holds the host of replica 0.
_REPLICA, _MAIN = "${replica_id}", "$${${rank0_env}:-}"


def command(spec: JobSpec, agent: Path | None) -> list[str]:
    """The supervisor. ``agent``: its file; where the run store is no folder, it is llmops itself."""
    program = [str(agent)] if agent else ["-m", "llmops.agent"]
    return [spec.python, *program, "torchx", "--run", spec.run_url, "--submission", str(spec.submission)]


def describe(cluster: TorchxCluster, name: str, run_url: str, words: Sequence[str]) -> dict[str, Any]:
    """The app called ``name`` as plain data; ``words``: what each replica runs, its own number aside."""
    line = " ".join(shlex.quote(word).replace("$", "$$") for word in words)
    mounts = list(cluster.mounts)
    if cluster.image is not None and not is_url(run_url):
        runs = Path(run_url).parent
        mounts.append(f"type=bind,src={runs},dst={runs}")
    return {
        "name": name,
        "role": {
            "name": ROLE,
            "image": cluster.image or "",
            "num_replicas": cluster.nodes,
            "max_retries": cluster.max_retries,
            "entrypoint": "/bin/sh",
            # A shell, since some schedulers give a replica its number as a variable.
            "args": ["-c", f'exec {line} --node {_REPLICA} --main "{_MAIN}"'],
            "env": {"PYTHONUNBUFFERED": "1"},
            "mounts": mounts,
        },
        "resource": _resource(cluster),
    }


def _resource(cluster: TorchxCluster) -> dict[str, Any]:
    if cluster.resource is not None:
        return {"h": cluster.resource}
    return {
        "cpu": cluster.cpus_per_node or UNSAID,
        "gpu": cluster.gpus_per_node or 0,
        "memMB": cluster.memory_mb or UNSAID,
    }


def app_def(plain: Mapping[str, Any]) -> AppDef:
    """The app that :func:`describe` describes. Raises :class:`UserError` for a mount or resource that there is not."""
    from torchx.specs import AppDef, Role, parse_mounts, resource

    role = copy.deepcopy(dict(plain["role"]))  # TorchX adds to what it is given
    try:
        mounts = parse_mounts([part for mount in role.pop("mounts") for part in mount.split(",")])
    except (ValueError, KeyError) as error:
        raise UserError(
            f"cluster.mounts: {' '.join(str(error).split())}; write one as type=bind,src=/a,dst=/b"
        ) from error
    try:
        needs = resource(**plain["resource"])
    except KeyError as error:
        raise UserError(
            f"cluster.resource={plain['resource'].get('h')}: TorchX has no resource of this name"
        ) from error
    return AppDef(name=plain["name"], roles=[Role(**role, mounts=mounts, resource=needs)])
