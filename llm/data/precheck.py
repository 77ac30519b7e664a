"""What can be said of a run's data before anything is queued: from an index that this machine can see, in no time.

Free of numpy and torch. What lies in an object store, or on nodes alone, the job checks when it starts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm.utils.config import ConfigError

EMBEDDED = "embedded:"
BYTE_TOKENS = 256


def check_sources(config: Any) -> None:
    """Refuse datasets that ``config`` (with the fields of TrainingConfig) cannot train on.

    Raises ConfigError: the key, the value, the remedy.
    """
    places = {"data.source": config.data.source} if config.data.source is not None else {}
    places |= {f"data.mixture.{name}.source": each.source for name, each in config.data.mixture.items()}
    for key, place in places.items():
        path = Path(place)
        if place.startswith(EMBEDDED) or ("://" not in place and path.is_file()):
            check_vocabulary("bytes", BYTE_TOKENS, config.model.vocab_size)
        if place.startswith(EMBEDDED) or "://" in place:
            continue
        if path.is_file() and not path.stat().st_size:
            raise ConfigError(f"{key}={place} is empty: name a file with text in it, or a dataset")
        if path.is_dir():
            _check_dataset(f"{key}={place}", path / "index.json", config.model.vocab_size, config.train.seq_len)


def check_vocabulary(tokenizer: str, size: int, vocab_size: int) -> None:
    """Raise ConfigError where a model of ``vocab_size`` has too few tokens for a ``tokenizer`` of ``size``."""
    if size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the {size} tokens of the data's tokenizer {tokenizer}: "
            "raise it"
        )


def _check_dataset(what: str, file: Path, vocab_size: int, seq_len: int) -> None:
    try:
        index = json.loads(file.read_bytes())
        tokens = sum(shard["tokens"] for shard in index["splits"].get("train", []))
        tokenizer, row = index["tokenizer"], index["row"]
        name, size = str(tokenizer["name"]), int(tokenizer["vocab_size"])
    except FileNotFoundError:
        raise ConfigError(
            f"{what} is a folder without index.json: finish preparing it (python -m llm.tools.prepare_data), or name a "
            "file of text"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no index of tokens that this version reads: {error!r}") from error
    if not tokens:
        raise ConfigError(f"{what} has no tokens to train on: its index lists none in the split train")
    check_vocabulary(name, size, vocab_size)
    if row is not None and row != seq_len + 1:
        raise ConfigError(
            f"train.seq_len={seq_len}, but {what} was packed for sequences of {row - 1}: set train.seq_len={row - 1}, "
            f"or prepare it with --pack {seq_len}"
        )
