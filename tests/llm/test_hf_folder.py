"""Whole folders of Hugging Face: transformers reads what is exported, and what it writes comes in and out unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm.data.chat import CHATML
from llm.data.tokenizer import ByteTokenizer, Tokenizer, tokenizer_file
from llm.data.tokenizer_json import load_json
from llm.inference.load import load_model, load_run_tokenizer
from llm.tools.convert import main as convert
from llm.tools.export_hf import main as export
from llm.tools.hf_config import from_hf_config, hf_config
from llm.utils.config import ConfigError, load
from tests.data.tokenizer_files import LATIN, json_file, ranks_tokenizer
from tests.inference.models import save_run
from tests.llm.test_hf_families import FAMILIES, ours, shape, theirs

TOKENS = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(3))
EXPORTED = ("llama 3", "qwen 2", "qwen 3", "mistral")


def logits_of(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_loads_an_export(name: str, tmp_path: Path) -> None:
    model = ours(shape(**FAMILIES[name][1]))
    save_run(tmp_path / "run", model)
    assert export([str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    with torch.no_grad():
        torch.testing.assert_close(logits_of(tmp_path / "hf"), model(TOKENS), rtol=0, atol=1e-4)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "checkpoints/step_00000007/0000-0000" in card
    assert card.startswith("---\nlibrary_name: transformers\n")


@pytest.mark.parametrize("name", EXPORTED)
def test_a_folder_of_transformers_comes_in_and_out_bit_by_bit(name: str, tmp_path: Path) -> None:
    model = ours(shape(**FAMILIES[name][1]))
    saved, run, back = tmp_path / "saved", tmp_path / "run", tmp_path / "back"
    theirs(model).to(torch.bfloat16).save_pretrained(saved)
    assert convert(["import", str(saved), str(run)]) == 0
    config = load(str(run / "config.yaml"))
    loaded, _ = load_model(config, str(run), torch.device("cpu"), torch.bfloat16)
    assert hf_config(config.model, {}) == hf_config(model.config, {})
    with torch.no_grad():
        torch.testing.assert_close(loaded.float()(TOKENS), logits_of(saved), rtol=0, atol=1e-4)
    assert export([str(run), str(back)]) == 0
    before, after = (
        {k: v for f in each.glob("*.safetensors") for k, v in load_file(f).items()} for each in (saved, back)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)


TEXTS = ["To be, or not to be: that is the question.", LATIN * 2, "", "  \n\n x  123456 y"]
CHAT = {"tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}).encode()}


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    return ranks_tokenizer("cl100k_base") if kind == "tiktoken" else load_json(kind, json_file(kind), CHAT)


@pytest.mark.parametrize("kind", ["bytes", "llama3", "qwen2", "tiktoken"])
def test_the_tokenizer_goes_along(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = tokenizer_of(kind)
    run = tmp_path / "run"
    save_run(run, ours(shape(vocab_size=tokenizer.vocab_size)))
    if (content := tokenizer_file(tokenizer)) is not None:
        (run / "tokenizer").mkdir()
        (run / "tokenizer" / "tokenizer.json").write_bytes(content)
    assert export([str(run), str(tmp_path / "hf")]) == 0
    there = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert there(text, add_special_tokens=False)["input_ids"] == ids
        assert there.decode(ids) == tokenizer.decode(ids)
    assert there.eos_token_id == tokenizer.end
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == tokenizer.end
    assert there.chat_template == tokenizer.chat_template
    # And back, with the same meaning.
    assert convert(["import", str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    _, commit = load_model(load(str(tmp_path / "again" / "config.yaml")), str(tmp_path / "again"), torch.device("cpu"))
    again = load_run_tokenizer(str(tmp_path / "again"), commit)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert again.end == tokenizer.end


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': only llama, mistral, qwen2, qwen3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"vocab_size": -1}, "config.json"),
    ],
)
def test_models_that_ours_is_not_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: Any
) -> None:
    described = {**hf_config(shape(), {}), **changes}
    with pytest.raises(ConfigError, match=message):
        from_hf_config(described, "x")
    folder = tmp_path / "folder"
    theirs(ours(shape())).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(described))
    capsys.readouterr()
    assert convert(["import", str(folder), str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.*"))
