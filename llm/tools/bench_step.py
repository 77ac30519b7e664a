"""A training step on made-up tokens, from the trainer's own pieces: what benchmarks time."""

from __future__ import annotations

import torch

from llm.data.reading import Rows
from llm.model.init import init_weights
from llm.train.dist import Layout
from llm.train.optim import build, clip_coefficient
from llm.train.phases import Phases
from llm.train.step import Passes
from llm.utils.config import TrainingConfig


class BenchStep:
    """All that a step of the training loop computes: passes, gradient norm, clipping, update. No data, no saves."""

    def __init__(self, config: TrainingConfig, layout: Layout) -> None:
        self.train, self.layout = config.train, layout
        self.passes = Passes(config, layout)
        self.phases = Phases(layout.world.device)
        for part in self.passes.parts:
            init_weights(part, config.train.seed, config.model)
        self.optimizer = build(self.passes.named_parameters(), config.train, config.model)

    def rows(self, generator: torch.Generator) -> Rows:
        """This rank's rows (R, seq_len + 1) of a global batch, drawn evenly from the vocabulary."""
        rows = self.train.global_batch_size // self.layout.dp
        shape = (rows, self.train.seq_len + 1)
        return Rows(torch.randint(self.passes.config.model.vocab_size, shape, generator=generator))

    def __call__(self, rows: Rows) -> float:
        """One update from this rank's ``rows`` (R, seq_len + 1); returns the mean loss over all ranks' tokens."""
        train = self.train
        tokens = train.global_batch_size * train.seq_len
        sums = self.passes.train(rows, tokens, self.phases)
        with self.phases("optimizer"), torch.no_grad():
            total = torch.stack((sums[1].double(), self.passes.norm_squares().double()))
            loss, squares = self.layout.world.sum(total).tolist()
            if (coefficient := clip_coefficient(squares**0.5, train.grad_clip)) < 1:
                torch._foreach_mul_(self.optimizer.gradients(), coefficient)
            self.optimizer.step(train.lr)
            self.optimizer.zero_grad()
        return float(loss) / tokens
