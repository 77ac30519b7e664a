"""Training batches whose position is one integer: the number of sequences that the run has gone past.

Which window of the text sequence n is follows from (seed, n) alone, never from the number of ranks, of loader processes
or of sequences in a batch. So a commit needs only n to continue exactly, also on another number of ranks.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from llm.data.permutation import mix, permute
from llm.utils.config import ConfigError

Ranges = tuple[tuple[int, int], ...]  # sequences [first, last) of a global batch


class Windows:
    """Fixed windows over a text. Map-style: item ``ranges`` is this rank's rows of the global batch that they make up,
    uint8 (rows, seq_len + 1).

    Window i starts at byte i x seq_len; its last byte is also the first of the next window: the target of its last
    position. An epoch visits each window once, in an order of its own; a global batch may span two epochs.
    """

    def __init__(self, text: memoryview, seq_len: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.seq_len, self.seed, self.rank, self.world_size = seq_len, seed, rank, world_size
        self.count = (len(text) - 1) // seq_len  # windows in an epoch
        if self.count < 1:
            raise ConfigError(
                f"train.seq_len={seq_len} is longer than the text's {len(text)} bytes: lower it or give more text"
            )
        self.tokens = _view(text)

    def window(self, sequence: int) -> int:
        """Index of the window that is ``sequence`` of the run."""
        epoch, index = divmod(sequence, self.count)
        return permute(index, self.count, mix(self.seed) + epoch)

    def __getitem__(self, ranges: Ranges) -> Tensor:
        sequences = list(chain.from_iterable(range(*each) for each in ranges))
        rows = len(sequences) // self.world_size
        starts = [self.window(each) * self.seq_len for each in sequences[self.rank * rows : (self.rank + 1) * rows]]
        return torch.stack([self.tokens[start : start + self.seq_len + 1] for start in starts])


def held_out_batches(
    text: memoryview, seq_len: int, global_batch: int, batches: int, rank: int, world_size: int
) -> Iterator[Tensor]:
    """This rank's rows of the first ``batches`` batches of the held-out text, in order: (rows, seq_len + 1) each.

    Fewer when the text is short; the last batch is cut so that every rank has equally many rows.
    """
    count = (len(text) - 1) // seq_len
    tokens = _view(text)
    for batch in range(batches):
        first = batch * global_batch
        rows = (min(first + global_batch, count) - first) // world_size
        if rows < 1:
            return
        starts = [(first + rank * rows + row) * seq_len for row in range(rows)]
        yield torch.stack([tokens[start : start + seq_len + 1] for start in starts])


def batches(windows: Windows, wanted: Iterable[Ranges], num_workers: int) -> Iterator[Tensor]:
    """The items of ``windows`` that are ``wanted``, in order, fetched by ``num_workers`` processes (0 = none)."""
    if num_workers == 0:
        return (windows[ranges] for ranges in wanted)
    from torch.utils.data import DataLoader

    loader: DataLoader[Tensor] = DataLoader(
        windows,  # type: ignore[arg-type]
        batch_size=None,  # an item is already a batch
        sampler=wanted,
        num_workers=num_workers,
        worker_init_fn=_ignore_signals,
        multiprocessing_context="fork",  # a spawned worker would import torch again: seconds at every start
    )
    return iter(loader)


def _ignore_signals(_: int) -> None:
    """Some process trackers signal the whole tree: a worker that died of it would take its rank down, unsaved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _view(text: memoryview) -> Tensor:
    """The text as a tensor, without a copy. torch warns that it may not be written to; nothing here writes."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(text, dtype=torch.uint8)
