"""The passes of one step on one rank: rows of tokens in, sums of losses and gradients out, under every layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llm.data.reading import Rows
from llm.model.transformer import Transformer
from llm.train.dist import Layout, parallelize
from llm.train.phases import Phases
from llm.utils.config import TrainingConfig
from llm.utils.sharding import copies, local

IGNORED = -100  # a target that does not count


class Passes:
    """The model of this rank, spread as ``layout`` says, and what is done with it.

    ``parts`` are the stages of this rank: one, the whole model, where there is no pipeline. They are on their device,
    without values, until ``llm.model.init`` or a checkpoint fills them.
    """

    def __init__(self, config: TrainingConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.device = layout.world.device
        self.dtype = getattr(torch, config.train.dtype)
        train = config.train
        self.parts = [self._build(layers) for layers in self._layers()]
        self.pipeline = self.tied = None
        if layout.pp > 1:
            from llm.train.pipeline import Pipeline, TiedEnds

            positions = train.seq_len // layout.cp
            self.pipeline = Pipeline(self.parts, layout, train.micro_batch_size, positions, self.dtype, 1.0)
            self.tied = TiedEnds(self.parts, layout) if config.model.tie_embeddings else None

    def _layers(self) -> list[range]:
        if self.layout.pp == 1:
            return [range(self.config.model.n_layers)]
        from llm.train.pipeline import stage_layers

        return stage_layers(self.config.model, self.config.train.seq_len, self.config.dist, self.layout.pp_rank)

    def _build(self, layers: range) -> Transformer:
        grouped = self.layout.world.grouped
        with torch.device("meta" if grouped else self.device):  # what will be sharded takes no memory before
            model = Transformer(self.config.model, layers)
        parallelize(model, self.layout, self.config)
        if grouped:
            model.to_empty(device=self.device)
            model.tie()
        if self.layout.cp > 1 or self.layout.pp > 1:  # what comes in does not show them
            positions = self._own(torch.arange(self.config.train.seq_len).unsqueeze(0))[0].to(self.device)
            model.register_forward_pre_hook(
                lambda _, inputs, given: (inputs, {**given, "positions": positions}), with_kwargs=True
            )
        if model.last:
            model.head.chunk, model.head.z_loss = self.config.train.loss_chunk, self.config.train.z_loss
        return model

    # --- parameters ------------------------------------------------------------------------------------------------

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Those of all stages on this rank, by canonical name."""
        return {name: parameter for part in self.parts for name, parameter in part.named_parameters()}

    def copies(self, name: str, parameter: Tensor) -> int:
        """On how many ranks the values that this rank holds of ``parameter`` lie."""
        twice = 2 if self.tied is not None and name == "embedding.weight" else 1
        return copies(parameter) * twice

    def norm_squares(self) -> Tensor:
        """Float64 (): summed over all ranks, the square of the gradient's norm. Values on several ranks count once."""
        squares = [
            local(parameter.grad).square().sum(dtype=torch.float64) / self.copies(name, parameter)
            for name, parameter in self.named_parameters().items()
            if parameter.grad is not None
        ]
        return torch.stack(squares).sum()

    # --- passes ----------------------------------------------------------------------------------------------------

    def train(self, rows: Rows, positions: int, phases: Phases) -> Tensor:
        """Gradients of the sum of losses over ``positions``, accumulated over the micro-batches of ``rows``.

        ``rows`` (R, T + 1) are this rank's of the global batch. Returns sums over its positions, float32 (2): what is
        trained on, and the cross-entropy alone; zeros on ranks whose losses are another's too (Layout.speaks).
        """
        # FSDP averages gradients over its ranks; ``positions`` are those of all of them. Gradients are reduced after
        # every micro-batch: holding them back would need a whole unsharded copy.
        scale = self.layout.gathered / positions
        if self.pipeline is not None:
            self.pipeline.scale = scale
            with phases("pipeline"):  # forward and backward alternate
                sums = self.pipeline.run(*self._split(rows), rows.documents, backward=True)
                if self.tied is not None:
                    self.tied.reduce()
        else:
            sums = torch.zeros(2, device=self.device)
            for micro in rows.split(self.config.train.micro_batch_size):
                with phases("forward"):
                    losses = self._losses(micro)
                with phases("backward"):
                    (losses[0] * scale).backward()  # type: ignore[no-untyped-call]
                sums += losses.detach()
        return sums if self.layout.speaks else torch.zeros_like(sums)

    @torch.no_grad()
    def evaluate(self, rows: Rows) -> Tensor:
        """The same sums (2) without gradients."""
        size = self.config.train.micro_batch_size
        sums = torch.zeros(2, device=self.device)
        if self.pipeline is not None:
            sums = self.pipeline.run(*self._padded(*self._split(rows), rows.documents), backward=False)
        else:
            for micro in rows.split(size):
                sums += self._losses(micro)
        return sums if self.layout.speaks else torch.zeros_like(sums)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of ``tokens`` (B, T) for any T, the same on every rank. Not with a pipeline or parts of
        sequences; see :attr:`can_generate`."""
        length = tokens.shape[1]
        width = -(-length // self.layout.tp) * self.layout.tp  # tensor-parallel ranks have equally many positions
        padded = nn.functional.pad(tokens, (0, width - length))
        with self._precision():
            logits: Tensor = self.parts[0](padded)
        return logits[:, :length]

    def tokens(self, rows: Rows) -> int:
        """Targets of ``rows`` that count and whose losses this rank gives; their sum over all ranks is their number."""
        if not self.layout.speaks:
            return 0
        if rows.counted is None:
            return len(rows) * self.config.train.seq_len // self.layout.cp
        return int(self._own(rows.counted).sum())

    @property
    def can_generate(self) -> bool:
        """Does :meth:`logits` work in this layout?"""
        return self.layout.pp == 1 and self.layout.cp == 1

    def _losses(self, rows: Rows) -> Tensor:
        tokens, targets = self._split(rows)
        with self._precision():
            losses: Tensor = self.parts[0](tokens, targets, documents=rows.documents)
        return losses

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """FSDP casts by itself, a plain model needs autocast."""
        enabled = not self.layout.world.grouped and self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            yield

    def _split(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Tokens and targets (R, T / cp) of rows (R, T + 1): the positions that this rank has."""
        tokens = rows.tokens.to(self.device)
        targets = tokens[:, 1:]
        if rows.counted is not None:
            targets = targets.where(rows.counted.to(self.device), IGNORED)
        return self._own(tokens[:, :-1]), self._own(targets)

    def _own(self, x: Tensor) -> Tensor:
        if self.layout.cp == 1:
            return x
        from llm.train.context_parallel import own_positions

        return x[:, own_positions(x.shape[1], self.layout.cp, self.layout.cp_rank).to(x.device)]

    def _padded(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As many micro-batches as the pipeline wants; rows that are added do not count."""
        rows, turn = tokens.shape[0], self.config.train.micro_batch_size * self.layout.pp
        more = (0, 0, 0, -rows % turn)
        pad = nn.functional.pad
        return (
            pad(tokens, more),
            pad(targets, more, value=IGNORED),
            documents if documents is None else pad(documents, more),
        )
