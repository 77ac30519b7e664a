"""Reads and writes run directories. The only module of the launcher that knows their paths.

Readers never fail on one run: what is missing or damaged ends up in ``Run.problems``.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from llm.utils.structs import ready
from llmops import __version__
from llmops.errors import UserError
from llmops.runs import ids
from llmops.runs.model import (
    FORMAT,
    Attempt,
    AttemptEnd,
    AttemptStart,
    Code,
    Failed,
    Image,
    Intent,
    JobRecord,
    Run,
    RunRecord,
    Stop,
    Submission,
    SubmissionRecord,
)
from llmops.runs.store import Store, open_store
from llmops.suggest import hint

__all__ = [
    "Attempt",
    "AttemptEnd",
    "AttemptStart",
    "Code",
    "Failed",
    "Intent",
    "JobRecord",
    "Run",
    "RunRecord",
    "Stop",
    "Submission",
    "SubmissionRecord",
    "create_run",
    "each",
    "encode",
    "find_run",
    "find_study",
    "is_study",
    "list_ids",
    "list_runs",
    "list_studies",
    "list_trials",
    "load_run",
    "load_runs",
    "marks",
    "new_run_id",
    "next_submission",
    "pack",
    "path_of",
    "read_many",
    "register_job",
    "root_of",
    "study_id",
    "trial_id",
    "unpack",
    "whoami",
    "write_failed",
    "write_image",
    "write_intent",
    "write_run",
    "write_submission",
]

MARKS = "resumed"
_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_NUMBER = re.compile(r"\d{4,}")


# Writing


def new_run_id(name: str, now: float) -> str:
    """``20260131-235959-my-name-k3x7`` in UTC; ids of one name sort by time."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "run"
    token = "".join(secrets.choice(_BASE32) for _ in range(4))
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{slug}-{token}"


def study_id(run_id: str) -> str:
    """The id of a study, out of one that a run would have."""
    return f"{run_id}-sweep"


def trial_id(study: str, trial: int) -> str:
    """The run id of a trial."""
    return f"{study}.{trial:04d}"


def path_of(run_id: str) -> str:
    """Where a run lies below the folder of all runs; a trial is inside its study."""
    found = ids.TRIAL.fullmatch(run_id)
    return f"{found[1]}/trials/{run_id}" if found else run_id


def root_of(run_url: str) -> str:
    """The folder of all runs that a run, a study or a trial is in."""
    return run_url.removesuffix(path_of(run_url.rsplit("/", 1)[-1])).rstrip("/")


def archive_path(sha256: str) -> str:
    """Where a code snapshot with this digest lies in the folder of all runs."""
    return f"code/{sha256}.tar.gz"


def create_run(runs_url: str, record: RunRecord, config: bytes) -> Store:
    """Make the run directory: ``config.yaml``, then ``run.json``. Raises ``UserError`` when the id is taken."""
    store = open_store(runs_url).sub(path_of(record.id))
    if not store.create("config.yaml", config) or not write_run(store, record):
        raise UserError(f"{store.url} exists already; runs are never overwritten")
    return store


def whoami() -> tuple[str, str]:
    """Owner and host for a new record."""
    import getpass
    import socket

    try:
        owner = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in many containers
        owner = "unknown"
    return owner, socket.gethostname()


def write_run(store: Store, record: RunRecord) -> bool:
    """False when there is one."""
    return store.create("run.json", encode(record))


def write_submission(store: Store, record: SubmissionRecord) -> bool:
    """Claim the submission's number. False when another launcher has it."""
    if record.number > 0:
        # Before the claim: whoever remembers this run as over must not miss that it goes on.
        run_id = store.url.rstrip("/").rsplit("/", 1)[-1]
        open_store(root_of(store.url)).create(f"{MARKS}/{run_id}.{record.number:04d}", b"")
    return store.create(f"{_submission(record.number)}/submission.json", encode(record))


def next_submission(store: Store) -> int:
    """The number to claim next. Another launcher may be faster: ``write_submission`` tells."""
    return max((int(name) for name in store.list("job") if _NUMBER.fullmatch(name)), default=-1) + 1


def register_job(store: Store, submission: int, job_id: str, by: Literal["launcher", "job"]) -> bool:
    """Record the one job that may run the submission. True when it is this one, whoever recorded it first."""
    path = f"{_submission(submission)}/job.json"
    if store.create(path, encode(JobRecord(job_id=job_id, by=by, time=time.time()))):
        return True
    try:
        return msgspec.json.decode(store.get(path), type=JobRecord).job_id == job_id
    except msgspec.MsgspecError as error:
        raise UserError(f"{store.url}/{path} is damaged: {error}") from error


def write_failed(store: Store, submission: int, error: str) -> bool:
    """The scheduler refused it. False when that was recorded before."""
    return store.create(f"{_submission(submission)}/failed.json", encode(Failed(error=error, time=time.time())))


def write_intent(store: Store, submission: int, graceful: bool, by: str, outcome: str = "", reason: str = "") -> bool:
    """The submission must not run again. False when that was recorded before: the first one counts."""
    intent = Intent(graceful=graceful, by=by, time=time.time(), outcome=outcome, reason=reason)
    return store.create(f"{_submission(submission)}/intent.json", encode(intent))


def write_image(store: Store, submission: int, digests: Sequence[str]) -> bool:
    """What the image was when somebody first saw it run. False when that was recorded before."""
    image = Image(digests=list(digests), time=time.time())
    return store.create(f"{_submission(submission)}/image.json", encode(image))


def pack(numbers: Iterable[int]) -> list[list[int]]:
    """``[[first, last], …]``, keeping the order in which the numbers come."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return spans


def unpack(spans: Sequence[Sequence[int]]) -> list[int]:
    """The numbers that :func:`pack` got."""
    return [number for first, last in spans for number in range(first, last + 1)]


def _submission(number: int) -> str:
    return f"job/{number:04d}"


def encode(record: Any) -> bytes:
    """A record as it is stored: JSON that people can read."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


# Reading


def marks(store: Store) -> Counter[str]:
    """How often each run and study below ``store`` was submitted again; a trial counts for its study, too."""
    found: Counter[str] = Counter()
    for name in store.list(MARKS):
        run_id = name.rpartition(".")[0]
        found.update({run_id, run_id.partition(".")[0]})
    return found


_Record = TypeVar("_Record")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Reader:
    """Reads JSON objects of one run and remembers what is wrong with them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.problems: list[str] = []

    def read(self, path: str, kind: type[_Record]) -> _Record | None:
        try:
            return msgspec.json.decode(self.store.get(path), type=kind)
        except FileNotFoundError:
            self.problems.append(f"{path} is missing")
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.problems.append(f"{path}: {error}")
        except UserError as error:  # a run of somebody else, in a store that is shared
            self.problems.append(str(error))
        return None

    def numbers(self, folder: str) -> list[str]:
        try:
            return [name for name in self.store.list(folder) if _NUMBER.fullmatch(name)]
        except UserError as error:
            self.problems.append(str(error))
            return []

    def submission(self, name: str) -> Submission | None:
        folder = f"job/{name}"
        names = self.store.list(folder)
        if not names:
            return None  # a launcher is about to claim the number
        record = self.read(f"{folder}/submission.json", SubmissionRecord)
        if record is None:
            return None
        if record.number != int(name):
            self.problems.append(f"{folder}/submission.json says it is number {record.number}")
            return None
        return Submission(
            record,
            self.read(f"{folder}/job.json", JobRecord) if "job.json" in names else None,
            self.read(f"{folder}/failed.json", Failed) if "failed.json" in names else None,
            self.read(f"{folder}/intent.json", Intent) if "intent.json" in names else None,
            self.read(f"{folder}/image.json", Image) if "image.json" in names else None,
            self.store.login or (record.login if self.store.local_path is None else None),
        )

    def attempt(self, name: str) -> Attempt | None:
        folder = f"attempts/{name}"
        names = self.store.list(folder)
        if not names:
            return None  # an attempt is claimed by its start.json; the folder alone is a claim under way
        start = self.read(f"{folder}/start.json", AttemptStart)
        if start is None:
            return None
        if start.number != int(name):
            self.problems.append(f"{folder}/start.json says it is number {start.number}")
            return None
        return Attempt(start, self.read(f"{folder}/end.json", AttemptEnd) if "end.json" in names else None)


def load_run(store: Store, seen: Store | None = None) -> Run:
    """Read a run directory. A directory without ``run.json`` gives a ``Run`` with ``record=None`` and its problem.

    ``seen``: the same store, as :meth:`Store.ahead` gives it.
    """
    reader = _Reader(seen or store)
    run_id = store.url.rstrip("/").rsplit("/", 1)[-1]
    record = reader.read("run.json", RunRecord)
    if record is None and reader.problems == ["run.json is missing"]:
        reader.problems = ["run.json is missing: the launcher died while it created the run, or this is not a run"]
    if record and record.format > FORMAT:
        reader.problems.append(
            f"run.json: format {record.format} is newer than this llmops ({__version__}) understands"
        )
    if record and record.id != run_id:
        reader.problems.append(f"run.json says that this is run {record.id}; the directory was renamed or copied")
    submissions = [reader.submission(name) for name in reader.numbers("job")]
    attempts = [reader.attempt(name) for name in reader.numbers("attempts")]
    return Run(
        store,
        run_id,
        record,
        sorted((each for each in submissions if each), key=lambda each: each.number),
        sorted((each for each in attempts if each), key=lambda each: each.number),
        reader.problems,
        seen,
    )


def list_runs(runs_url: str) -> list[Run]:
    """All runs, oldest first. Directories whose name is no run id are not runs."""
    store = open_store(runs_url)
    return load_runs(store, list_ids(store))


def list_ids(store: Store) -> list[str]:
    """Ids of all runs, oldest first; trials are in their studies."""
    return [name for name in store.list() if ids.RUN.fullmatch(name)]


def list_trials(store: Store, study: str) -> list[str]:
    """Ids of the trials of a study that have begun, in order."""
    return [name for name in store.list(f"{study}/trials") if ids.TRIAL.fullmatch(name)]


def load_runs(store: Store, ids: Sequence[str], done: Callable[[], object] = lambda: None) -> list[Run]:
    """The runs and trials with these ids. ``done`` is called after each."""

    ahead = store.ahead([path_of(run_id) for run_id in ids])

    def load(run_id: str) -> Run:
        run = load_run(store.sub(path_of(run_id)), ahead.sub(path_of(run_id)))
        done()
        return run

    return each(store, list(ids), load)


def find_run(runs_url: str, ref: str) -> Run:
    """The run that ``ref`` means: an id, else a name, else the beginning of one id or name; ``STUDY/12`` is a trial.

    Raises ``UserError`` when there is none, or more than one.
    """
    store = open_store(runs_url)
    study, slash, trial = ref.rpartition("/")
    if slash and trial.isdigit():
        ref = trial_id(find_study(runs_url, study), int(trial))
    if ids.TRIAL.fullmatch(ref):
        found = load_run(store.sub(path_of(ref)))
        if found.record is None and found.problems and not store.exists(path_of(ref)):
            raise UserError(f"{ref} has not begun yet, or there is no such trial; `llmops sweep status` lists them")
        return found
    return load_run(store.sub(_find(store, list_ids(store), ref, "run")))


def find_study(runs_url: str, ref: str) -> str:
    """The id of the study that ``ref`` means, as for :func:`find_run`."""
    store = open_store(runs_url)
    return _find(store, list_studies(store), ref, "study")


def list_studies(store: Store) -> list[str]:
    """Ids of all studies in the folder of all runs, oldest first."""
    return [name for name in store.list() if ids.STUDY.fullmatch(name)]


def is_study(runs_url: str, ref: str) -> bool:
    """Whether ``ref`` means exactly one study, and no run."""
    store = open_store(runs_url)
    listed = store.list()
    if ref in listed:
        return bool(ids.STUDY.fullmatch(ref))
    try:
        _find(store, [name for name in listed if ids.STUDY.fullmatch(name)], ref, "study")
    except UserError:
        return False
    try:
        _find(store, [name for name in listed if ids.RUN.fullmatch(name)], ref, "run")
    except UserError:
        return True
    return False


def _find(store: Store, ids: list[str], ref: str, what: str) -> str:
    plural = {"run": "runs", "study": "studies"}[what]
    if ref in ids:
        return ref
    names = dict(zip(ids, each(store, ids, lambda run_id: _name(store, run_id)), strict=True))
    for matching in (
        [run_id for run_id, name in names.items() if name == ref],
        [run_id for run_id, name in names.items() if ref and (run_id.startswith(ref) or name.startswith(ref))],
    ):
        if len(matching) == 1:
            return matching[0]
        if matching:
            shown = ", ".join(matching[-8:]) + (" (the newest 8)" if len(matching) > 8 else "")
            raise UserError(f"{ref!r} means {len(matching)} {plural} in {store.url}; use an id: {shown}")
    if not ids:
        raise UserError(
            f"there is no {what} {ref!r}: {store.url} holds no {plural} (set LLMOPS_RUNS_URL to look elsewhere)"
        )
    near = hint(ref, dict.fromkeys([*names.values(), *names]), n=3, cutoff=0.5) or "; `llmops status` lists them"
    raise UserError(f"there is no {what} {ref!r} in {store.url}{near}")


class _Named(msgspec.Struct):
    name: str


def _name(store: Store, run_id: str) -> str:
    path = "study.json" if ids.STUDY.fullmatch(run_id) else "run.json"
    record = _Reader(store.sub(run_id)).read(path, _Named)
    return record.name if record else run_id


def read_many(store: Store, paths: Sequence[str]) -> list[bytes | None]:
    """Objects in the order of ``paths``; None for those that are not there."""

    def read(path: str) -> bytes | None:
        try:
            return store.get(path)
        except FileNotFoundError:
            return None

    return each(store, list(paths), read)


def each(store: Store, items: Sequence[_Item], read: Callable[[_Item], _Result]) -> list[_Result]:
    """``read`` of every item, in order; several at a time where each costs a round trip to ``store``."""
    if store.local_path is not None:
        return [read(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:  # each object costs a round trip
        return list(pool.map(read, items))


ready(_Named)
