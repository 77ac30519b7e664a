"""The shipped groups: complete, documented, and what they say they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from llmops.config import schema
from llmops.config.compose import load_config
from llmops.config.errors import schema_keys
from llmops.resources import conf_dir

MODELS = [
    *("tiny", "1b", "7b", "13b", "32b", "llama3_2_1b", "llama3_2_3b", "llama3_1_8b", "mistral_7b"),
    *("qwen2_5_0_5b", "qwen2_5_7b", "qwen3_0_6b", "qwen3_8b", "qwen3_32b"),
]
SECTIONS = {
    "train/default": schema.TrainConfig,
    "dist/fsdp": schema.DistConfig,
    "data/shakespeare": schema.DataConfig,
    "eval/default": schema.EvalConfig,
    "serve/default": schema.ServeConfig,
    "checkpoint/default": schema.CheckpointConfig,
    "prepare/default": schema.PrepareConfig,
    "sweep/default": schema.SweepConfig,
    "cluster/local": schema.LocalCluster,
    "cluster/slurm": schema.SlurmCluster,
    "cluster/k8s": schema.K8sCluster,
    "cluster/torchx": schema.TorchxCluster,
    **{f"model/{name}": schema.ModelConfig for name in MODELS},
}


def parameters(model: schema.ModelConfig) -> int:
    """Of a decoder with grouped-query attention, a gated feed-forward and two norms per layer."""
    head = model.head_dim or model.dim // model.n_heads
    queries, keys = model.n_heads * head, model.n_kv_heads * head
    attention = 2 * model.dim * queries + 2 * model.dim * keys
    attention += (queries + 2 * keys) * model.qkv_bias + 2 * head * model.qk_norm
    layer = attention + 3 * model.dim * model.ffn_dim + 2 * model.dim
    tables = 1 if model.tie_embeddings else 2
    return tables * model.vocab_size * model.dim + model.n_layers * layer + model.dim


@pytest.mark.parametrize("name", MODELS)
def test_stated_parameter_count(name: str) -> None:
    text = (conf_dir() / "model" / f"{name}.yaml").read_text()
    model = msgspec.convert(yaml.safe_load(text), schema.ModelConfig)
    stated = re.search(r"\(([\d,]+)\)", text)
    assert stated is not None
    assert int(stated[1].replace(",", "")) == parameters(model)
    assert model.name == name


@pytest.mark.parametrize(("file", "struct"), SECTIONS.items())
def test_every_key_is_listed_with_its_default(file: str, struct: type[msgspec.Struct]) -> None:
    listed = yaml.safe_load((conf_dir() / f"{file}.yaml").read_text())
    listed.pop("backend" if file.startswith("cluster/") else "", None)
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    assert list(listed) == list(fields)
    if not file.startswith("model/"):
        for name, field in fields.items():
            if isinstance(field.default, msgspec.Struct):
                assert msgspec.convert(listed[name], type(field.default)) == field.default, name
                assert list(listed[name]) == list(field.default.__struct_fields__), name
            if field.default is not msgspec.NODEFAULT and not isinstance(field.default, msgspec.Struct):
                default = msgspec.convert(listed[name], type=type(field.default)) if field.default else listed[name]
                overridden = {("train/default", "warmup_steps"): 100}
                assert default == overridden.get((file, name), field.default), name


def test_top_level_lists_every_key_with_its_default() -> None:
    listed = yaml.safe_load((conf_dir() / "config.yaml").read_text())
    del listed["defaults"]
    groups = {
        "cluster",
        "hardware",
        "model",
        "train",
        "dist",
        "data",
        "prepare",
        "eval",
        "serve",
        "checkpoint",
        "sweep",
    }
    assert list(listed) == [name for name in schema.RunConfig.__struct_fields__ if name not in groups]
    sections = {"code": schema.CodeConfig, "retry": schema.RetryConfig, "stop": schema.StopConfig}
    sections |= {"metrics": schema.MetricsConfig, "notify": schema.NotifyConfig}
    sections |= {"logging": schema.LoggingConfig, "profile": schema.ProfileConfig}
    sections |= {"lora": schema.LoraConfig}
    for name, struct in sections.items():
        assert msgspec.convert(listed[name], struct) == struct()
        assert list(listed[name]) == list(struct.__struct_fields__)


def test_every_key_has_a_comment() -> None:
    self_evident = {"name", "defaults", "dim", "nodes", "n_layers", "partition", "account", "qos", "container"}
    self_evident |= {"weight_decay", "beta1", "beta2", "eps", "seed", "norm_eps", "reservation", "gpus_per_node"}
    self_evident |= {
        "cpus_per_rank",
        "mail_user",
        "log_every",
        "retry",
        "code",
        "stop",
        "metrics",
        "notify",
        "logging",
        "profile",
        "lora",
        "wandb_project",
        "muon_momentum",
        "ffn_bias",
        "backend",
        "tie_embeddings",
    }
    for file in [*SECTIONS, "config"]:
        for line in (conf_dir() / f"{file}.yaml").read_text().splitlines():
            found = re.match(r"\s*(\w+):", line)
            if found and found[1] not in self_evident:
                assert "  # " in line, f"{file}.yaml: {line}"


def test_default_run_is_one_local_rank() -> None:
    config = load_config().config
    assert config.cluster == schema.LocalCluster()
    assert config.dist.dp_shard == 1
    assert config.model.name == "tiny"
    assert config.train.seq_len == config.model.max_seq_len
    assert config.command == []


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_on_many_gpus(name: str) -> None:
    config = load_config([f"model={name}", "dist=fsdp", "cluster=slurm", "cluster.nodes=2", "cluster.ranks_per_node=4"])
    assert schema.world_size(config.config) == 8


def test_recipe_tiny() -> None:
    config = load_config(["recipe=tiny"]).config
    assert schema.backend(config) == "local"
    assert (config.cluster.nodes, config.cluster.ranks_per_node, config.dist.dp_shard) == (1, 2, "auto")
    assert (config.train.seq_len, config.train.global_batch_size, config.train.micro_batch_size) == (128, 16, 8)
    assert (config.train.max_steps, config.train.warmup_steps, config.checkpoint.every_steps) == (200, 20, 50)
    assert config.eval.sample_prompts[0] == "ROMEO:"


@pytest.mark.parametrize("cluster", [["cluster=slurm"], ["cluster=k8s", "cluster.image=a"]])
def test_recipe_tiny_on_a_cluster_takes_two_nodes(cluster: list[str]) -> None:
    config = load_config([*cluster, "recipe=tiny"]).config
    assert schema.backend(config) == cluster[0].removeprefix("cluster=")
    assert (config.cluster.nodes, config.cluster.ranks_per_node) == (2, 1)


@pytest.mark.parametrize("order", [1, -1])
def test_command_line_wins_over_the_recipe(order: int) -> None:
    overrides = [
        "recipe=tiny",
        "model=1b",
        "train.max_steps=70",
        "cluster=slurm",
        "cluster.nodes=1",
        "cluster.partition=x",
    ]
    config = load_config(overrides[::order]).config
    assert isinstance(config.cluster, schema.SlurmCluster)
    assert (config.model.name, config.train.max_steps) == ("1b", 70)
    assert (config.cluster.nodes, config.cluster.partition) == (1, "x")


def test_keys_of_both_clusters_are_known() -> None:
    keys: dict[str, Any] = schema_keys()
    assert {"cluster.partition", "cluster.container.image", "cluster.python", "train.lr", "env"} <= keys.keys()
    assert "cluster.partition" not in schema_keys("local")


def test_shipped_conf_is_found_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_conf").mkdir()
    monkeypatch.setattr("llmops.resources.PACKAGE", tmp_path)
    assert conf_dir() == tmp_path / "_conf"
