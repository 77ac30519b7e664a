"""What is worked out from a config alone, held against models, torch's own counters, and steps on fake tensors."""

from __future__ import annotations

import msgspec
import pytest
import torch
import yaml

from llm.estimate.flops import flops_per_token
from llm.estimate.hardware import HardwareConfig
from llm.estimate.layouts import fitting, nearest
from llm.estimate.memory import checkpoint_bytes, memory
from llm.estimate.parameters import parameter_count, stage_parameters
from llm.estimate.stages import split_layers
from llm.model.transformer import Transformer
from llm.tools.profile_memory import compare, compare_state
from llm.utils.config import DistConfig, ModelConfig, TrainingConfig
from llmops.config.compose import load_config
from llmops.resources import conf_dir

SHAPES = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
DEVICE = HardwareConfig(
    name="a",
    memory_gib=80,
    bf16_tflops=989,
    fp32_tflops=67,
    memory_gb_s=3350,
    intra_node_gb_s=450,
    inter_node_gb_s=50,
    gpus_per_node=8,
)


def config(*overrides: str) -> TrainingConfig:
    return msgspec.convert(load_config(overrides).data, TrainingConfig)


def shape(name: str) -> ModelConfig:
    return msgspec.convert(yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text()), ModelConfig)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(shape(name))
    assert parameter_count(shape(name)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_stages_are_those_of_their_models(tied: bool) -> None:
    model = msgspec.structs.replace(shape("tiny"), tie_embeddings=tied, qk_norm=True, qkv_bias=True, ffn_bias=True)
    for layers in split_layers(model, 256, 3):
        with torch.device("meta"):
            stage = Transformer(model, layers)
        assert sum(stage_parameters(model, layers)) == sum(p.numel() for p in stage.parameters())


def test_flops_are_those_that_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, seq_len = shape("tiny"), 64
    tokens = torch.zeros(2, seq_len, dtype=torch.int64)
    net = Transformer(model)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # torch counts nothing for the CPU's own kernel of attention; as plain products it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(tokens, tokens)[0].backward()
    assert counter.get_total_flops() == pytest.approx(flops_per_token(model, seq_len) * 2 * seq_len, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_memory_is_what_a_step_on_fake_tensors_holds(dtype: str, checkpointing: str) -> None:
    found = compare(
        config(
            "train.global_batch_size=8",
            "train.micro_batch_size=8",
            f"train.dtype={dtype}",
            f"train.activation_checkpointing={checkpointing}",
        )
    )
    ratios = {kind: found["estimated"][kind] / value for kind, value in found["measured"].items()}
    assert ratios["state"] == pytest.approx(1, abs=0.05)
    assert ratios["activations"] == pytest.approx(1, abs=0.15)
    assert ratios["peak"] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_an_optimizer_keeps_as_much_as_it_is_said_to(optimizer: str) -> None:
    """With real tensors: what the optimizer's checkpoint holds beside the weights."""
    from llm.train.optim import build

    tiny = config(f"train.optimizer={optimizer}")
    model = Transformer(tiny.model)
    state = build(dict(model.named_parameters()), tiny.train, tiny.model).state()
    held = sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("model."))
    needed = memory(tiny.model, tiny.train, tiny.dist, 1)
    assert needed.optimizer == pytest.approx(held, rel=0.05)
    assert checkpoint_bytes(tiny.model, tiny.train) == pytest.approx(needed.weights + held, rel=0.05)


def test_state_of_a_sharded_model_is_sixteen_bytes_a_parameter_over_its_ranks() -> None:
    large = config("model=7b", "dist=fsdp", "cluster=slurm", "cluster.nodes=8", "cluster.ranks_per_node=8",
                   "train.global_batch_size=64", "train.micro_batch_size=1")  # fmt: skip
    needed = memory(large.model, large.train, large.dist, 64)
    assert needed.state == pytest.approx(16 * parameter_count(large.model) / 64)
    split = memory(large.model, large.train, DistConfig(tp=2), 64)
    assert split.state == pytest.approx(needed.state, rel=0.001)
    assert split.activations < needed.activations


@pytest.mark.parametrize(
    "spread",
    [
        ("dist=fsdp",),
        ("dist=fsdp_tp", "dist.tp=8"),
        ("dist=fsdp_tp_pp", "dist.tp=2", "dist.pp=4"),
        ("dist=fsdp", "lora.rank=16"),
    ],
)
def test_state_of_a_rank_of_64_is_what_the_trainer_gives_it(spread: tuple[str, ...]) -> None:
    """A 7B model spread by the trainer's own code among made-up ranks, on the meta device."""
    large = config("model=7b", "cluster=slurm", "cluster.nodes=8", "cluster.ranks_per_node=8",
                   "train.global_batch_size=512", "train.micro_batch_size=1", *spread)  # fmt: skip
    found = compare_state(large, 64)
    for kind, measured in found["measured"].items():
        assert found["estimated"][kind] == pytest.approx(measured, rel=0.05), kind


def test_the_nearest_layout_changes_what_it_must_and_fits() -> None:
    large = config("model=13b", "dist=fsdp", "cluster=slurm", "cluster.nodes=2", "cluster.ranks_per_node=8",
                   "train.global_batch_size=64", "train.micro_batch_size=4", "train.seq_len=4096",
                   "train.dtype=bfloat16")  # fmt: skip
    assert memory(large.model, large.train, large.dist, 16).total > DEVICE.usable_bytes
    found = nearest(large, 16, DEVICE)
    assert found is not None
    assert len(found.changes) == 1
    assert found.memory.total <= DEVICE.usable_bytes
    layouts = fitting(large, 16, DEVICE)
    assert layouts[0].time.total <= found.time.total


def test_nothing_fits_on_a_device_that_is_too_small() -> None:
    large = config("model=7b")
    assert nearest(large, 1, DEVICE) is None
