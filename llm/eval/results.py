"""Scores of checkpoints: ``evals/<step>.<attempt>-<generation>.<task>.<digest>.json`` of a run. Free of torch.

One listing says what there is. The digest is of all that decides a score: the commit, the task's files, the settings;
so the same evaluation is found again and made once, and another one gets a name of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from llm.checkpoint.format import Commit
from llm.utils.storage import Storage
from llm.utils.structs import ready

FOLDER = "evals"
REQUESTS = f"{FOLDER}/requests"  # what was answered of an evaluation that is not done
SAMPLES = f"{FOLDER}/samples"
_NAME = re.compile(r"(\d{8,})\.(\d{4,})-(\d{4,})\.([A-Za-z0-9_-]+)\.([0-9a-f]{12})")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The scores of one commit in one task, with what is needed to get them again."""

    task: str
    step: int
    commit: str
    scores: dict[str, float]  # by metric, of a group of tasks by task/metric
    stderr: dict[str, float] = {}  # of those that have one
    higher_is_better: dict[str, bool] = {}
    examples: int = 0
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    checksums: dict[str, str] = {}  # SHA-256 of the commit's manifest, of the tokenizer, of each of the task's files
    ranks: int = 1
    by: str = ""  # the run that evaluated
    time: float = 0.0  # epoch seconds when it was done
    seconds: float = 0.0
    format: int = 1


class Place(NamedTuple):
    """What a result's name says."""

    commit: Commit
    task: str  # with what a file name cannot have replaced
    digest: str

    @property
    def stem(self) -> str:
        """The name without folder and ending."""
        own = self.commit
        return f"{own.step:08d}.{own.attempt:04d}-{own.generation:04d}.{self.task}.{self.digest}"

    @property
    def path(self) -> str:
        """Of the result, relative to the run directory."""
        return f"{FOLDER}/{self.stem}.json"


def place(commit: Commit, task: str, decides: Mapping[str, Any]) -> Place:
    """Where the result of an evaluation belongs. ``decides``: plain data that the scores depend on."""
    text = json.dumps([commit.path, task, decides], sort_keys=True)
    return Place(commit, re.sub(r"[^A-Za-z0-9_-]", "_", task), hashlib.sha256(text.encode()).hexdigest()[:12])


def places(names: list[str]) -> dict[str, Place]:
    """Those of the names in :data:`FOLDER` that are results."""
    found: dict[str, Place] = {}
    for name in names:
        match = _NAME.fullmatch(name.removesuffix(".json"))
        if match is not None and name.endswith(".json"):
            step, attempt, generation = (int(group) for group in match.groups()[:3])
            found[name] = Place(Commit(attempt=attempt, generation=generation, step=step), match[4], match[5])
    return found


def write(storage: Storage, where: Place, result: Result) -> None:
    """Put a result; whoever was first with the same evaluation has made it."""
    try:
        storage.create(where.path, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    except FileExistsError:
        return


def decode(data: bytes) -> Result | None:
    """A result, or None for a file that holds none."""
    try:
        return msgspec.json.decode(data, type=Result)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


ready(Result)
