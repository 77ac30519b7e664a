"""Settings of the server. Free of torch, so that the launcher can check them before anything is queued."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llm.utils.config import ConfigError, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Struct

Port = Annotated[int, Meta(ge=1, le=65535)]


class ServeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``task=serve`` serves, how, and what it refuses; ``conf/serve/default.yaml`` says what each is."""

    host: str = "127.0.0.1"
    port: Port | None = None
    name: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_batch: PositiveInt = 64
    step_tokens: PositiveInt = 512
    cache_mb: PositiveFloat | None = None
    max_queue: NonNegativeInt = 256
    max_body_kb: PositiveInt = 1024
    max_choices: PositiveInt = 64
    max_stop: PositiveInt = 16
    max_behind: PositiveInt = 4096
    write_timeout_s: PositiveFloat = 30.0
    drain_s: NonNegativeFloat = 30.0
    api_key_env: str | None = None


class ServingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What the server reads: which commit of which run (a path or URL) is served, and how. Other keys in the same file
    are left alone."""

    run: str | None = None
    step: PositiveInt | Literal["newest"] = "newest"
    serve: ServeConfig = msgspec.field(default_factory=ServeConfig)


def memory_blocks(config: ServeConfig, positions: int, block: int, block_bytes: int, free_bytes: int | None) -> int:
    """How many blocks of ``block`` positions the cache has: what ``cache_mb`` holds, no more than full batches of texts
    of ``positions`` need. Raises ConfigError where not even one text fits.

    Without ``cache_mb`` it takes 80 % of ``free_bytes`` of a GPU's memory, and 1 GiB without one.
    """
    if config.cache_mb is not None:
        room = int(config.cache_mb * 2**20)
    else:
        room = 2**30 if free_bytes is None else free_bytes * 8 // 10
    text = -(-positions // block)
    blocks = min(room // block_bytes, text * config.max_batch)
    if blocks < text:
        raise ConfigError(
            f"serve.cache_mb={config.cache_mb}: a text of {positions} tokens takes {text * block_bytes / 2**20:.1f} MB "
            f"of cache, and there are {room / 2**20:.1f}: give it more"
        )
    return blocks
