"""The trainings that ``training.py`` compares: one shape, the same weights and batches, each as its own users run it.

Every contender is a function from starting weights (our names) to a step: rows of tokens (B, T + 1) in, loss out.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.init import init_weights
from llm.model.transformer import Transformer
from llm.utils.config import (
    CheckpointConfig,
    DataConfig,
    DistConfig,
    EvalConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
)

SHAPE = ModelConfig(
    name="20M",
    vocab_size=8192,
    dim=384,
    n_layers=8,
    n_heads=6,
    n_kv_heads=6,
    ffn_dim=1024,
    max_seq_len=256,
)
ROWS, LENGTH = 8, 256
TRAIN = TrainConfig(
    max_steps=1000, seq_len=LENGTH, global_batch_size=ROWS, micro_batch_size=ROWS, lr=3e-4, weight_decay=0.1, seed=0
)

Step = Callable[[Tensor], float]


def weights() -> dict[str, Tensor]:
    """Where all start from, by our names."""
    model = Transformer(SHAPE)
    init_weights(model, TRAIN.seed, SHAPE)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def ours(compiled: bool) -> Step:
    """This project's model, loss, clipping and optimizer, as its training loop calls them."""
    from llm.data.reading import Rows
    from llm.tools.bench_step import BenchStep
    from llm.train.dist import lay_out
    from llm.train.world import World

    config = TrainingConfig(
        model=SHAPE,
        train=msgspec.structs.replace(TRAIN, compile=compiled),
        dist=DistConfig(),
        data=DataConfig(source="none"),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), grouped=False)
    step = BenchStep(config, lay_out(config.dist, world))
    return lambda rows: step(Rows(rows))


def hugging_face(compiled: bool) -> Step:
    """transformers' LlamaForCausalLM with its own loss, torch's fused AdamW and clipping, as in its Trainer."""
    model = hugging_face_model(use_cache=False)
    forward: Any = torch.compile(model) if compiled else model
    return torch_step(model, lambda rows: _hugging_face_loss(forward, rows))


def hugging_face_model(use_cache: bool = True) -> Any:
    """transformers' model with the weights that all start from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.dim,
        intermediate_size=SHAPE.ffn_dim,
        num_hidden_layers=SHAPE.n_layers,
        num_attention_heads=SHAPE.n_heads,
        num_key_value_heads=SHAPE.n_kv_heads,
        max_position_embeddings=SHAPE.max_seq_len,
        rms_norm_eps=SHAPE.norm_eps,
        rope_theta=SHAPE.rope_theta,
        tie_word_embeddings=False,
        use_cache=use_cache,
    )
    model = LlamaForCausalLM(config)  # SDPA is its default attention
    load(model, {_hugging_face_name(name): value for name, value in weights().items()})
    return model


def _hugging_face_loss(forward: Any, rows: Tensor) -> Tensor:
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    loss: Tensor = forward(input_ids=tokens, labels=tokens, shift_labels=targets).loss
    return loss


def _hugging_face_name(name: str) -> str:
    if name == "head.weight":
        return "lm_head.weight"
    for ours_, theirs in (
        ("embedding.", "embed_tokens."),
        ("blocks.", "layers."),
        ("attention_norm.", "input_layernorm."),
        ("ffn_norm.", "post_attention_layernorm."),
        *((f"attention.w{x}.", f"self_attn.{x}_proj.") for x in "qkvo"),
        *((f"ffn.{x}.", f"mlp.{x}_proj.") for x in ("gate", "up", "down")),
    ):
        name = name.replace(ours_, theirs)
    return f"model.{name}"


def torchtitan(compiled: bool) -> Step:
    """torchtitan's Llama 3 decoder. Its settings refuse SDPA, the one attention that a CPU has: it is put in here."""
    with WithoutTriton():
        from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
        from torchtitan.models.common.attention import ScaledDotProductAttention
        from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
        from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

    from torch.nn.attention import SDPBackend

    ScaledDotProductAttention.sdpa_backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    filled = {"weight": nn.init.ones_}
    norm = RMSNorm.Config(normalized_shape=SHAPE.dim, eps=SHAPE.norm_eps, param_init=filled)
    layers = [
        Llama3TransformerBlock.Config(
            attention_norm=norm,
            ffn_norm=norm,
            attention=make_gqa_config(
                dim=SHAPE.dim,
                n_heads=SHAPE.n_heads,
                n_kv_heads=SHAPE.n_kv_heads,
                wqkv_param_init=filled,
                wo_param_init=filled,
                inner_attention=ScaledDotProductAttention.Config(),
                fuse_qkv=False,
                rope=CosSinRoPE.Config(
                    dim=SHAPE.dim // SHAPE.n_heads, max_seq_len=SHAPE.max_seq_len, theta=SHAPE.rope_theta
                ),
            ),
            feed_forward=make_ffn_config(
                dim=SHAPE.dim, hidden_dim=SHAPE.ffn_dim, w1_param_init=filled, w2w3_param_init=filled
            ),
        )
        for _ in range(SHAPE.n_layers)
    ]
    config = Llama3Model.Config(
        dim=SHAPE.dim,
        vocab_size=SHAPE.vocab_size,
        tok_embeddings=Embedding.Config(num_embeddings=SHAPE.vocab_size, embedding_dim=SHAPE.dim, param_init=filled),
        norm=norm,
        lm_head=Linear.Config(in_features=SHAPE.dim, out_features=SHAPE.vocab_size, param_init=filled),
        layers=layers,
    )
    model = config.build()
    model.init_states()
    load(model, {_torchtitan_name(name): value for name, value in weights().items()})
    if compiled:  # block by block, as its own trainer does
        for layer in model.layers.values():
            layer.compile(backend="inductor", fullgraph=True)
    return torch_step(model, lambda rows: _cross_entropy(model(rows[:, :-1]), rows[:, 1:]))


def _torchtitan_name(name: str) -> str:
    for ours_, theirs in (
        ("embedding.", "tok_embeddings."),
        ("blocks.", "layers."),
        ("head.", "lm_head."),
        *((f"attention.w{x}.", f"attention.qkv_linear.w{x}.") for x in "qkv"),
        ("ffn.gate.", "feed_forward.w1."),
        ("ffn.down.", "feed_forward.w2."),
        ("ffn.up.", "feed_forward.w3."),
    ):
        name = name.replace(ours_, theirs)
    return name


class Anything(types.ModuleType):
    """A module that has whatever is asked of it: decorators that change nothing, and more of itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")

    def __call__(self, *given: Any, **_: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) else self


class WithoutTriton:
    """torchtitan imports triton wherever it runs; what it finds here does nothing and is gone afterwards."""

    NAMES = ("triton", "triton.language", "triton.language.extra")

    def __enter__(self) -> None:
        import torch._inductor.compile_fx  # noqa: F401  # it would take what it finds for the real one

        for name in self.NAMES:
            sys.modules[name] = Anything(name)

    def __exit__(self, *_: object) -> None:
        for name in self.NAMES:
            del sys.modules[name]


def litgpt(compiled: bool) -> Step:
    """litgpt's GPT with the settings of its Llama models."""
    model = litgpt_model()
    forward: Any = torch.compile(model) if compiled else model
    return torch_step(model, lambda rows: _cross_entropy(forward(rows[:, :-1]), rows[:, 1:]))


def litgpt_model() -> Any:
    """litgpt's model with the weights that all start from."""
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=SHAPE.max_seq_len,
        padded_vocab_size=SHAPE.vocab_size,
        vocab_size=SHAPE.vocab_size,
        n_layer=SHAPE.n_layers,
        n_head=SHAPE.n_heads,
        n_query_groups=SHAPE.n_kv_heads,
        n_embd=SHAPE.dim,
        intermediate_size=SHAPE.ffn_dim,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=SHAPE.norm_eps,
        mlp_class_name="LLaMAMLP",
        rope_base=int(SHAPE.rope_theta),
    )
    model = GPT(config)
    given = weights()
    for layer in range(SHAPE.n_layers):
        parts = [given.pop(f"blocks.{layer}.attention.w{x}.weight") for x in "qkv"]
        given[f"blocks.{layer}.attention.qkv.weight"] = torch.cat(parts)
    load(model, {_litgpt_name(name): value for name, value in given.items()})
    return model


def _litgpt_name(name: str) -> str:
    if name == "head.weight":
        return "lm_head.weight"
    if name == "norm.weight":
        return "transformer.ln_f.weight"
    for ours_, theirs in (
        ("embedding.", "transformer.wte."),
        ("blocks.", "transformer.h."),
        ("attention_norm.", "norm_1."),
        ("ffn_norm.", "norm_2."),
        ("attention.wo.", "attn.proj."),
        ("attention.qkv.", "attn.qkv."),
        ("ffn.gate.", "mlp.fc_1."),
        ("ffn.up.", "mlp.fc_2."),
        ("ffn.down.", "mlp.proj."),
    ):
        name = name.replace(ours_, theirs)
    return name


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def load(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Fill every parameter of ``model``, from exactly these."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == values.keys(), sorted(parameters.keys() ^ values.keys())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def torch_step(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Step:
    """The step of a plain PyTorch training: backward, clip, fused AdamW without decay on norms, drop the gradients."""
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": TRAIN.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=TRAIN.lr, betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.eps, fused=True)

    def step(rows: Tensor) -> float:
        loss = loss_of(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), TRAIN.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


CONTENDERS: dict[str, Callable[[bool], Step]] = {
    "ours": ours,
    "transformers": hugging_face,
    "torchtitan": torchtitan,
    "litgpt": litgpt,
}
