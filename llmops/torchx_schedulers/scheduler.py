"""The scheduler that TorchX's command line and runner talk to: a thin layer over :mod:`llmops.api`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Dict, List  # noqa: UP035  (see AS_TORCHX)

from torchx.runner import config as torchxconfig
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler, Stream
from torchx.specs import NONE, AppDef, AppDryRunInfo, AppState, ReplicaStatus, RoleStatus, runopts
from torchx.specs.finder import ComponentValidationException

from llmops import api, launch
from llmops.errors import ClusterError, UserError
from llmops.overview import overview
from llmops.runs.model import Run
from llmops.torchx_schedulers.app import options, prepare, role_of

STATES = {
    "pending": AppState.PENDING,
    "running": AppState.RUNNING,
    "preempted": AppState.PENDING,  # as TorchX calls an app that waits to run again
    "finished": AppState.SUCCEEDED,
    "failed": AppState.FAILED,
    "cancelled": AppState.CANCELLED,
    "unknown": AppState.UNKNOWN,
}
# TorchX compares an option's type with these, which are not equal to the builtin ones.
AS_TORCHX: dict[Any, Any] = {dict[str, str]: Dict[str, str], list[str]: List[str]}  # noqa: UP006


class Refused(ComponentValidationException):
    """What cannot work. Of this kind, ``torchx run`` shows the message alone, and exits with 1."""


class LlmopsScheduler(Scheduler[Mapping[str, Any]]):
    """One of our backends. An app's id is its run's, and all that is known of it is in the run store."""

    def __init__(self, backend: str, session_name: str) -> None:
        super().__init__(f"llmops_{backend}", session_name)
        self.target = backend

    def _run_opts(self) -> runopts:
        opts = runopts()
        opts.add("runs_url", type_=str, help="folder or URL of all runs (default: LLMOPS_RUNS_URL)")
        opts.add("cluster", type_=str, help=f"a configuration of the cluster (default: {self.target})")
        opts.add("config_dir", type_=str, help="a folder with configurations of your own")
        opts.add(
            "set",
            type_=AS_TORCHX[dict[str, str]],
            help="any key of the configuration, as code.enabled:false;stop.hang_s:60",
        )
        for name, kind in options(self.target):
            opts.add(name, type_=AS_TORCHX.get(kind, kind), help=f"cluster.{name}")
        return opts

    def _validate(self, app: AppDef, scheduler: str) -> None:
        """What there is to check is checked when the run is composed; a resource may be left to the cluster."""

    def _submit_dryrun(self, app: AppDef, cfg: Mapping[str, Any]) -> AppDryRunInfo[launch.Prepared]:
        known = dict(self.run_opts())
        if unknown := sorted(set(cfg) - set(known)):  # TorchX's own command line drops them before
            raise Refused(f"{self.backend} has no option {unknown[0]}; see `torchx runopts {self.backend}`")
        try:
            return AppDryRunInfo(prepare(self.target, app, cfg), launch.dry_run)
        except (UserError, ClusterError) as error:
            raise Refused(str(error)) from error

    def schedule(self, dryrun_info: AppDryRunInfo[launch.Prepared]) -> str:
        """Write the run, and submit its job."""
        try:
            return api.submit(dryrun_info.request).id
        except (UserError, ClusterError) as error:
            raise Refused(str(error)) from error

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Its state as ``llmops status`` has it; None for a run that is not there, or on another backend now."""
        run = self._find(app_id)
        if run is None:
            return None
        now = api.status(run)
        role, state = role_of(now.run), STATES[now.state]
        return DescribeAppResponse(
            app_id=app_id,
            state=state,
            num_restarts=max(len(now.run.attempts) - 1, 0),
            msg=now.reason or NONE,
            ui_url=now.run.url,
            roles=[role],
            roles_statuses=[RoleStatus(role.name, list(_replicas(now.run, role.name, role.num_replicas, state)))],
        )

    def list(self) -> list[ListAppResponse]:
        """All runs of this backend in the store."""
        rows = overview(runs_url=_runs_url(self.backend)).rows
        return [
            ListAppResponse(app_id=row["id"], state=STATES.get(row["state"], AppState.UNKNOWN))
            for row in rows
            if row["backend"] == self.target and "trials" not in row
        ]

    def _cancel_existing(self, app_id: str) -> None:
        run = self._find(app_id)
        if run is not None:
            api.cancel(run, wait=False)

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """Lines of the ranks on node ``k``, over all attempts. Output and errors are one stream."""
        if streams not in (None, Stream.COMBINED):
            raise ValueError(f"streams={streams.value}: a run keeps output and errors together; use combined")
        run = self._find(app_id)
        if run is None:
            raise ValueError(f"there is no app {app_id}")
        return _lines(run, k, regex, since, until, should_tail)

    def _find(self, app_id: str) -> Run | None:
        try:
            run = api.find(app_id, _runs_url(self.backend))
        except UserError:
            return None
        return run if run.id == app_id and run.backend == self.target else None


def _runs_url(scheduler: str) -> str | None:
    """A handle says nothing of the store: it is the one of ``.torchxconfig``, else llmops' own default."""
    cfg: dict[str, Any] = {}
    torchxconfig.apply(scheduler, cfg)
    return cfg.get("runs_url")


def _replicas(run: Run, role: str, count: int, state: AppState) -> Iterator[ReplicaStatus]:
    newest = run.newest
    hosts = newest.start.hosts if newest else []
    end = newest.end if newest and state == AppState.FAILED else None
    for number in range(count):
        host = hosts[number] if number < len(hosts) else ""
        failed = end is not None and end.error is not None and end.failed_host in (None, host)
        error = NONE
        if end is not None and failed:
            code = (end.exit_codes or {}).get(str(end.failed_rank))
            about = {"timestamp": int(end.time)}
            error = json.dumps({"message": {"message": end.error, "errorCode": code, "extraInfo": about}})
        yield ReplicaStatus(id=number, state=state, role=role, hostname=host, structured_error_msg=error)


def _lines(
    run: Run, node: int, regex: str | None, since: datetime | None, until: datetime | None, follow: bool
) -> Iterator[str]:
    from llmops.monitor import logs

    per_node = run.record.ranks_per_node if run.record else 1
    wanted = logs.Selection(
        range(node * per_node, (node + 1) * per_node),
        since=since.timestamp() if since else None,
        pattern=re.compile(regex) if regex else None,
    )
    last = until.timestamp() if until else None
    found = logs.follow(run, lambda: _over(run), n=None, wanted=wanted) if follow else logs.tail(run, wanted=wanted)
    for line in found:
        if last is None or line.time is None or line.time <= last:
            yield f"{line.text}\n"


def _over(run: Run) -> bool:
    return api.has_ended(run) or api.status(run).state in api.OVER
