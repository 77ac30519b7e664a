"""The loaders that ``loading.py`` compares: ours, mosaicml-streaming's and litdata's, each as its own users run it.

Every contender writes the same tokens in its own format, and gives batches of ``ROWS`` rows of ``LENGTH`` targets,
int64 (R, T), as a training step needs them.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROWS, LENGTH = 8, 2048
DOCUMENT = 500  # tokens of one, on average
VOCAB = 50_000
SEED = 1


class Loader(Protocol):
    """A loader of one epoch."""

    def __init__(self, place: str, cache: str | None, workers: int, state: dict[str, Any] | None) -> None:
        """Open the dataset at ``place``, a folder or URL; ``cache``: where copies of a remote one are kept."""

    @staticmethod
    def prepare(tokens: NDArray[np.uint16], folder: Path) -> None:
        """Write these, whose number is a multiple of ``LENGTH``, into ``folder``."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def state(self) -> dict[str, Any]:
        """From where to go on, as text can hold it."""

    def close(self) -> None:
        """End what works in the background."""


class Ours:
    """``llm.data.streaming.Stream``, as the training loop reads from it: documents are told apart, too."""

    def __init__(self, place: str, cache: str | None, workers: int, state: dict[str, Any] | None) -> None:
        from llm.data.order import Position
        from llm.data.reading import Share
        from llm.data.streaming import Stream
        from llm.utils.config import (
            CheckpointConfig,
            DataConfig,
            DistConfig,
            EvalConfig,
            ModelConfig,
            TrainConfig,
            TrainingConfig,
        )

        shape = {"dim": 64, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "ffn_dim": 64}
        train = {"global_batch_size": ROWS, "micro_batch_size": ROWS, "lr": 1e-3, "weight_decay": 0.0, "seed": SEED}
        config = TrainingConfig(
            model=ModelConfig(name="none", vocab_size=VOCAB, max_seq_len=LENGTH, **shape),
            train=TrainConfig(max_steps=1, seq_len=LENGTH, **train),
            dist=DistConfig(),
            data=DataConfig(source=place, epochs=1, num_workers=workers, cache_dir=cache),
            eval=EvalConfig(every_steps=0, batches=1, sample_tokens=0, sample_prompts=[]),
            checkpoint=CheckpointConfig(every_steps=0),
        )
        self.stream = Stream(config, Share(), lambda step: 0)
        self.position = Position(**state) if state else Position()

    @staticmethod
    def prepare(tokens: NDArray[np.uint16], folder: Path) -> None:
        from llm.data.format import Index, ShardWriter, TokenizerRecord, write_index
        from llm.data.source import BYTES
        from llm.utils.storage import open_storage

        tokens = np.append(np.uint16(0), tokens)  # the first one is no target
        starts = np.random.default_rng(SEED).random(len(tokens)) < 1 / DOCUMENT
        starts[0] = True
        storage = open_storage(str(folder))
        writer = ShardWriter(storage, "train-00000", "uint16")
        writer.add(tokens, starts)
        tokenizer = TokenizerRecord(name="bytes", sha256=BYTES.sha256, vocab_size=VOCAB, end=None)
        splits = {"train": writer.close()}
        write_index(storage, Index(dtype="uint16", tokenizer=tokenizer, row=None, loss=False, splits=splits))

    def coming(self) -> Iterator[Any]:
        position = self.position
        while True:
            picks = self.stream.order.take(position, [(position.samples, position.samples + ROWS)])
            yield picks
            if picks.over:
                return
            position = picks.after

    def __iter__(self) -> Iterator[Tensor]:
        for picks, rows in self.stream.batches(self.coming()):
            self.position = picks.after
            yield rows.tokens[:, 1:]

    def state(self) -> dict[str, Any]:
        return {"samples": self.position.samples, "counts": dict(self.position.counts)}

    def close(self) -> None:
        self.stream.close()


class Mosaic:
    """``streaming.StreamingDataset`` over MDS shards of 64 MiB, the default, without checksums, the default."""

    def __init__(self, place: str, cache: str | None, workers: int, state: dict[str, Any] | None) -> None:
        streaming = _streaming()
        where = {"remote": place, "local": cache} if cache else {"local": place}
        self.dataset = streaming.StreamingDataset(**where, batch_size=ROWS, shuffle=True, shuffle_seed=SEED)
        self.loader = streaming.StreamingDataLoader(self.dataset, batch_size=ROWS, num_workers=workers)
        if state:
            self.loader.load_state_dict(state)

    @staticmethod
    def prepare(tokens: NDArray[np.uint16], folder: Path) -> None:
        with _streaming().MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{LENGTH}"}) as writer:
            for row in tokens.reshape(-1, LENGTH):
                writer.write({"tokens": row})

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            yield batch["tokens"].to(torch.int64)

    def state(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def close(self) -> None:
        del self.loader, self.dataset
        _streaming().base.util.clean_stale_shared_memory()


class LitData:
    """``litdata.StreamingDataset`` with its ``TokensLoader``, over chunks of the size that its README gives."""

    def __init__(self, place: str, cache: str | None, workers: int, state: dict[str, Any] | None) -> None:
        import litdata

        self.dataset = litdata.StreamingDataset(
            place,
            cache_dir=cache,
            item_loader=litdata.TokensLoader(block_size=LENGTH),
            shuffle=True,
            drop_last=False,
            seed=SEED,
        )
        _allow_http()
        self.loader = litdata.StreamingDataLoader(
            self.dataset, batch_size=ROWS, num_workers=workers, worker_init_fn=_allow_http
        )
        if state:
            self.loader.load_state_dict(state)

    @staticmethod
    def prepare(tokens: NDArray[np.uint16], folder: Path) -> None:
        import litdata

        file = folder.with_suffix(".npy")
        np.save(file, tokens)
        litdata.optimize(
            fn=_rows,
            inputs=[str(file)],
            output_dir=str(folder),
            chunk_size=LENGTH * 8012,
            item_loader=litdata.TokensLoader(),
            num_workers=1,
            verbose=False,
        )
        file.unlink()

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            yield batch.to(torch.int64)

    def state(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def close(self) -> None:
        del self.loader, self.dataset


CONTENDERS: dict[str, type[Loader]] = {"ours": Ours, "mosaicml-streaming": Mosaic, "litdata": LitData}


def _streaming() -> Any:
    """mosaicml-streaming without its readers of known datasets, which need torchvision."""
    for name in ("multimodal", "text", "vision"):
        sys.modules.setdefault(f"streaming.{name}", types.ModuleType(f"streaming.{name}"))
    import streaming
    import streaming.base.util

    return streaming


def _rows(file: str) -> Iterable[NDArray[np.uint16]]:
    """What litdata stores one by one."""
    yield from np.load(file, mmap_mode="r").reshape(-1, LENGTH)


def quiet() -> None:
    """Ask nobody on the internet whether there is a newer version."""
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"


def _allow_http(worker: int = 0) -> None:
    """litdata's client has no setting for a store without TLS."""
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"
