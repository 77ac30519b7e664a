"""Runs on prepared datasets: mixtures, packed rows and epochs, stopped and resumed in the middle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llm.checkpoint.lineage import newest_commit, read_manifest
from llm.data.reading import Share
from llm.data.streaming import Stream
from llm.data.tokenizer_training import train_bpe
from llm.inference.generate import main as generate
from llm.tools.prepare_data import main as prepare_data
from llm.utils.config import ConfigError, TrainingConfig
from llm.utils.storage import open_storage
from tests.llm.datasets import documents, make
from tests.llm.harness import lines, start, tiny, trajectory

STEPS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A mixture of packed rows and documents end to end, whose shares change in the middle."""
    folder = tmp_path_factory.mktemp("data")
    make(open_storage(str(folder / "packed")), documents(300, 1, 256), row=65, vocab=256)
    make(open_storage(str(folder / "plain")), documents(300, 2, 256), shard=9_000, vocab=256)
    mixture = {
        "chats": {"source": str(folder / "packed"), "weight": [[1, 0.7], [20, 0.2]]},
        "web": {"source": str(folder / "plain"), "weight": 0.3},
    }
    return {"source": None, "mixture": mixture}


def config(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    usual = {"train__max_steps": STEPS, "eval__every_steps": 15, "checkpoint__every_steps": 10}
    made = tiny(**(usual | changes))
    made["data"] = data
    made["eval"]["sample_prompts"] = []
    return made


@pytest.fixture(scope="module")
def undisturbed(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    assert start(run, config(data), ranks=2).finish() == [0, 0]
    return run


def state(run: Path) -> dict[str, Any]:
    storage = open_storage(str(run))
    commit = newest_commit(storage)
    assert commit is not None
    return read_manifest(storage, commit).state


def test_a_mixture_reports_what_each_source_gave(undisturbed: Path) -> None:
    counts = state(undisturbed)["data_counts"]
    assert sum(counts.values()) == state(undisturbed)["data_position"] == STEPS * 8
    early = [line for line in lines(undisturbed, 0, "step") if line["step"] in (1, 19)]
    assert early[1]["epoch/chats"] > early[1]["epoch/web"] > 0
    assert 0.9 < early[0]["counted"] < 1
    (first, last) = lines(undisturbed, 0, "eval")
    assert min(first["loss/chats"], first["loss/web"]) <= first["loss"] <= max(first["loss/chats"], first["loss/web"])
    assert last["loss"] < 5.6


def test_a_mixture_resumed_is_bit_identical_and_the_same_on_other_ranks(
    data: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = start(run, config(data), ranks=2)
    first.wait_for_step(12)
    first.stop()
    assert first.finish() == [75, 75]
    second = start(run, config(data | {"num_workers": 0}), ranks=2, attempt=1)
    assert second.finish() == [0, 0]
    assert trajectory(run) == trajectory(undisturbed)
    assert trajectory(run, "eval") == trajectory(undisturbed, "eval")
    alone = tmp_path / "alone"
    assert start(alone, config(data), ranks=1).finish() == [0]
    assert state(alone)["data_counts"] == state(undisturbed)["data_counts"]
    expected = trajectory(undisturbed)
    for step, (loss, *_) in trajectory(alone).items():
        assert loss == pytest.approx(expected[step][0], rel=2e-3), step


def test_an_epoch_ends_a_run_with_every_sample_once(data: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "data"
    make(open_storage(str(source)), documents(40, 4, 256), vocab=256)
    given = config({"source": str(source), "epochs": 1}, train__max_steps=10_000)
    assert start(tmp_path / "run", given, ranks=2).finish() == [0, 0]
    learnt = sum(len(text) - 1 for text in documents(40, 4, 256)[4:])
    steps = lines(tmp_path / "run", 0, "step")
    assert sum(round(line["counted"] * 8 * 64) for line in steps) == learnt
    assert steps[-1]["lr"] == pytest.approx(0.1 * 0.003), "the schedule ends where the data does"
    assert steps[-1]["epoch/data"] >= 1
    again = start(tmp_path / "run", given, ranks=1, attempt=1)
    assert again.finish() == [0]
    assert lines(tmp_path / "run", 1, "step") == []


def test_a_run_keeps_its_tokenizer_and_knows_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["to be or not", "that is the question", "whether tis nobler", "in the mind to suffer"]
    texts = [f"{first}, {second}: {number}" for number in range(80) for first in words for second in words]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = ["--input", f"{tmp_path}/text.jsonl", "--output", f"{tmp_path}/data", "--train-tokenizer", "300"]
    assert prepare_data([*given, "--workers", "1"]) == 0
    run = tmp_path / "run"
    made = config({"source": str(tmp_path / "data")}, train__max_steps=6, model__vocab_size=300)
    made["eval"]["sample_prompts"] = ["to be"]
    assert start(run, made, ranks=1).finish() == [0]
    assert (run / "samples.txt").read_text().startswith("to be")
    shutil.rmtree(tmp_path / "data")
    write = ["--run-url", str(run), "--prompt", "whether tis", "--tokens", "4"]
    assert generate(write) == 0
    assert capsys.readouterr().out.count("whether tis") == 1
    (run / "tokenizer" / "tokenizer.json").write_bytes(train_bpe(["another text altogether"] * 9, 300))
    assert generate(write) == 2
    assert "was trained with a tokenizer whose SHA-256" in capsys.readouterr().err
    place = tmp_path / "other"
    make(open_storage(str(place)), documents(100, 1, 256), vocab=256)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.* is not what made"):
        Stream(
            msgspec.convert(
                config({"source": str(place), "tokenizer": f"{run}/tokenizer"}) | {"launcher": None}, TrainingConfig
            ),
            Share(),
            lambda step: step,
        )


def test_bad_data_ends_a_run_with_a_clear_line(data: dict[str, Any], tmp_path: Path) -> None:
    place = Path(data["mixture"]["web"]["source"])
    run = start(tmp_path / "a", config({"source": str(place)}, model__vocab_size=200), ranks=1).ranks[0]
    assert "model.vocab_size=200 is smaller than the 256 tokens" in run.communicate(timeout=90)[0]
    assert run.returncode == 2
    copy = tmp_path / "copy"
    make(open_storage(str(copy)), documents(300, 2, 256), shard=9_000, vocab=256)
    for path in copy.glob("train-*"):
        path.write_bytes(path.read_bytes()[:-100])
    run = start(tmp_path / "b", config({"source": str(copy)}), ranks=1).ranks[0]
    output = run.communicate(timeout=90)[0]
    assert "is cut off" in output
    assert str(copy) in output
    assert "Traceback" not in output
    assert run.returncode == 1


def test_a_resume_with_other_data_is_refused(data: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    make(open_storage(str(other)), documents(300, 9, 256), vocab=256)
    changed = {"source": None, "mixture": data["mixture"] | {"web": {"source": str(other), "weight": 0.3}}}
    run = tmp_path / "run"
    first = start(run, config(data, train__max_steps=5), ranks=1)
    assert first.finish() == [0]
    refused = start(run, config(changed), ranks=1, attempt=1).ranks[0]
    assert "belongs to another stream (the data of web" in refused.communicate(timeout=90)[0]
    assert refused.returncode == 2
    # A new source beside the old ones is no other stream.
    added = {"source": None, "mixture": data["mixture"] | {"more": {"source": str(other), "weight": 0.5}}}
    assert start(run, config(added, train__max_steps=9), ranks=1, attempt=2).finish() == [0]
    assert state(run)["data_counts"]["more"] > 0
