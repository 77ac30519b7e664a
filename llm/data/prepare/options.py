"""Options of a preparation that contradict each other: what can be said before anything is read or queued."""

from __future__ import annotations

import re

from llm.utils.config import ConfigError, PrepareConfig


def check(config: PrepareConfig) -> None:
    """Refuse what cannot be prepared, without a look at any file. Raises ConfigError."""
    if not config.input:
        raise ConfigError("prepare.input is empty: give paths, URLs or globs of them")
    if not config.output:
        raise ConfigError("prepare.output is not set: give the folder or URL where the dataset is to be")
    if "" in config.input:
        raise ConfigError("prepare.input holds an empty name: remove it")
    for name in ("field", "tokenizer"):
        if getattr(config, name) == "":
            raise ConfigError(f"prepare.{name} is empty: give it a value, or leave it out")
    if config.chat and config.paragraphs:
        raise ConfigError("prepare.chat=true and prepare.paragraphs=true: a paragraph is no chat; set one of them")
    if config.chat and config.format == "text":
        raise ConfigError("prepare.chat=true and prepare.format=text: chats are rows of JSON lines or Parquet")
    if config.train_tokenizer is not None and config.tokenizer != "bytes":
        raise ConfigError(
            f"prepare.train_tokenizer={config.train_tokenizer} and prepare.tokenizer={config.tokenizer}: "
            "either a new one is trained or that one is used; set one of them"
        )
    if config.max_chars is not None and config.max_chars < config.min_chars:
        raise ConfigError(
            f"prepare.min_chars={config.min_chars} is more than prepare.max_chars={config.max_chars}: nothing is left"
        )
    if config.validation == 1:
        raise ConfigError("prepare.validation=1 leaves nothing to train on: lower it")
    if config.drop is not None:
        try:
            re.compile(config.drop)
        except re.error as error:
            raise ConfigError(f"prepare.drop={config.drop}: no regular expression: {error}") from error
    for each in config.keep:
        if not re.fullmatch(r"[^=]+=.*", each, re.DOTALL):
            raise ConfigError(f"prepare.keep: {each!r} is not of the form field=value")
