"""How two runs differ: configuration, code, what made them, data, results."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from llmops.errors import ClusterError, UserError
from llmops.job import JobView
from llmops.monitor.describe import Described, describe_run
from llmops.monitor.detail import checkpoints, configuration, evaluations, flat
from llmops.runs import records
from llmops.runs.model import Run
from llmops.runs.store import open_store

Row = dict[str, Any]  # key, left, right
Pair = tuple[Run, Run]


def difference(runs: Pair, jobs: tuple[JobView | None, JobView | None], now: float) -> dict[str, Any]:
    """The stable JSON object of ``llmops diff --json``. Keys are added over time, never renamed.

    ``config``, ``environment`` and ``data`` hold what differs alone, ``metrics`` all that either has. What cannot be
    read is named in ``problems``.
    """
    left, right = (describe_run(run, job, now)[0] for run, job in zip(runs, jobs, strict=True))
    problems = [f"{each['id']}: {problem}" for each in (left, right) for problem in each["problems"]]
    found: dict[str, Any] = {
        **{
            side: {key: each[key] for key in ("id", "name", "state", "url", "created")}
            for side, each in (("left", left), ("right", right))
        },
        "config": [],
        "code": {"same": None, "left": _code(runs[0]), "right": _code(runs[1]), "files": None},
        "environment": [],
        "data": [],
        "metrics": [],
        "problems": problems,
    }
    for key, read in READ.items():
        try:
            found[key] = read(runs, (left, right))
        except (UserError, ClusterError, OSError) as error:
            problems.append(str(error))
    return found


def rows(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Row]:
    """What differs of two flat mappings, in the left one's order; what one lacks is null."""
    keys = [*left, *(key for key in right if key not in left)]
    return [
        {"key": key, "left": left.get(key), "right": right.get(key)}
        for key in keys
        if key not in left or key not in right or left[key] != right[key]
    ]


def _config(runs: Pair, _: tuple[Described, Described]) -> list[Row]:
    left, right = (
        configuration(run, run.submissions[-1].record.config if run.submissions else "config.yaml") for run in runs
    )
    # A section without keys differs from one with keys in these keys.
    left, right = ({key: value for key, value in each.items() if value != {}} for each in (left, right))
    return rows(left, right)


def code(runs: Pair, _: object = None) -> dict[str, Any]:
    """The two snapshots, whether they are the same, and by name what changed: ``left`` or ``right`` only, ``changed``.

    ``files`` is None where a snapshot is missing, or is not there any more.
    """
    left, right = _code(runs[0]), _code(runs[1])
    same = left == right if left is None or right is None else left["sha256"] == right["sha256"]
    files = None
    if left and right:
        files = [] if same else _files(runs, (left["sha256"], right["sha256"]))
    return {"same": same, "left": left, "right": right, "files": files}


def _code(run: Run) -> dict[str, Any] | None:
    if run.record is None or run.record.code is None:
        return None
    return {
        "sha256": run.record.code.sha256,
        "git_commit": run.record.code.git_commit,
        "dirty": run.record.code.dirty,
    }


def _files(runs: Pair, digests: tuple[str, str]) -> list[dict[str, str]] | None:
    left, right = (_archive(run, digest) for run, digest in zip(runs, digests, strict=True))
    if left is None or right is None:
        return None
    how = {name: "changed" for name in left.keys() & right.keys() if left[name] != right[name]}
    how |= dict.fromkeys(left.keys() - right.keys(), "left")
    how |= dict.fromkeys(right.keys() - left.keys(), "right")
    return [{"file": name, "how": how[name]} for name in sorted(how)]


def _archive(run: Run, digest: str) -> dict[str, str] | None:
    """Digest of every file of a snapshot, or None where the archive is gone."""
    path = records.archive_path(digest)
    store = open_store(records.root_of(run.url))
    try:
        content = gzip.decompress(store.get(path))
        found = {}
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for entry in tar:
                stream = tar.extractfile(entry) if entry.isreg() else None
                data = stream.read() if stream else entry.linkname.encode()
                found[entry.name] = f"{entry.type!r} {entry.mode:o} {hashlib.sha256(data).hexdigest()}"
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{store.url}/{path} is damaged ({error})") from error
    return found


def _environment(runs: Pair, _: object = None) -> list[Row]:
    """What ran the runs, and what made their newest checkpoints where both have one."""
    sides: list[dict[str, Any]] = []
    made = [_state(run).get("made_by", {}) for run in runs]
    for run, each in zip(runs, made, strict=True):
        images = run.submissions[-1].image if run.submissions else None
        side = {
            "llmops": run.record.version if run.record else None,
            "backend": run.backend,
            "image": images.digests if images else None,
        }
        if all(made):
            side |= flat({key: value for key, value in each.items() if key not in ("code", "layout")})
        sides.append(side)
    return rows(*sides)


def _data(runs: Pair, _: object = None) -> list[Row]:
    """What the runs read, and the digest of its tokenizer, where the newest checkpoints of both say so."""
    left, right = (flat(_state(run).get("data", {})) for run in runs)
    return rows(left, right) if left and right else []


def _state(run: Run) -> dict[str, Any]:
    from llm.checkpoint.format import CheckpointError
    from llm.checkpoint.lineage import newest_commit, read_manifest
    from llmops.runs.ssh_storage import open_storage

    storage = open_storage(run.store)
    try:
        commit = newest_commit(storage)
        return dict(read_manifest(storage, commit).state) if commit else {}
    except CheckpointError as error:
        raise UserError(f"{run.url}: its newest checkpoint cannot be read ({error})") from error


def _results(runs: Pair, described: tuple[Described, Described]) -> list[Row]:
    """The last numbers of both, side by side."""
    sides = []
    for run, each in zip(runs, described, strict=True):
        held_out = evaluations(run)
        commits = checkpoints(run)
        sides.append(
            {
                "step": each["step"],
                "loss": each["loss"],
                "held-out loss": held_out[-1]["loss"] if held_out else None,
                "tokens/s": each["tokens_per_s"],
                "MFU": each["mfu"],
                "goodput": each["goodput"],
                "attempts": len(each["attempts"]),
                "committed step": commits[0]["step"] if commits else None,
            }
        )
    left, right = sides
    return [
        {"key": key, "left": left[key], "right": right[key]}
        for key in left
        if left[key] is not None or right[key] is not None
    ]


READ: dict[str, Callable[[Pair, tuple[Described, Described]], Any]] = {
    "config": _config,
    "code": code,
    "environment": _environment,
    "data": _data,
    "metrics": _results,
}
