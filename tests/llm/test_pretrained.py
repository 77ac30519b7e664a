"""Starting from a Hugging Face folder: the right values on every rank, or a refusal that names what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from llm.model.init import init_weights
from llm.model.transformer import Transformer
from llm.tools.hf_names import to_hf
from llm.train.dist import lay_out
from llm.train.pretrained import open_pretrained
from llm.train.step import Passes
from llm.train.world import World
from llm.utils.config import ConfigError, TrainingConfig
from llm.utils.sharding import local, slices
from tests.llm.harness import lines, start, tiny
from tests.llm.ranks import Ranks
from tests.llm.test_dist import config


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def weights(given: TrainingConfig) -> dict[str, torch.Tensor]:
    model = Transformer(given.model)
    init_weights(model, 7, given.model)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def folder(path: Path, given: TrainingConfig, dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    """A Hugging Face folder in two files; ``changes`` by the end of our names: a tensor, or None to leave it out."""
    tensors = {str(to_hf(f"model.{name}")): value.to(dtype).contiguous() for name, value in weights(given).items()}
    for end, value in changes.items():
        name = next((name for name in tensors if name.endswith(end)), end)
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    half = len(tensors) // 2
    path.mkdir()
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        save_file({name: tensors[name] for name in names}, path / f"model-{number}.safetensors")
    return str(path)


def differences(world: World, given: TrainingConfig, url: str) -> list[str]:
    """Names of the parameters whose part on this rank is not that of the whole."""
    passes = Passes(given, lay_out(given.dist, world))
    parameters = passes.named_parameters()
    open_pretrained(url, given.model).fill(parameters)
    whole = weights(given)
    with torch.no_grad():
        return [name for name, p in parameters.items() if not torch.equal(local(p), whole[name][slices(p)])]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("size", "dist"), [(1, {}), (4, {}), (4, {"dist__tp": 2}), (4, {"dist__pp": 2}), (4, {"dist__dp_replicate": 2})]
)
def test_every_rank_gets_its_part(ranks: Ranks, tmp_path: Path, size: int, dist: dict[str, Any], tied: bool) -> None:
    given = config(model__tie_embeddings=tied, model__qkv_bias=True, **dist)
    url = folder(tmp_path / "hf", given)
    assert ranks(size, differences, given, url) == [[]] * size


def test_other_types_become_float32(tmp_path: Path) -> None:
    given = config()
    passes = Passes(given, lay_out(given.dist, World(0, 1, 0, torch.device("cpu"), False)))
    open_pretrained(folder(tmp_path / "hf", given, torch.bfloat16), given.model).fill(passes.named_parameters())
    for name, value in weights(given).items():
        assert torch.equal(passes.named_parameters()[name], value.bfloat16().float())


def test_an_output_matrix_that_is_tied_may_be_there(tmp_path: Path) -> None:
    given = config(model__tie_embeddings=True)
    extra = {"lm_head.weight": weights(given)["embedding.weight"]}
    assert "head.weight" not in open_pretrained(folder(tmp_path / "hf", given, **extra), given.model).weights


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"layers.1.mlp.up_proj.weight": None}, r"has no blocks\.1\.ffn\.up\.weight: set model"),
        ({"model.layers.4.mlp.up_proj.weight": torch.zeros(2, 2)}, r"also has blocks\.4\.ffn\.up\.weight"),
        ({"model.norm.weight": torch.zeros(7)}, r"has another shape of norm\.weight"),
        ({"model.layers.0.self_attn.rel_pos": torch.zeros(7)}, r"rel_pos is no part of the Llama"),
        ({"embed_tokens.weight": None}, "not a Llama, Qwen or Mistral"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    given = config()
    url = folder(tmp_path / "hf", given, **changes)
    with pytest.raises(ConfigError, match=complaint) as raised:
        open_pretrained(url, given.model)
    assert f"train.init_from={url}" in str(raised.value)


@pytest.mark.parametrize("files", [[], ["config.json"]])
def test_a_folder_without_weights_is_refused(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"there is no \.safetensors file"):
        open_pretrained(str(tmp_path), config().model)


def test_damage_is_refused(tmp_path: Path) -> None:
    url = folder(tmp_path / "hf", config())
    file = tmp_path / "hf" / "model-0.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="does not lie in the file"):
        open_pretrained(url, config().model)


def test_a_run_starts_from_such_a_folder_or_says_what_is_wrong(tmp_path: Path) -> None:
    settings = tiny(train__max_steps=3, train__init_from=str(tmp_path / "hf"), train__warmup_steps=0)
    settings["eval"].update(every_steps=0, batches=0, sample_prompts=[])
    refused = start(tmp_path / "refused", settings, ranks=1)
    (output,) = (rank.communicate(timeout=90)[0] for rank in refused.ranks)
    assert (refused.ranks[0].returncode, output.count("\n")) == (2, 1), output
    assert "there is no .safetensors file" in output
    folder(tmp_path / "hf", msgspec.convert(settings, TrainingConfig))
    assert start(tmp_path / "run", settings, ranks=2).finish() == [0, 0]
    drawn = tiny(train__max_steps=3, train__seed=7, train__warmup_steps=0)
    drawn["eval"].update(every_steps=0, batches=0, sample_prompts=[])
    assert start(tmp_path / "drawn", drawn, ranks=1).finish() == [0]
    ours, theirs = lines(tmp_path / "run", 0, "step"), lines(tmp_path / "drawn", 0, "step")
    # The same weights on other data: seed 7 drew those of the folder.
    assert ours[0]["loss"] != theirs[0]["loss"]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=0.03)
