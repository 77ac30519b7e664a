"""Names of the weights of a Llama, Qwen or Mistral: ours, Hugging Face's, and those of torchtitan and Meta.

All three keep a linear weight as (out, in). They differ in which values of a head the rotary embedding turns together:
ours and Hugging Face's pair the first half with the second, torchtitan's and Meta's each value with its neighbour. So
the rows of wq and wk of the latter are put into another order, and their optimizer states with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from llm.checkpoint.format import CheckpointError

OURS, HF, TITAN = "ours", "hf", "titan"

# {} is the number of the layer.
_HF = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.attention.wq.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks.{}.attention.wk.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks.{}.attention.wv.bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks.{}.attention.wo.bias": "model.layers.{}.self_attn.o_proj.bias",
    "blocks.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attention.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.ffn.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.ffn.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.ffn.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "blocks.{}.ffn.gate.bias": "model.layers.{}.mlp.gate_proj.bias",
    "blocks.{}.ffn.up.bias": "model.layers.{}.mlp.up_proj.bias",
    "blocks.{}.ffn.down.bias": "model.layers.{}.mlp.down_proj.bias",
    "blocks.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_TITAN = {
    "tok_embeddings.weight": "embedding.weight",
    "layers.{}.attention.wq.weight": "blocks.{}.attention.wq.weight",
    "layers.{}.attention.wk.weight": "blocks.{}.attention.wk.weight",
    "layers.{}.attention.wv.weight": "blocks.{}.attention.wv.weight",
    "layers.{}.attention.qkv_linear.wq.weight": "blocks.{}.attention.wq.weight",
    "layers.{}.attention.qkv_linear.wk.weight": "blocks.{}.attention.wk.weight",
    "layers.{}.attention.qkv_linear.wv.weight": "blocks.{}.attention.wv.weight",
    "layers.{}.attention.wo.weight": "blocks.{}.attention.wo.weight",
    "layers.{}.feed_forward.w1.weight": "blocks.{}.ffn.gate.weight",
    "layers.{}.feed_forward.w3.weight": "blocks.{}.ffn.up.weight",
    "layers.{}.feed_forward.w2.weight": "blocks.{}.ffn.down.weight",
    "layers.{}.attention_norm.weight": "blocks.{}.attention_norm.weight",
    "layers.{}.ffn_norm.weight": "blocks.{}.ffn_norm.weight",
    "norm.weight": "norm.weight",
    "output.weight": "head.weight",
    "lm_head.weight": "head.weight",
}
_TABLES = {HF: {theirs: ours for ours, theirs in _HF.items()}, TITAN: _TITAN}
_MARKS = {HF: "model.embed_tokens.weight", TITAN: "tok_embeddings.weight"}
_DROPPED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|freqs_cis|rope\.cache)")  # worked out again by every forward
_OPTIMIZER = re.compile(r"(?:optimizer|optim)\.state\.(.+)\.(exp_avg|exp_avg_sq|step)")
_LAYER = re.compile(r"((?:model\.)?layers\.)(\d+)(\..+)")


@dataclass(frozen=True)
class Target:
    """What becomes of a tensor. ``kind`` is model, exp_avg, exp_avg_sq, step or dropped."""

    name: str
    kind: str

    @property
    def rotary(self) -> str | None:
        """``wq`` or ``wk`` of the layer, whose rows the rotary embedding pairs."""
        match = re.fullmatch(r".*\.attention\.(wq|wk)\.weight", self.name)
        return match[1] if match else None


@dataclass(frozen=True)
class Family:
    """Whose names they are; ``prefix`` is what stands before all of the model's."""

    kind: str
    prefix: str

    def target(self, name: str) -> Target | None:
        """Our name, or None for what is not part of the model or its optimizer.

        Raises CheckpointError for a weight of the model that our Llama does not have.
        """
        kind, inner = "model", name.removeprefix(self.prefix)
        if match := _OPTIMIZER.fullmatch(name):
            inner, kind = match[1].removeprefix(self.prefix), match[2]
        elif not name.startswith(self.prefix):
            return None
        if _DROPPED.fullmatch(inner):
            return Target("", "dropped")
        layer = _LAYER.fullmatch(inner)
        pattern = f"{layer[1]}{{}}{layer[3]}" if layer else inner
        ours = _TABLES[self.kind].get(pattern)
        if ours is None:
            if layer or kind != "model":
                raise CheckpointError(f"tensor {name} is no part of the Llama that this program trains")
            return None
        ours = ours.format(layer[2]) if layer else ours
        return Target(f"model.{ours}" if kind == "model" else f"optim.{kind}.{ours}", kind)


def recognise(names: Iterable[str]) -> Family | None:
    """Whose names these are, told by that of the token embedding; None for anybody else's."""
    for name in names:
        for kind, mark in _MARKS.items():
            prefix = name.removesuffix(mark)
            if name.endswith(mark) and (not prefix or prefix.endswith(".")) and not _OPTIMIZER.fullmatch(name):
                if prefix.startswith(("optim.", "optimizer.")):
                    continue
                return Family(kind, prefix)
    return None


def to_hf(name: str) -> str | None:
    """Hugging Face's name of a tensor of our checkpoints; None for what is no weight."""
    inner = name.removeprefix("model.")
    layer = re.fullmatch(r"blocks\.(\d+)(\..+)", inner)
    theirs = _HF.get(f"blocks.{{}}{layer[2]}" if layer else inner)
    if not name.startswith("model.") or theirs is None:
        return None
    return theirs.format(layer[1]) if layer else theirs


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk, or of their optimizer states, from neighbours that are paired to halves that are paired."""
    rows = weight.shape[0]
    paired = weight.view(heads, rows // heads // 2, 2, *weight.shape[1:])
    return paired.transpose(1, 2).reshape(weight.shape)
