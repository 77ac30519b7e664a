"""How far a run is: what a checkpoint holds beside tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from llm.utils.config import ConfigError, TrainingConfig


@dataclass
class Progress:
    """``step`` counts finished steps; ``samples`` the sequences of the stream that the run has gone past."""

    step: int = 0
    samples: int = 0
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
            updates=state["updates"],
            tokens=state["tokens"],
            trained_s=state["trained_s"],
            loss=state["loss"],
            evaluated=state["evaluated"],
            evaluation_loss=state["evaluation_loss"],
        )


def data_identity(config: TrainingConfig, fingerprint: str) -> dict[str, Any]:
    """Everything that decides which tokens a sequence of the stream holds; ``fingerprint`` names the text."""
    return {
        "text": fingerprint,
        "train.seq_len": config.train.seq_len,
        "train.seed": config.train.seed,
        "data.tokenizer": config.data.tokenizer,
        "data.validation_fraction": config.data.validation_fraction,
    }


def check_identity(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint's data position means nothing in this stream."""
    if changed := [key for key in mine if mine[key] != theirs.get(key)]:
        changes = ", ".join(f"{key}: {theirs.get(key)} -> {mine[key]}" for key in changed)
        raise ConfigError(
            f"the checkpoint's data position belongs to another stream ({changes}): "
            "restore the values or start a new run"
        )


def config_digest(config: TrainingConfig) -> str:
    """SHA-256 of every value of the config."""
    return hashlib.sha256(msgspec.json.encode(config, order="sorted")).hexdigest()
