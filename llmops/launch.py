"""From a checked configuration to a job: what is written to the run directory, in which order, what is submitted.

The order makes a launcher that dies at any moment harmless: the run and its submission are recorded before the
scheduler is called, and whoever is first, launcher or job, registers the one job id that may run it.
"""

from __future__ import annotations

import json
import os
import secrets as random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from llm.data.precheck import check_sources
from llm.utils.config import ConfigError
from llmops import __version__, agent_zip, backends
from llmops.agent.rundir import is_url
from llmops.backends.base import Ambiguous, Backend, Rejected, Submission
from llmops.config import notify_rules
from llmops.config.compose import Composed
from llmops.config.schema import RunConfig, trains, warning_seconds
from llmops.config.schema import backend as backend_of
from llmops.errors import ClusterError, UserError
from llmops.job import Array, JobSpec, RetryPolicy, StopPolicy
from llmops.preparation import check_here
from llmops.runs import records
from llmops.runs.store import PosixStore, Store, default_runs_url, open_store

MAX_NAME = 100


@dataclass(frozen=True)
class Prepared:
    """A run that could be submitted: nothing is written yet."""

    composed: Composed
    backend: Backend
    run_id: str
    name: str
    runs: Store
    owner: str
    host: str
    created: float
    cloned_from: str | None = None  # id of a run
    code: records.Code | None = None  # a snapshot that is in the store already; else one is taken
    login: str | None = None  # the host on which the scheduler is asked, over SSH; None for this machine

    @property
    def config(self) -> RunConfig:
        """The typed configuration."""
        return self.composed.config

    @property
    def run_url(self) -> str:
        """The run's directory, as its jobs open it: an absolute path or a URL."""
        return f"{self.runs.job_url}/{records.path_of(self.run_id)}"


def prepare(composed: Composed, runs_url: str | None, again: bool = False) -> Prepared:
    """Choose the run's name, id and place, and ask the backend whether it can run at all.

    ``again``: of a run that is there already, which may be resumed elsewhere than where it was submitted.
    """
    config = composed.config
    if config.hardware is not None:
        from llmops.plan import check_fits

        check_fits(config)
    check_here(config)
    if trains(config):
        try:
            check_sources(config)
        except ConfigError as error:
            raise UserError(str(error)) from error
    runs, login = place(config, runs_url, again)
    if config.task in ("eval", "serve"):
        from llmops.evaluation import resolve

        composed = resolve(composed, runs)
        config = composed.config
    name = check_name(config.name or _default_name(config))
    backend = backends.load(f"{backend_of(config)}@{login}" if login else backend_of(config))
    backend.check(config.cluster, f"{runs.job_url}/run")
    for secret in () if backend.own_image else config.secrets:  # there the cluster has their values
        if secret not in os.environ:
            raise UserError(f"secrets: {secret} is not set in this environment; export it, or remove it from secrets")
    if not backend.own_image:
        notify_rules.check_values(config.notify)
    now = time.time()
    owner, host = records.whoami()
    return Prepared(composed, backend, records.new_run_id(name, now), name, runs, owner, host, now, login=login)


def place(config: RunConfig, runs_url: str | None, again: bool) -> tuple[Store, str | None]:
    """Where runs live, and the host on which their scheduler is asked. Raises UserError where they do not fit."""
    name, host = backend_of(config), getattr(config.cluster, "host", None)
    url = runs_url or config.runs_url or os.environ.get("LLMOPS_RUNS_URL")
    if not url:
        if name != "local":
            where = (
                f"ssh://{host}/FOLDER, a folder there that every node reaches,"
                if host
                else ("a folder on a shared file system")
            )
            raise UserError(
                f"runs_url is not set, and the {name} backend has no default that every node could reach: "
                f"set runs_url=, --runs-url or LLMOPS_RUNS_URL to {where} or an object store"
            )
        url = default_runs_url()
    runs = open_store(url)
    if runs.url.startswith("memory://"):
        raise UserError(f"runs_url={url}: no job can reach the memory of this process; give a path or an object store")
    if runs.login is not None and name != "slurm":
        raise UserError(f"runs_url={url}: jobs of the {name} backend cannot reach it; give a path or an object store")
    if runs.login is not None and host not in (None, runs.login) and not again:
        raise UserError(f"cluster.host={host} and runs_url={url} name different hosts: leave cluster.host out")
    if runs.local_path is not None and host is not None:
        if not again:
            raise UserError(
                f"cluster.host={host}, and runs_url={runs.url} is a folder of this machine: give one of that host, as "
                f"in runs_url=ssh://{host}{runs.url}, or an object store"
            )
        host = None  # resumed on the cluster itself
    return runs, runs.login or host


def _default_name(config: RunConfig) -> str:
    if config.command:
        return Path(config.command[0]).name
    return config.model.name if trains(config) else config.task


def check_name(name: str) -> str:
    """A name that people can read in a table and that no terminal takes for a command."""
    if not name.strip() or not name.isprintable():
        raise UserError(f"name={name!r}: use printable characters, at least one of them no blank")
    if len(name) > MAX_NAME:
        raise UserError(f"name={name[:20]}…: {len(name)} characters are too many; {MAX_NAME} at most")
    return name


@dataclass(frozen=True)
class Origin:
    """Where a submission's code is, and what it belongs to."""

    archive: str | None = None  # of the code snapshot
    work_dir: str | None = None  # where the program runs without an archive; by default the current folder
    trials: Sequence[int] = ()  # of a study, which this submission is an array of
    parallel: int | None = None  # of these at a time
    study: dict[str, Any] | None = None  # whose trial this run is
    python: str | None = None  # of the submission before, where this machine cannot know what the nodes have


def interpreter(prepared: Prepared, before: str | None = None) -> str:
    """The Python that the job runs. ``before``: that of the submission before, as :class:`Origin` has it."""
    container = getattr(prepared.config.cluster, "container", None)
    # This interpreter's path means nothing inside somebody's image, or on another host.
    outside = not (prepared.backend.own_image or prepared.login) and (container is None or container.runtime == "none")
    known = before if prepared.login else None
    return prepared.config.cluster.python or known or (sys.executable if outside else "python3")


def job_spec(prepared: Prepared, submission: int, tag: str, config_path: str, origin: Origin) -> JobSpec:
    """What the supervisor will run."""
    config = prepared.config
    python = interpreter(prepared, origin.python)
    programs = {"train": "llm.train", "eval": "llm.eval", "serve": "llm.inference.server"}
    program = programs.get(config.task, f"llm.tools.{config.task}")
    built_in = [python, "-m", program, "--config", f"{prepared.run_url}/{config_path}"]
    values = {
        "runs_url": prepared.runs.job_url,
        "run_id": prepared.run_id,
        "tag": tag,
        "warning_s": warning_seconds(config),
        "save_s": config.checkpoint.save_seconds,
        "trials": len(origin.trials),
    }
    options = prepared.backend.options(config.cluster, values)
    if not prepared.backend.own_image:
        if hidden_names(config):
            store, name = secrets_file(prepared, submission)
            options["secrets_file"] = f"{store.job_url}/{name}"
        if origin.archive is None:
            here = open_store(f"ssh://{prepared.login}/~").job_url if prepared.login else str(Path.cwd())
            options["work_dir"] = origin.work_dir or here
    return JobSpec(
        run_id=prepared.run_id,
        name=prepared.name,
        submission=submission,
        tag=tag,
        backend=prepared.backend.name,
        run_url=prepared.run_url,
        nodes=config.cluster.nodes,
        ranks_per_node=config.cluster.ranks_per_node,
        command=config.command or built_in,
        kind="llm" if trains(config) else "command",
        python=python,
        env=dict(config.env),
        secrets=list(config.secrets),
        threads_per_rank=config.train.threads_per_rank,
        code_archive=origin.archive,
        retry=RetryPolicy(
            max_no_progress=config.retry.max_no_progress,
            max_failures=config.retry.max_failures,
            backoff_s=config.retry.backoff_s,
            backoff_max_s=config.retry.backoff_max_s,
        ),
        stop=StopPolicy(
            save_s=config.checkpoint.save_seconds,
            local_grace_s=config.stop.local_grace_s,
            signal=config.stop.signal or ("SIGTERM" if config.command else None),
            hang_s=config.stop.hang_s,
        ),
        options=options,
        array=Array(records.pack(origin.trials), len(origin.trials), origin.parallel) if origin.trials else None,
        metrics=msgspec.to_builtins(config.metrics),
        notify=msgspec.to_builtins(config.notify),
        study=origin.study,
    )


def agent_path(prepared: Prepared) -> Path | None:
    """Where the supervisor lies in a run store that is a folder. With others it travels inside the job."""
    folder = prepared.runs.job_url
    return None if is_url(folder) else Path(folder, "agent", agent_zip.build()[0])


def hidden_names(config: RunConfig) -> list[str]:
    """Variables whose values travel in a file of their own: the ranks' secrets, and what notifications need."""
    return list(dict.fromkeys([*config.secrets, *notify_rules.secret_names(config.notify)]))


def secrets_file(prepared: Prepared, submission: int) -> tuple[Store, str]:
    """Where the values of secrets are: beside the submission, or in the user's home where the store is no folder."""
    if not is_url(prepared.run_url):
        return prepared.runs.sub(f"{records.path_of(prepared.run_id)}/job/{submission:04d}"), "secrets.json"
    name = f"{prepared.run_id}.{submission}.json"
    if prepared.login is not None:
        return open_store(f"ssh://{prepared.login}/~/.local/share/llmops/secrets"), name
    import platformdirs

    return PosixStore(Path(platformdirs.user_data_dir("llmops", appauthor=False), "secrets")), name


def new_tag(run_id: str, submission: int) -> str:
    """A job name that no other submission has, ever: what a submission without an answer is looked up by."""
    return f"{run_id}.{submission}.{random.token_hex(4)}"


def dry_run(prepared: Prepared) -> str:
    """Exactly what would be submitted, but for the random parts of its names."""
    spec = job_spec(prepared, 0, new_tag(prepared.run_id, 0), "config.yaml", dry_origin(prepared))
    return prepared.backend.render(prepared.config.cluster, spec, agent_path(prepared))


def dry_origin(prepared: Prepared) -> Origin:
    """Of a submission whose snapshot is not taken."""
    if prepared.code is not None:
        return Origin(f"{prepared.runs.job_url}/{records.archive_path(prepared.code.sha256)}")
    return Origin(f"{prepared.runs.job_url}/code/SNAPSHOT.tar.gz" if prepared.config.code.enabled else None)


def snapshot(prepared: Prepared) -> tuple[records.Code | None, str | None]:
    """Store the code that the run will use; what to record of it, and where it is. None where it is switched off."""
    config = prepared.config.code
    if prepared.code is not None:
        return prepared.code, f"{prepared.runs.job_url}/{records.archive_path(prepared.code.sha256)}"
    if not config.enabled:
        return None, None
    from llmops import code

    taken = code.snapshot(Path(config.root) if config.root else None, prepared.runs.url, config.max_mb, config.exclude)
    return records.Code(taken.sha256, taken.git_commit, taken.dirty), str(taken.archive)


def start(prepared: Prepared, objects: Mapping[str, bytes] | None = None) -> Store:
    """Write the run, with further ``objects`` that its job needs, and submit its first job. Returns the run's store."""
    config = prepared.config
    code, archive = snapshot(prepared)
    record = records.RunRecord(
        id=prepared.run_id,
        name=prepared.name,
        owner=prepared.owner,
        host=prepared.host,
        created=prepared.created,
        backend=prepared.backend.name,
        kind="llm" if trains(config) else "command",
        command=list(config.command),
        nodes=config.cluster.nodes,
        ranks_per_node=config.cluster.ranks_per_node,
        max_steps=config.train.max_steps if trains(config) else None,
        code=code,
        cloned_from=prepared.cloned_from,
        version=__version__,
    )
    run = records.create_run(prepared.runs.url, record, prepared.composed.yaml_text.encode())
    write_objects(run, objects or {})
    submit(prepared, run, 0, "config.yaml", Origin(archive))
    return run


def write_objects(store: Store, objects: Mapping[str, bytes]) -> None:
    """Put objects that are nobody else's business into the directory of a new run or study."""
    records.each(store, list(objects), lambda path: store.create(path, objects[path], mode=0o600))


def submit(prepared: Prepared, run: Store, number: int, config_path: str, origin: Origin) -> None:
    """Record submission ``number`` and hand it to the scheduler.

    Raises :class:`UserError` when the scheduler refused it, and :class:`ClusterError` when it is not known whether it
    took it.
    """
    tag = new_tag(prepared.run_id, number)
    record = records.SubmissionRecord(
        number=number,
        tag=tag,
        backend=prepared.backend.name,
        created=time.time(),
        config=config_path,
        trials=records.pack(origin.trials),
        login=prepared.login if prepared.runs.login is None else None,
    )
    spec = job_spec(prepared, number, tag, config_path, origin)
    agent = agent_path(prepared)
    text = prepared.backend.render(prepared.config.cluster, spec, agent)
    if agent is not None and not prepared.runs.exists(f"agent/{agent.name}"):
        prepared.runs.create(f"agent/{agent.name}", agent_zip.build()[1])
    if not records.write_submission(run, record):
        raise UserError(f"{prepared.run_id} is being resumed by somebody else just now; see `llmops status`")
    job = run.sub(f"job/{number:04d}")
    hidden = hidden_names(prepared.config)
    if hidden and "secrets_file" in spec.options:
        values = {name: os.environ[name] for name in hidden}
        store, name = secrets_file(prepared, number)
        store.create(name, json.dumps(values).encode(), mode=0o600)
    job.create(prepared.backend.text_name, text.encode())
    # The last object before the call: a submission without it was never sent.
    job.create("spec.json", json.dumps(spec.to_json(), indent=1, sort_keys=True).encode())
    try:
        job_id = prepared.backend.submit(Submission(spec, agent, text, hidden_env=hidden))
    except Rejected as error:
        records.write_failed(run, number, str(error))
        raise UserError(f"{prepared.backend.name} refused the job: {error}") from error
    except Ambiguous as error:
        raise ClusterError(
            f"{prepared.backend.name} did not answer ({error}), so it is not known whether it took the job; do not "
            f"submit again: `llmops status {prepared.run_id}` finds it if it did, and `llmops resume "
            f"{prepared.run_id}` sends it again if it did not"
        ) from error
    records.register_job(run, number, job_id, "launcher")


def stored_spec(run: Store, number: int) -> dict[str, Any] | None:
    """The spec of a submission, or None when it was never sent, or is damaged."""
    try:
        value = json.loads(run.get(f"job/{number:04d}/spec.json"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None
