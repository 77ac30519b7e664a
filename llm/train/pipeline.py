"""Pipeline parallelism: each rank has one stage of layers, or several; micro-batches flow through them.

The schedules are torch's: 1F1B (Narayanan et al., PipeDream, 2019), and interleaved with several stages on each rank
(Narayanan et al., Megatron-LM, 2021). Which layers a stage has, :mod:`llm.estimate.stages` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from llm.estimate.stages import split_layers
from llm.model.transformer import Transformer
from llm.train.dist import Layout
from llm.utils.config import DistConfig, ModelConfig


def stage_layers(model: ModelConfig, seq_len: int, config: DistConfig, pp_rank: int) -> list[range]:
    """The layers of each stage on ``pp_rank``: stage i of the pipeline is on rank i modulo the number of ranks."""
    stages = split_layers(model, seq_len, config.pp * config.pp_stages_per_rank)
    return stages[pp_rank :: config.pp]


class Pipeline:
    """The stages of this rank, and schedules for as many micro-batches as are asked for.

    ``rows`` and ``positions`` are those of a micro-batch on this rank; all micro-batches have the same shape.
    """

    def __init__(
        self, stages: Sequence[Transformer], layout: Layout, rows: int, positions: int, dtype: torch.dtype, scale: float
    ) -> None:
        self.stages, self.layout, self.rows, self.positions, self.dtype = stages, layout, rows, positions, dtype
        self.scale = scale  # what losses are multiplied by before the backward pass
        self.losses: list[Tensor] = []  # of the micro-batches of this step, on the last stage: (2) each
        self._schedules: dict[int, Any] = {}

    def run(self, tokens: Tensor, targets: Tensor, documents: Tensor | None, backward: bool) -> Tensor:
        """Sums of losses (2) of ``tokens`` and ``targets`` (N x rows, T); zeros where there is no last stage.

        ``documents`` (N x rows, all positions of a row), as the model takes them.
        """
        micro = tokens.shape[0] // self.rows
        schedule = self._schedule(micro)
        first = self.stages[0].first
        last = self.stages[-1].last
        self.losses = []
        inputs = (tokens,) if first else ()
        given = {"targets": targets} if last else {}
        if documents is not None:
            given["documents"] = documents
        # The last stage gives losses already: its loss function only picks one.
        run = schedule.step if backward else schedule.eval
        run(*inputs, target=targets if last else None, losses=[] if last else None, **given)
        if not self.losses:
            return torch.zeros(2, device=tokens.device)
        return torch.stack(self.losses).sum(0)

    def _schedule(self, micro: int) -> Any:
        if micro not in self._schedules:
            count = self.layout.pp * len(self.stages)
            stages = [
                PipelineStage(
                    stage,
                    self.layout.pp_rank + number * self.layout.pp,
                    count,
                    self.layout.world.device,
                    input_args=self._shape(stage, out=False),
                    output_args=self._shape(stage, out=True),
                    group=self.layout.group("pp"),
                )
                for number, stage in enumerate(self.stages)
            ]
            options: dict[str, Any] = {"loss_fn": self._note_loss, "scale_grads": False}
            self._schedules[micro] = (
                Schedule1F1B(stages[0], micro, **options)
                if len(stages) == 1
                else ScheduleInterleaved1F1B(stages, micro, **options)  # type: ignore[arg-type]
            )
        return self._schedules[micro]

    def _note_loss(self, losses: Tensor, _: Tensor) -> Tensor:
        self.losses.append(losses.detach())
        return losses[0] * self.scale

    def _shape(self, stage: Transformer, out: bool) -> Tensor:
        """An empty tensor on the meta device like those that come into ``stage``, or out of it."""
        if out and stage.last:
            return torch.empty(2, device="meta", requires_grad=True)
        if not out and stage.first:
            return torch.empty(self.rows, self.positions, dtype=torch.int64, device="meta")
        width = stage.config.dim
        shape = (self.rows, self.positions // self.layout.tp, width)
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)


class TiedEnds:
    """An embedding that a pipeline has twice, on its first stage and in the head of its last: kept equal."""

    def __init__(self, stages: Sequence[Transformer], layout: Layout) -> None:
        self.weight = None
        ends = {"first": stages[0].first, "last": stages[-1].last}
        if any(ends.values()):
            self.weight = (stages[0] if ends["first"] else stages[-1]).embedding.weight
        per_stage = layout.world.size // layout.pp
        pairs = [[rank, rank + (layout.pp - 1) * per_stage] for rank in range(per_stage)]
        mine = [pair for pair in pairs if layout.world.rank in pair]
        # All ranks make all groups, in the same order.
        groups = [dist.new_group(pair) for pair in pairs]
        self.group = groups[pairs.index(mine[0])] if mine else None

    def reduce(self) -> None:
        """Add up the gradients of both ends."""
        if self.group is not None and self.weight is not None and self.weight.grad is not None:
            grad: Any = self.weight.grad
            dist.all_reduce(grad.to_local() if hasattr(grad, "to_local") else grad, group=self.group)
