"""What is to be done, fixed by the input and the options alone: how many do it decides nothing.

While a dataset is prepared, ``parts/`` in its folder holds ``plan.json`` and a small record of each item of each stage
that is done; the index replaces them all.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

from llm.data.format import INDEX, Index, TokenizerRecord, read_index
from llm.data.prepare.inputs import File, Piece, find, local_path, units
from llm.utils.config import ConfigError, PrepareConfig
from llm.utils.storage import Storage

PARTS = "parts"
PLAN = f"{PARTS}/plan.json"
# How the work is done, not what comes out of it.
FREE = ("output", "workers", "overwrite", "wait_s", "max_bad_fraction")
BUCKET = 2 << 30  # bytes of input whose hashes are compared at a time
BUCKETS = 256
SHARD_NAME = re.compile(r"(train|validation)-\d{5,}-\d{3,}\.tokens")


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``plan.json``."""

    format: int = 1
    options: dict[str, Any]
    tokenizer: str  # digest, or what is to be trained
    files: list[File]
    units: list[list[Piece]]

    @property
    def bytes(self) -> int:
        """Of all inputs, as they lie there."""
        return sum(file.size for file in self.files)

    @property
    def buckets(self) -> int:
        """Parts in which hashes are compared."""
        return min(max(-(-self.bytes // BUCKET), 1), BUCKETS)

    def digest(self) -> str:
        """Names this preparation."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:32]

    def unit_bytes(self, unit: int) -> int:
        """Of input; of Parquet row groups an even part of their file."""
        return sum(self._piece_bytes(piece) for piece in self.units[unit])

    def _piece_bytes(self, piece: Piece) -> int:
        file = self.files[piece.file]
        return file.size if file.form == "parquet" and piece.end < 0 else piece.end - piece.start


def options_of(config: PrepareConfig) -> dict[str, Any]:
    """What decides the dataset."""
    return {name: value for name, value in msgspec.to_builtins(config).items() if name not in FREE}


def make_plan(config: PrepareConfig, tokenizer: str) -> Plan:
    """Look at the inputs. Raises ConfigError for what cannot be prepared."""
    files = find(config)
    _check_places(config, files)
    for file in files:
        if file.form == "text" and (config.chat or config.keep):
            option = "chat" if config.chat else "keep"
            raise ConfigError(f"prepare.{option} needs rows with fields, and {file.url} is plain text")
    return Plan(options=options_of(config), tokenizer=tokenizer, files=files, units=units(files, config))


def claim(storage: Storage, plan: Plan, overwrite: bool) -> Index | None:
    """Make the folder that of ``plan``. Returns the index if the dataset is complete already.

    Raises ConfigError when it holds another dataset, or parts of one, that is not to be overwritten.
    """
    index = read_index(storage)
    ours = index is not None and _is_of(index, plan)
    if index is not None and not ours:
        if not overwrite:
            raise ConfigError(
                f"prepare.output={storage.url} holds another dataset ({_difference(index.made_from, plan)}): "
                "name another folder, or set overwrite"
            )
        storage.remove(INDEX)
        clear(storage)
    if ours:
        return index
    stored = stored_plan(storage)
    if stored is not None and stored != plan:
        if not overwrite:
            made = {"options": stored.options, "tokenizer": stored.tokenizer}
            raise ConfigError(
                f"prepare.output={storage.url} holds parts of another preparation ({_difference(made, plan)}): "
                "give the same options again, name another folder, or set overwrite"
            )
        clear(storage)
    storage.create(PLAN, msgspec.json.encode(plan))
    return None


def is_complete(storage: Storage, plan: Plan) -> bool:
    """Is the dataset of ``plan`` there?"""
    index = read_index(storage)
    return index is not None and _is_of(index, plan)


def _is_of(index: Index, plan: Plan) -> bool:
    return bool(index.made_from.get("plan") == plan.digest())


def stored_plan(storage: Storage) -> Plan | None:
    """What is being prepared in a folder. Raises ConfigError for a plan that this version does not read."""
    try:
        return msgspec.json.decode(storage.read(PLAN), type=Plan)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{storage.url}/{PLAN} is not of this version: {error}; remove {storage.url}/{PARTS}"
        ) from error


def clear(storage: Storage) -> None:
    """Remove what another preparation has left; the plan goes first, so that nothing of it counts."""
    storage.remove(PLAN)
    storage.remove_folder(PARTS)
    for name in storage.list(""):
        if SHARD_NAME.fullmatch(name):
            storage.remove(name)


def trained_name(config: PrepareConfig) -> str:
    """What stands for the digest of a tokenizer that is still to be trained."""
    return f"train {config.train_tokenizer}"


def made_from(plan: Plan, tokenizer: TokenizerRecord) -> dict[str, Any]:
    """Where a dataset comes from, for its index."""
    files = [[file.url, file.size, file.version] for file in plan.files]
    return {
        "plan": plan.digest(),
        "options": plan.options,
        "tokenizer": plan.tokenizer,
        "files": len(files),
        "bytes": plan.bytes,
        "inputs": hashlib.sha256(msgspec.json.encode(files)).hexdigest()[:32],
        "vocab_size": tokenizer.vocab_size,
    }


def _difference(made: dict[str, Any], plan: Plan) -> str:
    """What another preparation did differently."""
    options = made.get("options")
    if not isinstance(options, dict):
        return "not made by prepare_data"
    for name, value in plan.options.items():
        if options.get(name) != value:
            return f"its {name} is {options.get(name)}, not {value}"
    if made.get("tokenizer") != plan.tokenizer:
        return "its tokenizer has changed"
    return "its input files have changed"


def _check_places(config: PrepareConfig, files: list[File]) -> None:
    output = str(config.output).rstrip("/")
    path = local_path(output)
    output = str(path) if path is not None else output
    for file in files:
        if file.url == output or f"{output}/".startswith(f"{file.url}/") or file.url.startswith(f"{output}/"):
            raise ConfigError(f"prepare.output={config.output}: the input {file.url} is there; name another folder")
    for pattern in config.input:
        head, recursive, _ = pattern.partition("**")
        place = local_path(head or ".")
        head = str(place) if place is not None else head.rstrip("/")
        if recursive and f"{output}/".startswith(f"{head.rstrip('/')}/"):
            raise ConfigError(
                f"prepare.output={config.output} lies inside prepare.input={pattern}, which would find it next time: "
                "name a folder outside"
            )
