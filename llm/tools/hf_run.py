"""A run directory for a Hugging Face folder: what a checkpoint needs beside it to be evaluated, served, exported."""

from __future__ import annotations

import json

import msgspec
import yaml

from llm.data.streaming import TOKENIZER
from llm.data.tokenizer import JSON_FILE, load_tokenizer, tokenizer_file
from llm.tools.hf_config import from_hf_config
from llm.utils.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    DistConfig,
    EvalConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
)
from llm.utils.storage import Storage

HEAD = "# Made from {url}/config.json, without data: a training starts from these weights by train.init_from.\n"


def model_of(folder: Storage) -> ModelConfig | None:
    """The shape of the model in a folder; None where no ``config.json`` describes it. Raises ConfigError."""
    try:
        described = json.loads(folder.read("config.json"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{folder.url}/config.json is not JSON: {error}") from error
    if not isinstance(described, dict):
        raise ConfigError(f"{folder.url}/config.json is no JSON object")
    return from_hf_config(described, folder.url.rstrip("/").rpartition("/")[2])


def describe_run(run: Storage, folder: Storage, model: ModelConfig) -> str:
    """Write ``config.yaml`` and the tokenizer into a run directory that has none; says in words what was written."""
    written = ["config.yaml"]
    if JSON_FILE in folder.list(""):
        tokenizer = load_tokenizer(folder.url)
        if (content := tokenizer_file(tokenizer)) is not None:
            run.replace(f"{TOKENIZER}/{JSON_FILE}", content)
            written.append(f"{TOKENIZER}/{JSON_FILE}")
    length = min(model.max_seq_len, 4096)
    config = TrainingConfig(
        model=model,
        train=TrainConfig(max_steps=1, seq_len=length, global_batch_size=1, micro_batch_size=1, lr=1e-5),
        dist=DistConfig(),
        data=DataConfig(source=None),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    text = HEAD.format(url=folder.url) + yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)
    run.replace("config.yaml", text.encode())
    return " and ".join(written)
