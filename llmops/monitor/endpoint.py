"""Where a run that serves a model (``task=serve``) can be reached: its server writes down where it listens."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

from llmops.errors import UserError
from llmops.runs.model import Run

FILE = "endpoint.json"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def endpoint(run: Run) -> dict[str, Any] | None:
    """The address, and the command that brings it here where it needs one; None for a run that has not served.

    Raises UserError for a file that cannot be read.
    """
    try:
        found = json.loads(run.store.get(FILE))
        host, port, node, model = str(found["host"]), int(found["port"]), str(found["node"]), str(found["model"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{FILE} cannot be read: {' '.join(str(error).split())}") from error
    near = f"http://127.0.0.1:{port}/v1"
    if run.backend == "k8s":
        return {"url": near, "model": model, "command": f"kubectl {_where(run)}port-forward pod/{node} {port}"}
    if host not in LOOPBACK:
        there = node if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104 - compared alone
        return {"url": f"http://{there}:{port}/v1", "model": model, "command": None}
    login = run.submissions[-1].login if run.submissions else None
    jump = f"-J {login} " if login else ""
    tunnel = f"ssh -N {jump}-L {port}:{host}:{port} {node}" if run.backend == "slurm" else None
    return {"url": near, "model": model, "command": tunnel}


def _where(run: Run) -> str:
    """The context and namespace that the job's id names."""
    if not run.job_id or run.job_id.count("/") < 3:
        return ""
    context, namespace = run.job_id.split("/")[:2]
    named = unquote(context.partition("?")[0])
    return (f"--context {named} " if named else "") + f"-n {namespace} "
