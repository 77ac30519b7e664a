"""Attempts of a run: claiming the next one, what it resumes from, what became of the ones before.

Lineage instead of locks: each attempt records the commit that it resumes from, and readers follow the newest attempt's
chain.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from llmops.agent import commits
from llmops.agent.rundir import RunDir

_GENERATION = re.compile(r"^(\d{4,})-(\d{4,})$")
_STEP = re.compile(r"^step_(\d{8,})$")

# Ends that were nobody's fault: they neither use up a retry nor show progress.
NOT_FAILURES = ("preempted", "timeout", "finished", "cancelled")


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint: its folder inside the run directory, and the last step that it holds.

    Of one that a program told of, ``path`` is the name of the record, and ``place`` is where the program has its state:
    a path, absolute or inside the run directory, or a URL.
    """

    path: str
    step: int
    place: str | None = None


def numbers(rundir: RunDir) -> list[int]:
    """Numbers of the attempts that were claimed, in order."""
    return sorted(
        int(name) for name in rundir.list("attempts") if name.isdigit() and rundir.exists(f"attempts/{name}/start.json")
    )


def newest_commit_of(rundir: RunDir, attempt: int) -> Commit | None:
    """The newest commit that ``attempt`` itself wrote: the last that a program told of, or of checkpoints in our own
    format the highest step of the last generation.
    """
    if told := commits.parse(rundir.list(commits.folder(attempt)), attempt):
        record = rundir.get(f"{told[-1].name}.json") or {}
        return Commit(told[-1].name, told[-1].step, str(record.get("path", ".")))
    best: tuple[int, int, str] | None = None
    for step_name in rundir.list("checkpoints"):
        step = _STEP.match(step_name)
        if not step:
            continue
        for name in rundir.list(f"checkpoints/{step_name}"):
            match = _GENERATION.match(name)
            if not match or int(match.group(1)) != attempt:
                continue
            path = f"checkpoints/{step_name}/{name}"
            key = (int(match.group(2)), int(step.group(1)), path)
            if (best is None or key > best) and rundir.exists(f"{path}/manifest.json"):
                best = key
    return Commit(best[2], best[1]) if best else None


def resume_point(rundir: RunDir) -> Commit | None:
    """What the next attempt resumes from.

    The newest commit in the newest attempt's lineage, or None for a fresh start.
    """
    claimed = numbers(rundir)
    if not claimed:
        return None
    newest = claimed[-1]
    own = newest_commit_of(rundir, newest)
    if own:
        return own
    start = rundir.get(f"attempts/{newest:04d}/start.json") or {}
    path = start.get("resume_from")
    return Commit(path, int(start["resume_step"]), start.get("resume_path")) if path else None


class Superseded(Exception):
    """A later life of the same job, or a later submission, owns the run now. The message says which."""


def claim(rundir: RunDir, submission: int, job_id: str, restart: int, hosts: list[str]) -> dict[str, Any]:
    """Claim the next attempt and return its record. Only one claimant gets a number; the loser takes the next.

    Raises :class:`Superseded` when the job was restarted elsewhere while this supervisor lived on, as happens on a node
    that lost its connection and was given up.
    """
    for _ in range(1000):
        claimed = numbers(rundir)
        number = claimed[-1] + 1 if claimed else 0
        newest = (rundir.get(f"attempts/{claimed[-1]:04d}/start.json") or {}) if claimed else {}
        if (newest.get("submission", -1), newest.get("restart", 0)) > (submission, restart):
            raise Superseded(
                f"attempt {claimed[-1]} belongs to submission {newest['submission']}, restart {newest['restart']}"
            )
        commit = resume_point(rundir)
        record: dict[str, Any] = {
            "number": number,
            "submission": submission,
            "job_id": job_id,
            "restart": restart,
            "hosts": hosts,
            "time": time.time(),
            "resume_from": commit.path if commit else None,
            "resume_step": commit.step if commit else 0,
        }
        if commit and commit.place is not None:
            record["resume_path"] = commit.place
        if rundir.create(f"attempts/{number:04d}/start.json", record):
            return record
    raise RuntimeError(f"could not claim an attempt in {rundir.root}: a thousand others were faster")


@dataclass(frozen=True)
class History:
    """What the failure budget needs to know of a submission's attempts."""

    failures: int  # failed attempts
    without_progress: int  # newest failed attempts in a row that committed no new step


def history(rundir: RunDir, submission: int) -> History:
    """Count the failures of ``submission``; the newest attempt's end must be recorded already."""
    failures = without_progress = 0
    counting = True
    for number in reversed(numbers(rundir)):
        start = rundir.get(f"attempts/{number:04d}/start.json") or {}
        if start.get("submission") != submission:
            continue
        end = rundir.get(f"attempts/{number:04d}/end.json")
        # An attempt without an end died with its whole job (a lost node): a failure like any other.
        reason = end["reason"] if end else "node_failure"
        commit = newest_commit_of(rundir, number)
        if commit and commit.step > int(start.get("resume_step", 0)):
            counting = False
        if reason in NOT_FAILURES:
            continue
        failures += 1
        without_progress += counting
    return History(failures, without_progress)
