"""What llmops does, as functions: the command line is a thin layer over these."""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops import backends
from llmops.backends.base import Look
from llmops.errors import ClusterError, UserError
from llmops.job import JobView
from llmops.runs import records
from llmops.runs.model import Run
from llmops.runs.store import Store, default_runs_url, open_store
from llmops.suggest import hint

if TYPE_CHECKING:  # what composes and submits is of no use to those who only look
    from llmops import launch

OVER = ("finished", "failed", "cancelled")
CANCEL_TIMEOUT_S = 60.0
SAVE_TIMEOUT_S = 600.0
LOST_S = 7 * 86400.0  # after that, a submission without a job is taken to have none


@dataclass(frozen=True)
class Status:
    """A run as it was read, with its state worked out."""

    run: Run
    state: str
    reason: str
    job: JobView | None


def prepare(
    overrides: Sequence[str] = (),
    *,
    backend: str | None = None,
    name: str | None = None,
    command: Sequence[str] = (),
    config_dir: Path | None = None,
    runs_url: str | None = None,
) -> launch.Prepared:
    """Compose, check and plan a run without writing anything. Raises :class:`UserError` for what cannot work."""
    from llmops import launch
    from llmops.config.compose import load_config

    return launch.prepare(load_config(all_overrides(overrides, backend, name, command), config_dir), runs_url)


def all_overrides(overrides: Sequence[str], backend: str | None, name: str | None, command: Sequence[str]) -> list[str]:
    """All that was asked for, as overrides."""
    from llmops import launch
    from llmops.config.overrides import assign

    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UserError("the current folder no longer exists; change to one that does") from error
    check_backend(backend)
    full = [f"cluster={backend}"] if backend else []
    full += overrides
    if name is not None:
        full.append(assign("name", launch.check_name(name)))
    if command:
        full.append(assign("command", list(command)))
    return full


def cluster_options(pairs: Sequence[str], backend: str | None) -> list[str]:
    """Overrides for ``key=value`` pairs of the cluster.

    With ``torchx``, those that are no keys of its own are options of the scheduler.
    """
    from llmops.config.overrides import assign
    from llmops.config.schema import TorchxCluster

    found = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key):
            raise UserError(f"-o {pair}: give it as KEY=VALUE, as -o scheduler=aws_batch")
        if backend != "torchx" or key.partition(".")[0] in TorchxCluster.__struct_fields__:
            found.append(f"cluster.{pair}")
        else:
            found.append(assign(f"cluster.options.{key}", value))
    return found


def check_backend(backend: str | None) -> None:
    """Raise :class:`UserError` for a ``--backend`` that there is not."""
    if backend is not None and backend not in backends.NAMES:
        raise UserError(
            f"--backend {backend}: choose one of {', '.join(backends.NAMES)}{hint(backend, backends.NAMES)}"
        )


def submit(prepared: launch.Prepared, objects: Mapping[str, bytes] | None = None) -> Run:
    """Submit a prepared run and return it as it stands in the run store. ``objects``: more that its job needs.

    With ``eval.every=commit`` also the run that evaluates its commits, ``NAME-eval``; raises :class:`UserError` where
    that one is refused though the training was not.
    """
    from llmops import launch
    from llmops.config.schema import trains

    if not trains(prepared.config) or prepared.config.eval.every == "never":
        return records.load_run(launch.start(prepared, objects))
    from llmops import evaluation

    companion = evaluation.companion(prepared.config, prepared.name)
    run = records.load_run(launch.start(prepared, objects))
    try:
        launch.start(launch.prepare(evaluation.follow(companion, run), prepared.runs.url))
    except (UserError, ClusterError) as error:
        again = f"llmops submit task=eval run={run.id} step=every follow=true"
        raise type(error)(f"{run.id} is submitted, but nothing evaluates it: {error}; `{again}` tries again") from error
    return run


def find(ref: str | None, runs_url: str | None = None) -> Run:
    """The run that ``ref`` means (name, id or unambiguous prefix); the newest one when it is None."""
    url = runs_url or default_runs_url()
    if ref is not None and records.is_study(url, ref):
        raise UserError(f"{ref} is a study of many runs: name one of its trials, as {ref}/0, or see `llmops sweep`")
    if ref is not None:
        return records.find_run(url, ref)
    runs = records.list_runs(url)
    if not runs:
        raise UserError(f"there are no runs in {url}; `llmops submit` starts one")
    return runs[-1]


def statuses(refs: Sequence[str] = (), runs_url: str | None = None) -> list[Status]:
    """The named runs, or all of them, with at most one query of each kind to each scheduler."""
    url = runs_url or default_runs_url()
    runs = [records.find_run(url, ref) for ref in refs] if refs else records.list_runs(url)
    return _statuses(runs)


def status(run: Run) -> Status:
    """One run's state, read anew."""
    return _statuses([records.load_run(run.store)])[0]


def _statuses(runs: Sequence[Run]) -> list[Status]:
    return survey(runs, {})[0]


def survey(runs: Sequence[Run], wanted: Mapping[str, Sequence[str]]) -> tuple[list[Status], dict[str, JobView]]:
    """States of runs, and views of jobs that are ``wanted`` besides, with one look at each scheduler.

    Runs that have ended are not asked about.
    """
    job_ids: dict[str, list[str]] = {name: list(each) for name, each in wanted.items()}
    tags: dict[str, list[str]] = {}
    named: dict[str, str] = {}  # job ids by tag
    for run in runs:
        if run.job_id and not over_for_good(run):
            job_ids.setdefault(run.scheduler, []).append(run.job_id)
        elif tag := _lost_tag(run):
            if expected := expected_job(run.store, run.submissions[-1].number):
                named[tag] = expected
                job_ids.setdefault(run.scheduler, []).append(expected)
            else:
                tags.setdefault(run.scheduler, []).append(tag)
    looks = {name: ask(name, job_ids.get(name, []), tags.get(name, [])) for name in {*job_ids, *tags}}
    found = []
    for run in runs:
        look = looks.get(run.scheduler)
        adopted = _adopt(run, {**look.found, **those_there(named, look)}) if look else run
        view = look.views.get(adopted.job_id) if look and adopted.job_id else None
        found.append(_status(adopted, view))
    return found, {job_id: view for look in looks.values() for job_id, view in look.views.items()}


def ask(name: str, job_ids: Sequence[str], tags: Sequence[str]) -> Look:
    """One look at the scheduler of backend ``name``; jobs of one that does not answer are ``unreachable``."""
    try:
        return backends.load(name).look(job_ids, tags)
    except (ClusterError, UserError) as error:
        if isinstance(error, UserError) and "@" not in name:
            raise
        # A machine without this scheduler's commands, or a login to them, still shows all other runs, and what the
        # store says of these.
        return Look({job_id: JobView(job_id, "unreachable", str(error)) for job_id in job_ids}, {})


def _status(run: Run, view: JobView | None) -> Status:
    from llmops.runs.state import derive_state, needs_second_look

    if needs_second_look(run, view):
        run = records.load_run(run.store)
    if view and view.images and run.submissions[-1].image is None:
        records.write_image(run.store, run.submissions[-1].number, view.images)
    state, reason = derive_state(run, view)
    return Status(run, state, reason, view)


def pod_logs(run: Run, tail: int | None, done: Callable[[], bool] | None) -> Iterator[str]:
    """Lines that the newest submission's pods have printed, supervisors included, from the Kubernetes API.

    ``tail``: the last so many of each pod; ``done``: also what they print from now on, until it says True.
    """
    if run.backend != "k8s" or run.job_id is None:
        raise UserError(f"--pods: {run.id} has no pods; leave it out")
    from llmops.backends.k8s import K8sBackend

    for line in K8sBackend().logs(run.job_id, tail, done):
        yield f"[{line.pod}] {line.text}"


def has_ended(run: Run) -> bool:
    """Whether the run store alone, read anew, says that the run is over; no scheduler is asked."""
    return over_for_good(records.load_run(run.store))


def over_for_good(run: Run) -> bool:
    """Whether the store alone says that the newest submission is over."""
    newest = run.newest
    return bool(
        newest
        and newest.end
        and newest.end.next == "end"
        and run.submissions
        and newest.start.submission == run.submissions[-1].number
    )


def _lost_tag(run: Run) -> str | None:
    """The tag to look for where the launcher died between submitting and writing the job id down."""
    newest = run.submissions[-1] if run.submissions else None
    if newest is None or newest.job_id or newest.failed or time.time() - newest.record.created > LOST_S:
        return None
    return newest.tag


def expected_job(store: Store, number: int) -> str | None:
    """The id of a submission's job, where jobs are named before they are made, as on Kubernetes."""
    from llmops import launch

    spec = launch.stored_spec(store, number) or {}
    job_id = spec.get("options", {}).get("job_id")
    return None if job_id is None else str(job_id)


def those_there(named: Mapping[str, str], look: Look) -> dict[str, str]:
    """Those of the expected jobs that the scheduler has."""
    states = {tag: look.views[job_id].state for tag, job_id in named.items() if job_id in look.views}
    return {tag: named[tag] for tag, state in states.items() if state not in ("gone", "unreachable")}


def _adopt(run: Run, found: Mapping[str, str]) -> Run:
    """Register the job that was found by its tag. The job itself may have been faster; then its word counts."""
    job_id = found.get(_lost_tag(run) or "")
    if job_id is None:
        return run
    try:
        records.register_job(run.store, run.submissions[-1].number, job_id, "launcher")
    except UserError:
        # One damaged run, or one of somebody else, must not hide all others.
        return run
    return records.load_run(run.store)


def cancel(run: Run, graceful: bool = False, wait: bool = True) -> Status:
    """End a run for good: the intent is recorded first, so that nothing can bring it back, then its job is told.

    ``wait``: until its job is gone, for :data:`CANCEL_TIMEOUT_S` or, where it saves first, :data:`SAVE_TIMEOUT_S`.
    """
    before = status(run)
    newest = before.run.submissions[-1] if before.run.submissions else None
    if before.state in OVER:
        return before
    if newest is None:
        raise UserError(f"{run.id} cannot be cancelled: {before.reason}")
    records.write_intent(before.run.store, newest.number, graceful, getpass.getuser())
    if before.run.job_id is None:
        return status(run)
    # A job that waits has nothing to save.
    graceful = graceful and before.state not in ("preempted", "pending")
    backends.load(newest.scheduler).cancel([before.run.job_id], graceful)
    deadline = time.monotonic() + (SAVE_TIMEOUT_S if graceful else CANCEL_TIMEOUT_S)
    pause = 0.1
    while True:
        now = status(run)
        alive = now.job is not None and now.job.state in ("pending", "running", "completing")
        if not wait or not (alive or now.state == "running") or time.monotonic() > deadline:
            return now
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def resume(
    run: Run, overrides: Sequence[str] = (), backend: str | None = None, config_dir: Path | None = None
) -> Run | None:
    """Go on from the last committed step with a new submission. None when the run has finished and nothing was changed.

    ``backend``: there instead of where it ran before, with the defaults of that cluster's group, which ``config_dir``
    may have too. Raises :class:`UserError` while the run is alive.
    """
    from llmops import launch
    from llmops.config.compose import group
    from llmops.config.recompose import recompose

    check_backend(backend)

    now = status(run)
    if now.state in ("running", "pending", "preempted"):
        raise UserError(f"{run.id} is {now.state}: there is nothing to resume; `llmops cancel` ends it")
    if now.state == "unknown" and now.job is not None and now.job.state == "unreachable":
        raise ClusterError(f"{run.id}: it is not known whether its job still lives ({now.reason}); try again later")
    newest = f"job/{records.next_submission(run.store) - 1:04d}/"
    damaged = [problem for problem in now.run.problems if problem.startswith(newest)]
    if now.state == "unknown" and damaged:
        raise UserError(f"{run.url}: {damaged[0]}; it is not known whether its job still lives, so it is not resumed")
    if now.state == "unknown" and now.run.job_id is None:
        # Its submission may have been accepted without an answer; only its scheduler knows.
        for submission in now.run.submissions[-1:]:
            if expected := expected_job(now.run.store, submission.number):
                view = backends.load(submission.scheduler).look([expected]).views[expected]
                if view.state == "unreachable":
                    what = "it is not known whether it has a job"
                    raise ClusterError(f"{run.id}: {what} ({view.reason}); try again later")
            else:
                backends.load(submission.scheduler).find(submission.tag)
    moved = backend is not None and backend != now.run.backend
    if now.state == "finished" and not overrides and not moved:
        return None
    record = now.run.record
    if record is None:
        raise UserError(f"{run.url}: {now.run.problems[0]}; it cannot be resumed")
    config_path, work_dir, study, python = "config.yaml", None, None, None
    for submission in reversed(now.run.submissions):
        config_path = submission.record.config
        spec = launch.stored_spec(now.run.store, submission.number)
        if spec:
            work_dir, study = spec.get("options", {}).get("work_dir"), spec.get("study")
            python = None if moved else spec.get("python")
            break
    try:
        text = now.run.store.get(config_path).decode()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UserError(f"{run.url}/{config_path} is missing or damaged ({error}); it cannot be resumed") from error
    cluster = group("cluster", backend, config_dir) if backend and moved else None
    composed = recompose(text, overrides, cluster)
    runs = open_store(records.root_of(now.run.url))
    # Of the first submission, also when that one never got as far as naming it.
    archive = f"{runs.job_url}/{records.archive_path(record.code.sha256)}" if record.code else None
    prepared = launch.prepare(composed, runs.url, again=True)
    number = records.next_submission(now.run.store)
    if overrides or moved:
        config_path = f"job/{number:04d}/config.yaml"
        now.run.store.create(config_path, composed.yaml_text.encode())
    again = launch.Prepared(**{**vars(prepared), "run_id": run.id, "name": record.name})
    origin = launch.Origin(archive, work_dir, study=study, python=python)
    launch.submit(again, now.run.store, number, config_path, origin)
    return records.load_run(now.run.store)


def describe(found: Sequence[Status]) -> list[dict[str, Any]]:
    """The stable JSON objects of ``llmops status --json``."""
    from llmops.monitor.describe import describe

    jobs = {item.run.job_id: item.job for item in found if item.job and item.run.job_id}
    return describe([item.run for item in found], jobs)


def detail(run: Run) -> dict[str, Any]:
    """All about one run, read anew: what :func:`describe` says, its timeline, goodput, curves and checkpoints."""
    from llmops.monitor.detail import detail as read

    now = status(run)
    return read(now.run, now.job, time.time())


def series(runs: Sequence[Run], points: int = 500) -> dict[str, dict[str, list[Any]]]:
    """Curves of runs, by id, each of at most ``points`` steps."""
    from llmops.monitor.detail import overlay

    return overlay(runs, points)


def difference(left: Run, right: Run) -> dict[str, Any]:
    """How two runs differ: the stable JSON object of ``llmops diff --json``."""
    from llmops.monitor.difference import difference as compare

    one, two = _statuses([records.load_run(run.store) for run in (left, right)])
    return compare((one.run, two.run), (one.job, two.job), time.time())
