"""Adapters train as one process does under every layout, and nothing but them changes."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from llm.checkpoint.lineage import newest_commit, read_manifest, read_part
from llm.data.reading import Rows
from llm.estimate.memory import checkpoint_bytes, memory
from llm.estimate.parameters import adapter_parameters
from llm.inference.load import load_model
from llm.tools.convert import main as convert
from llm.train.base import fill, identity, own
from llm.train.dist import lay_out
from llm.train.lora import is_adapter
from llm.train.optim import build, clip_coefficient
from llm.train.phases import Phases
from llm.train.step import Passes
from llm.train.world import World
from llm.utils.config import ConfigError, LoraConfig, TrainingConfig, check, load
from llm.utils.sharding import local
from llm.utils.storage import open_storage
from llmops.config.compose import load_config
from llmops.errors import UserError
from tests.llm.harness import lines, start, tiny
from tests.llm.ranks import Ranks
from tests.llm.test_dist import LAYOUTS, POSITIONS, ROWS
from tests.llm.test_dist import config as plain_config

STEPS = 3
ADAPTERS = LoraConfig(rank=4, alpha=8.0)
ALONE = World(0, 1, 0, torch.device("cpu"), False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def config(lora: LoraConfig = ADAPTERS, **changes: Any) -> TrainingConfig:
    return msgspec.structs.replace(plain_config(**changes), lora=lora)


def train(world: World, given: TrainingConfig) -> dict[str, Any]:
    """What some steps of fine-tuning give on every rank; the learning rate is high, so that B leaves zero at once."""
    check(given, world.size)
    layout = lay_out(given.dist, world)
    passes = Passes(given, layout)
    parameters = passes.named_parameters()
    fill(given, parameters)
    with torch.no_grad():
        before = {name: local(p).clone() for name, p in parameters.items() if not is_adapter(name)}
    optimizer = build(parameters, given.train, given.model)
    base = identity(given, own(passes), world)["checksum"]
    generator = torch.Generator().manual_seed(1)
    history, phases = [], Phases(world.device)
    rows = torch.randint(0, given.model.vocab_size, (ROWS, POSITIONS + 1), generator=generator)
    for _ in range(STEPS):
        sums = passes.train(Rows(rows.chunk(layout.dp)[layout.dp_rank]), ROWS * POSITIONS, phases)
        with torch.no_grad():
            total = world.sum(torch.cat((sums.double(), passes.norm_squares().view(1))))
            norm = float(total[2]) ** 0.5
            torch._foreach_mul_(optimizer.gradients(), clip_coefficient(norm, 1.0))
            optimizer.step(0.02)
        optimizer.zero_grad()
        history.append((float(total[1]) / (ROWS * POSITIONS), norm))
    with torch.no_grad():
        changed = [name for name, values in before.items() if not torch.equal(values, local(parameters[name]))]
    saved = {name for name in optimizer.state() if name.startswith("model.")}
    return {"history": history, "changed": changed, "saved": saved, "base": base}


@functools.cache
def alone(tied: bool = False) -> dict[str, Any]:
    torch.set_num_threads(1)
    return train(ALONE, config(model__tie_embeddings=tied))


# Layouts in which each half of an adapter is split, or whole; with activations that are worked out again.
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "hsdp": ("hsdp", False, {"train__activation_checkpointing": "full"}),
    "fsdp_tp": ("fsdp_tp", False, {}),
    "fsdp_tp_pp": ("fsdp_tp_pp", True, {"train__activation_checkpointing": "selective"}),
}


@pytest.mark.parametrize("name", CASES)
def test_adapters_train_as_in_one_process(ranks: Ranks, name: str) -> None:
    layout, tied, changes = CASES[name]
    size, spread = LAYOUTS[layout]
    expected = alone(tied)
    for found in ranks(size, train, config(model__tie_embeddings=tied, **spread, **changes)):
        assert [loss for loss, _ in found["history"]] == pytest.approx([e[0] for e in expected["history"]], rel=1e-5)
        assert [norm for _, norm in found["history"]] == pytest.approx([e[1] for e in expected["history"]], rel=3e-4)
        assert found["changed"] == []
        assert found["saved"]
        assert all(is_adapter(name) for name in found["saved"])
        assert found["base"] == expected["base"]
    assert expected["history"][-1][0] < expected["history"][0][0]


def test_compiled_blocks_with_adapters_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(ALONE, config(model__n_layers=1))
    # One graph for each block, forward and backward; what a backend makes of it takes most of a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = train(ALONE, config(model__n_layers=1, train__compile=True))
    assert [loss for loss, _ in found["history"]] == pytest.approx([e[0] for e in expected["history"]], rel=1e-5)


@pytest.mark.parametrize(
    ("lora", "changes", "complaint"),
    [
        ({"rank": 17}, {}, "lora.rank=17 is more than the 16 rows or columns of wk: lower it"),
        ({"targets": []}, {}, r"lora.targets=\[\]: name one matrix or more"),
        ({"targets": ["wq", "wq"]}, {}, r"lora.targets=\[wq,wq\]: .* only once"),
        ({}, {"train__optimizer": "muon"}, "train.optimizer=muon makes whole matrices orthogonal"),
        ({}, {"model__init": "mup"}, "model.init=mup has no rules for adapters"),
    ],
)
def test_what_cannot_work_is_refused(lora: dict[str, Any], changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check(config(msgspec.structs.replace(ADAPTERS, **lora), **changes), 1)


def test_an_unknown_target_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"lora\.targets"):
        load_config(["lora.rank=4", "lora.targets=[query]"])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_state_is_what_the_estimate_says(optimizer: str) -> None:
    given = config(model__dim=128, model__ffn_dim=256, train__optimizer=optimizer)
    given = msgspec.structs.replace(given, lora=LoraConfig(rank=64, targets=["wq", "gate", "down"]))
    parameters = Passes(given, lay_out(given.dist, ALONE)).named_parameters()
    state = build(parameters, given.train, given.model).state()
    weights = sum(values.nbytes for name, values in state.items() if name.startswith("model."))
    held = sum(values.nbytes for values in state.values()) - weights
    needed = memory(given.model, given.train, given.dist, 1, given.lora)
    assert needed.weights == sum(parameter.nbytes for parameter in parameters.values())
    assert needed.gradients == weights == 4 * adapter_parameters(given.model, given.lora)
    assert needed.optimizer == pytest.approx(held, rel=0.01)
    assert checkpoint_bytes(given.model, given.train, given.lora) == pytest.approx(weights + held, rel=0.01)


# --- a run of its own -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A run of 6 steps on two ranks, from weights that transformers has saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("finetuned")
    shape = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(5)
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder / "base")
    given = tiny(train__max_steps=6, train__init_from=str(folder / "base"), model__vocab_size=258, train__lr=0.01)
    given["eval"] = {"every_steps": 0, "batches": 1}
    given["checkpoint"]["every_steps"] = 3
    given["lora"] = {"rank": 4, "alpha": 8.0, "targets": ["wq", "wv", "wo", "down"]}
    assert start(folder / "run", given, ranks=2).finish() == [0, 0]
    return folder / "base", folder / "run", given


def test_a_resumed_run_repeats_the_losses_bit_by_bit(finetuned: tuple[Path, Path, Any], tmp_path: Path) -> None:
    base, run, given = finetuned
    shutil.copytree(run, tmp_path / "run")
    commits = sorted((tmp_path / "run" / "checkpoints").glob("step_*/*"))
    middle = commits[0].relative_to(tmp_path / "run")
    assert start(tmp_path / "run", given, ranks=2, attempt=1, resume=str(middle)).finish() == [0, 0]
    first, again = ({e["step"]: e["loss"] for e in lines(tmp_path / "run", n, "step")} for n in (0, 1))
    assert list(again) == [4, 5, 6]
    assert again == {step: first[step] for step in again}

    # No checkpoint has the base, and none is taken for another.
    storage = open_storage(str(run))
    commit = newest_commit(storage)
    assert commit is not None
    names = read_part(storage, commit, read_manifest(storage, commit), 0).tensors
    assert all(".lora_" in name for name in names)
    changed = {**given, "train": {**given["train"], "init_from": None}}
    refused = start(tmp_path / "run", changed, ranks=1, attempt=2)
    text = refused.ranks[0].communicate(timeout=90)[0]
    assert refused.ranks[0].returncode == 2
    assert f"trained beside the weights of {base}" in text
    assert "Traceback" not in text


def test_exports_mean_the_same_to_transformers(finetuned: tuple[Path, Path, Any], tmp_path: Path, capsys: Any) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base, run, _ = finetuned
    assert convert(["export", str(run), str(tmp_path / "hf"), "--format", "hf"]) == 0, capsys.readouterr().err
    assert convert(["export", str(run), str(tmp_path / "peft"), "--format", "peft"]) == 0
    model, _ = load_model(load(str(run / "config.yaml")), str(run), torch.device("cpu"))
    tokens = torch.randint(0, 258, (2, 40), generator=torch.Generator().manual_seed(3))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        ours, merged, before = model(tokens), theirs(tokens).logits, plain(tokens).logits
        torch.testing.assert_close(ours, merged, rtol=2e-4, atol=2e-4)
        assert (merged - before).abs().max() > 0.01  # training has changed something
        # What PEFT makes of the adapters alone: W + alpha / r x B A.
        adapters = load_file(tmp_path / "peft" / "adapter_model.safetensors")
        settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert settings["target_modules"] == ["down_proj", "o_proj", "q_proj", "v_proj"]
        for name, a in adapters.items():
            if name.endswith(".lora_A.weight"):
                matrix = plain.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                b = adapters[name.replace("lora_A", "lora_B")]
                matrix.weight += settings["lora_alpha"] / settings["r"] * b @ a
        torch.testing.assert_close(plain(tokens).logits, merged, rtol=1e-5, atol=1e-5)


def test_an_export_beside_another_base_is_refused_and_leaves_nothing(
    finetuned: tuple[Path, Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run, _ = finetuned
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    data = bytearray((tmp_path / "base" / "model.safetensors").read_bytes())
    data[-1] ^= 1  # one bit of one weight
    (tmp_path / "base" / "model.safetensors").write_bytes(data)
    text = (tmp_path / "run" / "config.yaml").read_text().replace(str(base), str(tmp_path / "base"))
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert convert(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--format", "hf"]) == 2
    assert "set train.init_from to the former" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
