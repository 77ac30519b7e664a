"""A checkpoint of another format, as the import sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llm.checkpoint.image import Box


@dataclass(frozen=True)
class Item:
    """A box of a tensor, and how to get its values. Several items make up a tensor that was sharded."""

    box: Box
    read: Callable[[], Tensor]


@dataclass
class Source:
    """Everything in it: tensors, JSON values by name, and the names of what could not be read."""

    format: str
    items: list[Item] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    state: dict[str, Any] | None = None  # of a checkpoint of ours that had been exported
