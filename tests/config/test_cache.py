"""The same composition is made once, and never when something it depends on has changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llmops.config import cache as cache_module
from llmops.config import compose, hydra_call
from llmops.config.compose import load_config
from llmops.errors import UserError

Own = Callable[..., Path]


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of every call of Hydra."""
    calls: list[list[str]] = []
    real = hydra_call.compose

    def counted(folder: Path, arguments: list[str]) -> object:
        calls.append(arguments)
        return real(folder, arguments)

    monkeypatch.setattr(hydra_call, "compose", counted)
    return calls


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_second_time_is_remembered(composed: list[list[str]]) -> None:
    first, second = load_config(["recipe=tiny"]), load_config(["recipe=tiny"])
    assert first == second
    assert len(composed) == 1


def test_text_is_the_data() -> None:
    for _ in range(2):
        result = load_config(["recipe=tiny", "cluster=slurm", "cluster.time=2:00:00"])
        assert yaml.safe_load(result.yaml_text) == result.data
        assert list(result.data) == list(result.config.__struct_fields__)
        assert compose.compose(["recipe=tiny", "cluster=slurm", "cluster.time=2:00:00"]) == result.data


def test_a_remembered_composition_does_not_import_hydra(cache: Path) -> None:
    code = (
        "import sys; from llmops.config.compose import load_config; load_config(['recipe=tiny']);"
        "print([name for name in ('hydra', 'omegaconf', 'yaml', 'torch') if name in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert [run.stdout.strip() for run in runs] == ["['hydra', 'omegaconf', 'yaml']", "[]"]


def test_overrides_are_part_of_the_key(composed: list[list[str]]) -> None:
    assert load_config(["train.seed=1"]).config != load_config(["train.seed=2"]).config
    load_config(["train.seed=1", "train.seed=2"])
    load_config(["train.seed=2", "train.seed=1"])
    assert len(composed) == 4


def test_an_edited_file_is_composed_again(own: Own, composed: list[list[str]]) -> None:
    folder = own(train__mine="defaults: [default, _self_]\nseed: 1\n")
    assert load_config(["train=mine"], folder).config.train.seed == 1
    own(train__mine="defaults: [default, _self_]\nseed: 2\n")
    assert load_config(["train=mine"], folder).config.train.seed == 2
    own(data__other="defaults: [shakespeare]\n")
    load_config(["train=mine"], folder)
    assert len(composed) == 3


def test_content_matters_not_the_place(own: Own, tmp_path: Path, composed: list[list[str]]) -> None:
    folder = own(train__mine="defaults: [default, _self_]\nseed: 1\n")
    load_config(["train=mine"], folder)
    moved = tmp_path / "moved"
    folder.rename(moved)
    load_config(["train=mine"], moved)
    assert len(composed) == 1


def test_versions_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch, composed: list[list[str]]) -> None:
    load_config()
    monkeypatch.setattr(compose, "__version__", "9.9.9")
    load_config()
    assert len(composed) == 2


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\n{}", "cut", "flip"])
def test_a_damaged_entry_is_replaced(content: bytes | str, cache: Path, composed: list[list[str]]) -> None:
    first = load_config()
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    if content == "cut":
        content = whole[:-5]
    elif content == "flip":
        content = whole.replace(b'"lr":0.0003', b'"lr":0.3003')
        assert content != whole
    entry.write_bytes(content)  # type: ignore[arg-type]
    assert load_config() == first
    assert len(composed) == 2
    assert entries(cache) == [entry]
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("override", ["name=x${oc.decode:'a'}", "name=${now:%Y}"])
def test_what_depends_on_more_than_files_is_not_remembered(
    override: str, composed: list[list[str]], cache: Path
) -> None:
    for _ in range(2):
        load_config([override])
    assert len(composed) == 2
    assert entries(cache) == []


def test_an_option_chosen_by_the_environment_is_not_remembered(
    own: Own, monkeypatch: pytest.MonkeyPatch, composed: list[list[str]]
) -> None:
    folder = own(recipe__mine="# @package _global_\ndefaults:\n  - override /model: ${oc.env:SIZE}\n")
    for size in ("1b", "7b"):
        monkeypatch.setenv("SIZE", size)
        assert load_config(["recipe=mine"], folder).config.model.name == size


def test_what_is_refused_is_not_remembered(cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError):
            load_config(["train.lr=0"])
    assert entries(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMOPS_CACHE_DIR", str(tmp_path / "file"))
    assert load_config() == load_config()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLMOPS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "~")
    assert cache_module.folder() is None
    assert load_config() == load_config()


def test_only_the_newest_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "KEEP", 3)
    for number in range(6):
        cache_module.save(f"{number:064x}", {"n": number}, "text")
    assert len(entries(cache)) == 3
    assert cache_module.load(f"{5:064x}") == ({"n": 5}, "text")
    assert cache_module.load(f"{0:064x}") is None


def test_hydra_of_the_process_is_left_as_it_was() -> None:
    code = (
        "from hydra import compose, initialize_config_dir; from hydra.core.global_hydra import GlobalHydra;"
        "from llmops.config.compose import load_config; from llmops.resources import conf_dir;"
        "context = initialize_config_dir(str(conf_dir()), version_base='1.3'); before = GlobalHydra.instance().hydra;"
        "load_config(['recipe=tiny']); assert GlobalHydra.instance().hydra is before;"
        "assert compose('config', ['model=7b']).model.name == '7b';"
        "from hydra.core.plugins import Plugins; from hydra.plugins.launcher import Launcher;"
        "assert Plugins.instance().discover(Launcher)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
