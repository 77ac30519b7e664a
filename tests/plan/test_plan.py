"""What a run will need, told before it is submitted; and the refusal of what cannot fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from llm.estimate.hardware import HardwareConfig
from llmops import api, plan
from llmops.config.compose import load_config
from llmops.errors import UserError
from llmops.resources import conf_dir

BIG = (
    *("model=7b", "hardware=h100", "cluster=slurm", "cluster.nodes=8", "cluster.ranks_per_node=8", "dist=fsdp"),
    *("train.dtype=bfloat16", "train.global_batch_size=512", "train.micro_batch_size=1"),
)
HARDWARE = sorted(file.stem for file in (conf_dir() / "hardware").glob("*.yaml") if file.stem != "none")


def made(*overrides: str) -> plan.Plan:
    return plan.make(load_config(overrides).config)


def verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmops", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_device_is_described_and_plans(name: str) -> None:
    text = yaml.safe_load((conf_dir() / "hardware" / f"{name}.yaml").read_text())
    assert list(text) == list(HardwareConfig.__struct_fields__)
    found = msgspec.convert(text, HardwareConfig)
    assert found.name == name
    planned = made(*BIG, f"hardware={name}")
    assert planned.time is not None
    assert 0 < planned.time.total < 1e5
    assert planned.mfu is not None
    assert 0 < planned.mfu < 1.1 * found.achievable  # MFU counts attention that a causal mask leaves out


def test_the_devices_are_those_that_people_have() -> None:
    assert set(HARDWARE) == {"a100_40", "a100_80", "b200", "cpu", "h100", "h200", "l40s", "mi300x"}


def test_state_is_sharded_over_all_ranks() -> None:
    planned = made(*BIG)
    assert planned.parameters == 6_738_415_616
    assert planned.memory.state == pytest.approx(16 * planned.parameters / 64)
    assert planned.checkpoint_bytes == 12 * planned.parameters
    replicated = made(*BIG, "dist.dp_replicate=8")
    assert replicated.memory.state == pytest.approx(16 * planned.parameters / 8)


def test_what_saves_memory_is_seen_to() -> None:
    plain = made(*BIG)
    for change in ("train.activation_checkpointing=full", "dist.tp=2", "dist.cp=2"):
        assert made(*BIG, change).memory.activations < plain.memory.activations / 1.4, change
    assert made(*BIG, "train.optimizer=muon").memory.optimizer < plain.memory.optimizer
    assert made(*BIG, "train.ema_decay=0.9").memory.average == plain.memory.weights


def test_budgets_and_prices_are_followed() -> None:
    planned = made(*BIG, "train.max_tokens=1000000000", "hardware.price=2.5")
    assert planned.steps == 477  # of 512 x 4096 tokens
    assert planned.tokens == 477 * 512 * 4096
    assert planned.time is not None
    hours = 477 * planned.time.total * 64 / 3600
    assert planned.device_hours == pytest.approx(hours)
    assert planned.cost == pytest.approx(2.5 * hours)
    assert planned.tokens_per_day == pytest.approx(86400 * 512 * 4096 / planned.time.total)


def test_without_hardware_there_is_no_time_and_no_refusal() -> None:
    planned = made("model=32b")
    assert (planned.time, planned.mfu, planned.cost, planned.fits) == (None, None, None, True)
    plan.check_fits(load_config(["model=32b"]).config)


def test_what_cannot_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    tight = (*BIG, "hardware=a100_40", "cluster.nodes=1", "train.global_batch_size=64", "train.micro_batch_size=8")
    with pytest.raises(
        UserError, match=r"hardware=a100_40: a rank would need [\d.]+ GB and has 39\.5 GB.*; set "
    ) as error:
        api.prepare([*tight, "cluster.partition=p"], runs_url=str(tmp_path))
    changes = str(error.value).rpartition("; set ")[2].split()
    assert made(*tight, *changes).fits


def test_what_no_layout_fits_is_said() -> None:
    with pytest.raises(UserError, match="no layout of so few ranks fits: take more, or a smaller model"):
        plan.check_fits(load_config(["model=32b", "hardware=l40s"]).config)


def test_the_search_ranks_layouts_that_fit() -> None:
    config = load_config(BIG).config
    found = plan.layouts(config)
    assert [each.time.total for each in found] == sorted(each.time.total for each in found)
    assert all(each.memory.total <= 0.92 * 80 * 2**30 for each in found)
    assert any("dist.tp" in each.changes for each in found)
    with pytest.raises(UserError, match="add hardware=h100"):
        plan.layouts(load_config(["model=7b"]).config)


def test_the_verb_prints_one_object_or_a_page() -> None:
    done = verb(*BIG, "--json", "--search")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["ranks"], found["fits"], found["hardware"]) == (64, True, "h100")
    assert sum(found["memory"].values()) == pytest.approx(2 * found["memory"]["total"])
    assert found["layouts"]
    page = verb(*BIG).stdout
    assert "6,738,415,616 parameters on 64 ranks" in page
    assert "estimated step on h100" in page
    assert max(map(len, page.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["model=7b", "hardware=l40s"], "hardware=l40s: a rank would need"),
        (["--search"], "--search needs to know what the run will be on"),
        (["hardware=h1000"], "group hardware has no h1000.yaml; did you mean h100?"),
        (["command=[python,x.py]"], "llmops plan knows the built-in trainer alone"),
        (["model=7b", "dist.tp=3"], "does not make up 1 rank"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(arguments: list[str], complaint: str) -> None:
    done = verb(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
