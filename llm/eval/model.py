"""A run's model at one of its commits, as an evaluation uses it: on one device, or spread over all ranks.

Shapes: B rows, T columns of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from llm.checkpoint.format import Commit
from llm.checkpoint.lineage import read_manifest
from llm.data.tokenizer import Tokenizer
from llm.inference.generate import generate
from llm.inference.load import load_model
from llm.inference.rows import CachedRows, RecomputedRows, Rows
from llm.inference.sampling import Sampling
from llm.train.base import check_base, fill, identity, own
from llm.train.dist import Layout
from llm.train.lora import trained
from llm.train.pieces import local_pieces
from llm.train.resharding import load as load_tensors
from llm.train.step import Passes
from llm.utils.config import ConfigError, DistConfig, TrainingConfig
from llm.utils.storage import open_storage


class Model:
    """All ranks make one and call it together; those that share a model's parts with the same rows.

    It computes in the type that the run trained in, in which one rank holds the whole model, or ``dist.tp`` = all ranks
    their parts of its matrices. Any other layout, and adapters, are spread as in training, in float32. Raises
    CheckpointError, and ConfigError for a layout that cannot be.
    """

    def __init__(self, config: TrainingConfig, run_url: str, commit: Commit, dist: DistConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.device = layout.world.device
        dtype = getattr(torch, config.train.dtype)
        self.limit = config.model.max_seq_len // dist.tp * dist.tp  # positions of a row
        self.vocabulary = config.model.vocab_size
        self.passes: Passes | None = None
        if layout.world.grouped and (dist.tp < layout.world.size or config.lora.rank):
            self.passes = _spread(config, run_url, commit, dist, layout)
            self.model = self.passes.parts[0]
        else:
            self.model, _ = load_model(config, run_url, self.device, dtype, commit, layout.world)
        self.dtype = dtype

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        """Of each row of tokens, float32 logits (wanted, V) at its last ``wanted`` places.

        Rows are padded on the right: causal attention never looks there.
        """
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)  # (B, T)
        if self.passes is not None:
            whole = self.passes.logits(tokens)  # (B, T, V)
            return [each[len(row) - n : len(row)].float() for each, row, n in zip(whole, rows, wanted, strict=True)]
        places = [
            at * width + column
            for at, (row, n) in enumerate(zip(rows, wanted, strict=True))
            for column in range(len(row) - n, len(row))
        ]
        found = self.model(tokens, wanted=torch.tensor(places, device=self.device))  # (places, V)
        return list(found.float().split(list(wanted)))

    def generate(
        self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
    ) -> list[list[int]]:
        """Tokens that follow each prompt, the last one included that ended it. The same on all ranks."""
        done = generate(self._rows(), tokenizer, prompts, samplings, self.limit)
        return [each.tokens for each in done]

    def _rows(self) -> Rows:
        """With keys and values kept, unless matrices and shards are both spread."""
        if self.layout.tp > 1 and self.passes is not None:
            return RecomputedRows(self.passes.logits, self.limit, self.device)
        rows = CachedRows(self.model, parts=self.layout.tp)
        rows.dtype = self.dtype  # what blocks compute in; the shards of several ranks are float32
        return rows


def _spread(config: TrainingConfig, run_url: str, commit: Commit, dist: DistConfig, layout: Layout) -> Passes:
    """The model over the ranks of ``layout``, each with its own part of the commit's weights."""
    shape = config.model
    for name, value in (
        ("n_heads", shape.n_heads),
        ("n_kv_heads", shape.n_kv_heads),
        ("ffn_dim", shape.ffn_dim),
        ("vocab_size", shape.vocab_size),
    ):
        if value % dist.tp:
            raise ConfigError(
                f"dist.tp={dist.tp} does not divide the run's model.{name}={value}: choose another degree"
            )
    train = msgspec.structs.replace(config.train, compile=False, activation_checkpointing="none", float8="off")
    passes = Passes(msgspec.structs.replace(config, dist=dist, train=train), layout)
    storage = open_storage(run_url)
    manifest = read_manifest(storage, commit)
    parameters = passes.named_parameters()
    if config.lora.rank:
        fill(config, parameters)
        check_base(identity(config, own(passes), layout.world), manifest.state.get("base"))
    pieces = local_pieces({f"model.{name}": value for name, value in trained(parameters).items()})
    load_tensors(storage, commit, manifest, pieces, layout.world, prefixes=("model.",))
    passes.parts[0].eval().requires_grad_(False)
    return passes
