"""How far a run is: what a checkpoint holds beside tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from llm.utils.config import ConfigError, TrainingConfig


@dataclass
class Progress:
    """``step`` counts finished steps; ``samples`` the sequences of the stream that the run has gone past."""

    step: int = 0
    samples: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)  # of these, by source
    updates: int = 0  # steps whose update was not skipped
    tokens: int = 0  # trained on
    trained_s: float = 0.0  # in steps, over all attempts
    loss: float | None = None
    evaluated: int = -1  # the last step whose held-out loss is in the metrics
    evaluation_loss: float | None = None

    def state(self) -> dict[str, Any]:
        """As JSON. ``data_position`` is ``samples`` under the name that the checkpoint's format has for it."""
        return {
            "step": self.step,
            "data_position": self.samples,
            "data_counts": dict(self.counts),
            "updates": self.updates,
            "tokens": self.tokens,
            "trained_s": self.trained_s,
            "loss": self.loss,
            "evaluated": self.evaluated,
            "evaluation_loss": self.evaluation_loss,
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Progress:
        """The inverse of :meth:`state`."""
        return cls(
            step=state["step"],
            samples=state["data_position"],
            counts=state["data_counts"],
            updates=state["updates"],
            tokens=state["tokens"],
            trained_s=state["trained_s"],
            loss=state["loss"],
            evaluated=state["evaluated"],
            evaluation_loss=state["evaluation_loss"],
        )


def check_identity(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint's data position means nothing in this stream.

    Sources may come and go; those that stay must be what they were.
    """
    before = theirs.get("sources", {})
    changed = {key: (theirs.get(key), value) for key, value in mine.items() if key != "sources"}
    changed |= {f"the data of {name}": (before.get(name), value) for name, value in mine["sources"].items()}
    known = {key: pair for key, pair in changed.items() if pair[0] is not None or not key.startswith("the data of")}
    if wrong := [f"{key}: {old} -> {new}" for key, (old, new) in known.items() if old != new]:
        raise ConfigError(
            f"the checkpoint's data position belongs to another stream ({', '.join(wrong)}): "
            "restore the values or start a new run"
        )
    if not set(before) & set(mine["sources"]):
        raise ConfigError(
            f"the checkpoint's data position is in the sources {', '.join(before)}, and none of these is configured: "
            "name one of them in data.mixture, or start a new run"
        )


def config_digest(config: TrainingConfig) -> str:
    """SHA-256 of every value of the config."""
    return hashlib.sha256(msgspec.json.encode(config, order="sorted")).hexdigest()
