"""Run directories with a model that nobody has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from llm.checkpoint.format import Commit
from llm.model.transformer import Transformer
from llm.utils.storage import open_storage
from tests.checkpoint.maker import make_commit
from tests.llm.harness import tiny


def save_run(folder: Path, model: Transformer, step: int = 7, **changes: Any) -> Commit:
    """The run directory of ``model``: its config and one commit."""
    folder.mkdir(exist_ok=True, parents=True)
    config = {**tiny(**changes), "model": msgspec.to_builtins(model.config)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    held = {
        f"model.{name}": (value.detach().numpy(), list(value.shape), [0] * value.dim())
        for name, value in model.named_parameters()
    }
    return make_commit(open_storage(str(folder)), step, [held])
