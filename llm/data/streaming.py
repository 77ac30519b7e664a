"""What a run reads, from its config: the sources, their mixture, and batches from any position on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llm.data.format import TokenizerRecord
from llm.data.order import Order, Picks, Position
from llm.data.precheck import check_vocabulary
from llm.data.reading import Reader, Rows, Share
from llm.data.source import Opened, open_source, recorded_tokenizer
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.utils.config import ConfigError, TrainingConfig
from llm.utils.storage import Storage, open_storage

ONLY = "data"  # the name of the source where there is one
TOKENIZER = "tokenizer"  # folder of a run directory


class Stream:
    """The data of a run, for one rank's ``share`` of every batch.

    ``first_place(step)`` is the first place of the stream that ``step`` trains on, where no batch was left out: weights
    that change at a step do so there.
    """

    def __init__(self, config: TrainingConfig, share: Share, first_place: Callable[[int], int]) -> None:
        data, seq_len = config.data, config.train.seq_len
        self.config, self.share = config, share
        places = {f"data.mixture.{name}.source": (name, each.source) for name, each in data.mixture.items()}
        if data.source is not None:
            places = {"data.source": (ONLY, data.source)}
        self.sources: dict[str, Opened] = {
            name: open_source(key, place, data, seq_len) for key, (name, place) in sorted(places.items())
        }
        self.tokenizer = self._tokenizer()
        weights = {name: each.weight for name, each in data.mixture.items()} or {ONLY: 1.0}
        self.order = Order(
            {name: each.train.size for name, each in self.sources.items()},
            {
                name: [(0, given)]
                if isinstance(given, float | int)
                else [(first_place(step), share) for step, share in given]
                for name, given in weights.items()
            },
            config.train.seed,
            data.epochs,
        )
        trained = [self.sources[name].train for name in self.order.names]
        self.reader = Reader(trained, seq_len, data.num_workers, data.prefetch, data.document_mask)
        self._fill_caches()

    def batches(self, picks: Iterable[Picks]) -> Iterator[tuple[Picks, Rows]]:
        """This rank's rows of each of ``picks``, read ahead."""
        return self.reader.batches(self.order, picks, self.share)

    def held_out(self, rows: int, batches: int) -> Iterator[tuple[str, Rows]]:
        """This rank's rows of the first ``batches`` held-out batches of each source, and its name; ``rows`` in all."""
        for name in self.order.names:
            for each in self.reader.held_out(self.sources[name].validation, rows, batches, self.share):
                yield name, each

    def epochs(self, position: Position) -> dict[str, float]:
        """How often each source has been gone through."""
        return {name: position.counts.get(name, 0) / each.train.size for name, each in self.sources.items()}

    def identity(self) -> dict[str, Any]:
        """Everything that decides which tokens a sample of a source holds, and in which order they come."""
        return {
            "sources": {name: each.fingerprint for name, each in self.sources.items()},
            "tokenizer": self.tokenizer.sha256,
            "train.seq_len": self.config.train.seq_len,
            "train.seed": self.config.train.seed,
        }

    def load_tokenizer(self) -> Tokenizer:
        """What turns text into this data's tokens, and back. Raises ConfigError."""
        return recorded_tokenizer(self.tokenizer, self._folder())

    def keep_tokenizer(self, storage: Storage) -> None:
        """Lay the tokenizer's file into a run directory, so that its checkpoints can be used without the data."""
        if self.tokenizer.file is not None:
            content = open_storage(self._folder()).read(self.tokenizer.file)
            storage.replace(f"{TOKENIZER}/{self.tokenizer.file}", content)

    def _folder(self) -> str:
        """Where the tokenizer's file lies, if it has one."""
        return next((each.storage.url for each in self.sources.values() if each.storage is not None), "")

    def close(self) -> None:
        """End what works in the background."""
        self.reader.close()
        for each in self.sources.values():
            if each.cache is not None:
                each.cache.close()

    def _tokenizer(self) -> TokenizerRecord:
        """The one of all sources. Raises ConfigError where they differ, or the model has too few tokens for it."""
        data, model = self.config.data, self.config.model
        (first, opened), *others = self.sources.items()
        found = opened.tokenizer
        for name, each in others:
            if each.tokenizer.sha256 != found.sha256:
                raise ConfigError(
                    f"data.mixture: {first} was made with the tokenizer {found.name} and {name} with "
                    f"{each.tokenizer.name}: prepare them with the same"
                )
        if data.tokenizer is not None and load_tokenizer(data.tokenizer).sha256 != found.sha256:
            raise ConfigError(
                f"data.tokenizer={data.tokenizer} is not what made {data.source or 'data.mixture'} ({found.name}): "
                "leave data.tokenizer out, or prepare the data with it"
            )
        check_vocabulary(found.name, found.vocab_size, model.vocab_size)
        return found

    def _fill_caches(self) -> None:
        """Keep datasets of object stores on this node, the smallest first, as long as whole ones fit."""
        left = self.config.data.cache_gb * 1e9
        turn, of = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cached = [each.cache for each in self.sources.values() if each.cache is not None]
        for cache in sorted(cached, key=lambda each: each.bytes):
            if cache.bytes > left:
                break
            left -= cache.bytes
            cache.fill(turn, of)
