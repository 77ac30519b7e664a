"""What a rank and its writer process say to each other: one JSON object per line, down and up a pipe."""

from __future__ import annotations

from typing import Any

import msgspec

from llm.checkpoint.format import Commit
from llm.checkpoint.image import Box, FileImage
from llm.checkpoint.retention import Retention


class Layout(msgspec.Struct, frozen=True, kw_only=True, tag="layout"):
    """What the following saves hold, in which files: ``slots`` buffers of ``size`` bytes, one after the other."""

    size: int
    slots: int = 1
    boxes: list[Box]
    files: list[FileImage]


class CommitOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0's writer needs to commit for all."""

    world_size: int
    mesh: dict[str, int]
    code: str
    chain: list[Commit]  # the commits that lead here, oldest first; the last is the parent
    keep: Retention
    state: dict[str, Any]
    files_before: dict[str, bytes]  # path -> content of files that must be there before the commit is


class Save(msgspec.Struct, frozen=True, kw_only=True, tag="save"):
    """Write what is staged in ``slot``. ``began`` is the time of the request, epoch seconds; ``limit_s`` its time."""

    commit: Commit
    began: float
    limit_s: float
    rng: dict[str, str]
    slot: int = 0
    order: CommitOrder | None = None


class Keep(msgspec.Struct, frozen=True, kw_only=True, tag="keep"):
    """A snapshot is staged: write it only if the rank vanishes without a word, and all others have it too."""

    save: Save
    world_size: int


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag="forget"):
    """What is in ``slot`` is about to be replaced."""

    slot: int


class Abandon(msgspec.Struct, frozen=True, kw_only=True, tag="abandon"):
    """Another rank has failed: do not wait for it."""

    commit: Commit
    reason: str


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag="leave"):
    """Nothing more will come: end what is under way, and leave."""


class Written(msgspec.Struct, frozen=True, kw_only=True, tag="written"):
    """This rank's part is durable. The staging buffer is free again."""

    commit: Commit
    seconds: float
    bytes: int


class Committed(msgspec.Struct, frozen=True, kw_only=True, tag="committed"):
    """The checkpoint counts. ``chain`` is what is left of the chain after retention, the new commit last."""

    commit: Commit
    seconds: float
    bytes: int
    chain: list[Commit]
    warning: str | None = None  # retention could not remove something


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The save did not work, or whether it did is not known. The staging buffer is free again."""

    commit: Commit
    reason: str


class Wanted(msgspec.Struct, frozen=True, kw_only=True, tag="wanted"):
    """Somebody has asked for a checkpoint now."""


Request = Layout | Save | Keep | Forget | Abandon | Leave
Reply = Written | Committed | Failed | Wanted
