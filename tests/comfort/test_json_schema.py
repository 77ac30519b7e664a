"""The schemas take every file that we ship and every run that we write, and refuse what a run would refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llmops.cli.main import main
from llmops.config import json_schema
from llmops.config.compose import load_config
from llmops.resources import conf_dir

FILES = [path for path in sorted(conf_dir().rglob("*.yaml")) if path.relative_to(conf_dir()).parts[0] != "hydra"]


def kind(path: Path) -> str:
    return "config" if path.parent == conf_dir() else path.parent.name


def errors(name: str, value: Any) -> list[str]:
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in jsonschema.Draft202012Validator(SCHEMAS[name]).iter_errors(value)
    ]


SCHEMAS = {name: json_schema.schema(name) for name in json_schema.names()}


@pytest.mark.parametrize("name", SCHEMAS)
def test_it_is_a_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


def test_every_group_has_one() -> None:
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()} - {"hydra"}
    assert set(SCHEMAS) == {"run", "config"} | groups


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(conf_dir())))
def test_shipped_files_fit(path: Path) -> None:
    assert errors(kind(path), yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize("path", [path for path in FILES if kind(path) in ("model", "train", "dist", "eval", "sweep")])
def test_shipped_files_fit_no_longer_with_a_wrong_key(path: Path) -> None:
    value = {**yaml.safe_load(path.read_text()), "wrnog": 1}
    assert any("wrnog" in error for error in errors(kind(path), value))


RUNS = [
    ("recipe=tiny",),
    ("recipe=tiny", "cluster=slurm", "hardware=h100", "cluster.time=30"),
    ("cluster=k8s", "cluster.image=x", "cluster.mounts=[{path: /runs, pvc: runs}]", "sweep=tpe"),
]


@pytest.mark.parametrize("overrides", RUNS)
def test_what_a_run_has_fits(overrides: tuple[str, ...]) -> None:
    assert errors("run", yaml.safe_load(load_config(overrides).yaml_text)) == []


WRONG = [
    ("model", "dim: wide"),
    ("model", "n_layers: 0"),
    ("model", "rope_scaling: {kind: llama4, factor: 2, original_max_seq_len: 8}"),
    ("train", "optimizer: sgd"),
    ("train", "lr: -1"),
    ("train", "compile: 3"),
    ("cluster", "{backend: slurm, partitoin: gpu}"),
    ("cluster", "{backend: local, partition: gpu}"),
    ("cluster", "{backend: lsf}"),
    ("cluster", "{backend: k8s, mounts: [{pvc: runs}]}"),
    ("hardware", "memory_gib: many"),
    ("config", "{train: {lrr: 1}}"),
    ("config", "notify: {events: [finish]}"),
    ("recipe", "{trian: {lr: 1}}"),
    ("run", "{cluster: {backend: local}}"),
]


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_what_is_wrong_is_refused(name: str, text: str) -> None:
    assert errors(name, yaml.safe_load(text))


RIGHT = [
    ("model", "{defaults: [7b, _self_], n_layers: 30}"),
    ("train", "{seq_len: '${model.max_seq_len}', lr: '???'}"),
    ("cluster", "{defaults: [slurm, _self_], partition: gpu, mem: 64, time: 90}"),
    ("config", "{train: {lr: 0.1}, env: {A: b}}"),
]


@pytest.mark.parametrize(("name", "text"), RIGHT)
def test_what_people_write_is_taken(name: str, text: str) -> None:
    assert errors(name, yaml.safe_load(text)) == []


def test_keys_are_described_as_in_conf() -> None:
    assert SCHEMAS["model"]["$defs"].keys() == {"ModelConfig", "RopeScaling"}
    parts = SCHEMAS["config"]["$defs"]
    assert parts["ModelConfig"]["properties"]["dim"]["description"] == "width of the residual stream"
    assert parts["PrunerConfig"]["properties"]["min_step"]["description"].startswith("no trial is pruned")
    assert parts["SlurmCluster"]["properties"]["mem"]["description"].startswith("per node")
    assert parts["K8sCluster"]["properties"]["python"]["description"].startswith("interpreter in the image")
    assert parts["RunConfig"]["properties"]["retry"]["description"].startswith("Preemptions and time limits")
    bare = [
        f"{struct}.{key}"
        for struct, part in parts.items()
        for key, field in part["properties"].items()
        if "description" not in field
    ]
    # What has a comment in conf/ has a description; names that say it all, and items of lists, have neither.
    assert len(bare) < 0.4 * sum(len(part["properties"]) for part in parts.values()), bare


def test_it_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "model"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMAS["model"]
    assert main(["schema", "--output", str(tmp_path / "run.json")]) == 0
    assert json.loads((tmp_path / "run.json").read_text()) == SCHEMAS["run"]
    assert main(["schema", "--all", str(tmp_path / "new" / "all")]) == 0
    assert {path.name for path in (tmp_path / "new" / "all").iterdir()} == {f"{name}.schema.json" for name in SCHEMAS}
    capsys.readouterr()
    for arguments in (["train", "--all", "x"], ["--output", str(tmp_path / "none" / "x")]):
        assert main(["schema", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
