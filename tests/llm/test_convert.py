"""Checkpoints come in from torch and Hugging Face, and go out to them, bit by bit the same."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import yaml

from llm.checkpoint.format import CheckpointError, Commit
from llm.checkpoint.leases import leased
from llm.checkpoint.lineage import commits, newest_commit, read_manifest
from llm.checkpoint.retention import Retention
from llm.checkpoint.verify import verify
from llm.inference.load import load_model
from llm.model.init import init_weights
from llm.model.transformer import Transformer
from llm.tools import commit_writer, destination, export
from llm.tools.convert import main
from llm.tools.hf_names import to_halves
from llm.train.checkpoint import Checkpointer
from llm.train.pieces import DTYPES
from llm.train.world import World
from llm.utils.config import TrainingConfig, load
from llm.utils.storage import Storage, open_storage
from tests.conftest import RunMaker, free_ports
from tests.llm.harness import REPOSITORY, start, tiny, trajectory

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
LLMOPS = [sys.executable, "-m", "llmops"]


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """All there is to a tensor."""
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_kind() -> dict[str, torch.Tensor]:
    """A tensor of each type, and of each odd shape."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, dtype in DTYPES.items():
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * 5 * dtype.itemsize,), generator=generator)
        made[f"kinds.{name}"] = raw.to(torch.uint8).view(dtype).view(6, 5)
    return {
        **made,
        "scalar": torch.tensor(7, dtype=torch.int32),
        "empty": torch.zeros(0, 4),
        "bf16.empty.inside": torch.zeros(3, 0, 2, dtype=torch.bfloat16),
        "cube": torch.randn(3, 4, 5, generator=generator),
        "large": torch.randn(300, 70, generator=generator),
        "transposed": torch.randn(4, 9, generator=generator).t(),
    }


def run(*words: str, code: int = 0, **environment: str) -> tuple[str, str]:
    """What the command line says; one line of error at most."""
    done = subprocess.run(
        [*LLMOPS, *words],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done
    assert len(done.stderr.splitlines()) == bool(code), done.stderr
    return done.stdout, done.stderr


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one line that says why not."""
    capsys.readouterr()
    assert main(list(words)) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("convert: error: ")
    assert output.err.count("\n") == 1
    return output.err


def save(run_url: str, tensors: dict[str, torch.Tensor], state: dict[str, Any], step: int = 20) -> Commit:
    """Save as a trainer of one rank does."""
    storage = open_storage(run_url)
    alone = World(0, 1, 0, torch.device("cpu"), grouped=False)
    checkpointer = Checkpointer(storage, alone, 0, 0, Retention(), 60.0)
    checkpointer.attach(tensors)
    commit = checkpointer.save(step, state)
    checkpointer.wait()
    checkpointer.close()
    return commit


def tensors_of(run_url: str) -> dict[str, torch.Tensor]:
    """Everything in the newest commit, verified."""
    storage = open_storage(run_url)
    commit = newest_commit(storage)
    assert commit is not None
    assert verify(storage, commit).damage == []
    with export.opened(storage, commit, lambda count: None) as source:
        return source.whole(list(source.tensors))


def state_of(run_url: str) -> dict[str, Any]:
    storage = open_storage(run_url)
    commit = newest_commit(storage)
    assert commit is not None
    return read_manifest(storage, commit).state


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so low that the tensors of these tests do not fit into one file, batch or piece."""
    monkeypatch.setattr(commit_writer, "LOCAL_FILE", 20_000)
    monkeypatch.setattr(export, "PIECE", 9_000)
    monkeypatch.setattr(export, "BATCH", 25_000)
    monkeypatch.setattr("llm.tools.dcp_export.REMOTE_FILE", 30_000)


# --- DCP -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_dcp_to_ours_to_dcp_changes_no_bit(tmp_path: Path) -> None:
    given = every_kind()
    values = {"lr": 3e-4, "betas": (0.9, 0.95), "name": "adam", "none": None, "blob": b"\0\xff", "nan": float("nan")}
    dcp.save({**given, "train": {"step": 12, **values}}, checkpoint_id=tmp_path / "dcp")
    assert main(["import", str(tmp_path / "dcp"), str(tmp_path / "run")]) == 0
    newest = newest_commit(open_storage(str(tmp_path / "run")))
    assert newest == Commit(attempt=0, generation=0, step=12)
    assert len(list((tmp_path / "run" / newest.path).glob("*.safetensors"))) > 3
    ours = tensors_of(str(tmp_path / "run"))
    assert {name: bits(value) for name, value in ours.items()} == {name: bits(value) for name, value in given.items()}
    kept = state_of(str(tmp_path / "run"))["imported"]["values"]
    assert kept["train.lr"] == 3e-4
    assert (kept["train.betas"], kept["train.name"], kept["train.none"]) == ([0.9, 0.95], "adam", None)
    assert (kept["train.blob"], kept["train.nan"]) == ({"hex": "00ff"}, "nan")

    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "dcp"]) == 0
    assert len(list((tmp_path / "out").glob("*.distcp"))) > 3
    found: dict[str, Any] = {name: torch.full(value.shape, 1).to(value.dtype) for name, value in given.items()}
    found["state.json"] = ""
    dcp.load(found, checkpoint_id=tmp_path / "out")
    state = json.loads(found.pop("state.json"))
    assert state == state_of(str(tmp_path / "run"))
    assert {name: bits(value) for name, value in found.items()} == {name: bits(value) for name, value in given.items()}

    # Our own export comes back with the state that it had.
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    again = tensors_of(str(tmp_path / "again"))
    assert {name: bits(value) for name, value in again.items()} == {name: bits(value) for name, value in given.items()}
    assert state_of(str(tmp_path / "again")) == state


SHARDED = """
import os, sys, torch
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor, Shard, Replicate
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
def full(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
dcp.save({
    "rows": distribute_tensor(full(1, 7, 3), mesh, [Shard(0)]),
    "columns": distribute_tensor(full(2, 4, 6).bfloat16(), mesh, [Shard(1)]),
    "replicated": distribute_tensor(full(3, 5), mesh, [Replicate()]),
    "one": distribute_tensor(full(4, 1, 4), mesh, [Shard(0)]),
    "plain": full(5, 2, 2),
    "steps": {"step": torch.tensor(40)},
}, checkpoint_id=sys.argv[1])
dist.destroy_process_group()
"""


def test_shards_of_two_ranks_become_one_checkpoint(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(tmp_path / "dcp")], env={**os.environ, **shared, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    assert main(["import", str(tmp_path / "dcp"), str(tmp_path / "run")]) == 0

    def full(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    expected = {
        "rows": full(1, 7, 3),
        "columns": full(2, 4, 6).bfloat16(),
        "replicated": full(3, 5),
        "one": full(4, 1, 4),
        "plain": full(5, 2, 2),
        "steps.step": torch.tensor(40),
    }
    found = tensors_of(str(tmp_path / "run"))
    assert {name: bits(value) for name, value in found.items()} == {
        name: bits(value) for name, value in expected.items()
    }
    assert commits(open_storage(str(tmp_path / "run")))[0].step == 40


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_hostile_metadata_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    message = refused(capsys, "import", str(tmp_path / "dcp"), str(tmp_path / "run"), "--step", "1")
    assert "refers to posix.system, which is no part of DCP's metadata; nothing was loaded" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp"]


def test_hostile_values_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"w": torch.ones(3), "step": 3, "evil": Touch(tmp_path / "ran"), "kept": [1, 2], "odd": {1, 2}}
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    words = ["import", str(tmp_path / "dcp"), str(tmp_path / "run")]
    assert "evil, odd cannot be read without running code" in refused(capsys, *words)
    assert not (tmp_path / "run").exists()
    assert main([*words, "--skip-unreadable"]) == 0
    assert "left out 2: evil, odd" in capsys.readouterr().out
    kept = state_of(str(tmp_path / "run"))["imported"]
    assert kept["left_out"] == ["evil", "odd"]
    assert kept["values"] == {"step": 3, "kept": [1, 2]}
    assert not (tmp_path / "ran").exists()


def torch_file(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def bomb() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("program", r"cannot be read: Weights only load failed"),
        ("bomb", r"claims 10000000 bytes"),
        ("shape", r"is torch\.float32 \[2, 2\], \.metadata says torch\.float32 \[4\]"),
        ("type", r"is torch\.int32 \[4\], \.metadata says torch\.float32 \[4\]"),
        ("sparse", r"is stored as a Tensor: only plain dense tensors are read"),
        ("number", r"is stored as a int: only plain dense tensors are read"),
        ("nothing", r"cannot be read: File is not a zip file"),
    ],
)
def test_what_is_no_tensor_runs_nothing(
    tmp_path: Path, what: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metadata is good, and what should be a tensor is something else."""
    dcp.save({"w": torch.ones(4), "step": 3}, checkpoint_id=tmp_path / "dcp")
    content = {
        "program": torch_file(Touch(tmp_path / "ran")),
        "bomb": bomb(),
        "shape": torch_file(torch.ones(2, 2)),
        "type": torch_file(torch.ones(4, dtype=torch.int32)),
        "sparse": torch_file(torch.ones(4).to_sparse()),
        "number": torch_file(4),
        "nothing": bytes(100),
    }[what]
    data = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())
    (place,) = (place for index, place in data.storage_data.items() if index.fqn == "w")
    place.relative_path, place.offset, place.length = "evil", 0, len(content)
    (tmp_path / "dcp" / "evil").write_bytes(content)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(data))
    error = refused(capsys, "import", str(tmp_path / "dcp"), str(tmp_path / "run"), "--skip-unreadable")
    assert re.search(message, error)
    assert "evil: tensor w" in error
    assert not (tmp_path / "ran").exists()
    assert commits(open_storage(str(tmp_path / "run"))) == []
    assert list((tmp_path / "run" / "checkpoints").glob("*/*")) == []


def test_what_is_missing_or_cut_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["import", str(tmp_path / "dcp"), str(tmp_path / "run")]
    (tmp_path / "file").write_text("")
    assert "file is a file: give the directory" in refused(capsys, "import", str(tmp_path / "file"), words[2])
    (tmp_path / "dcp").mkdir()
    assert "neither .metadata nor *.safetensors" in refused(capsys, *words)
    dcp.save({"w": torch.ones(400)}, checkpoint_id=tmp_path / "dcp")
    assert "does not say of which step it is: give --step N" in refused(capsys, *words)
    file = tmp_path / "dcp" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-700])
    assert "__0_0.distcp: tensor w at bytes 0 to" in refused(capsys, *words, "--step", "1")
    file.unlink()
    assert "the file is missing" in refused(capsys, *words, "--step", "1")
    assert commits(open_storage(str(tmp_path / "run"))) == []


def test_imports_follow_each_other_and_touch_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (100, 200):
        dcp.save({"w": torch.full((3,), float(step))}, checkpoint_id=tmp_path / f"step-{step}")
    run_url = str(tmp_path / "run")
    for source, step in (("step-100", 100), ("step-200", 200), ("step-100", 150)):
        assert main(["import", str(tmp_path / source), run_url, *(["--step", "150"] if step == 150 else [])]) == 0
    storage = open_storage(run_url)
    assert [commit.path for commit in commits(storage)] == [
        "checkpoints/step_00000100/0000-0000",
        "checkpoints/step_00000200/0000-0001",
        "checkpoints/step_00000150/0000-0002",
    ]
    parents = [read_manifest(storage, commit).parent for commit in commits(storage)]
    assert parents == [None, "checkpoints/step_00000100/0000-0000", None]
    assert torch.equal(tensors_of(run_url)["w"], torch.full((3,), 100.0))


def test_two_imports_never_share_a_folder(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    commit, parent = commit_writer.next_commit(storage, 5)
    storage.create(f"{commit.path}/{commit_writer.MARK}", b"the other's")
    storage.write(f"{commit.path}/rank00000-000.safetensors", b"the other's")
    with pytest.raises(CheckpointError, match=r"somebody else is writing checkpoints/step_00000005/0000-0000"):
        commit_writer.write_commit(storage, commit, parent, [], {}, lambda count: None)
    assert storage.list(commit.path) == ["importing", "rank00000-000.safetensors"]
    assert commit_writer.next_commit(storage, 5)[0] == Commit(attempt=0, generation=1, step=5)


# --- a Llama ---------------------------------------------------------------------------------------------------------


def write_config(folder: Path, **changes: Any) -> TrainingConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny(model__vocab_size=90, **changes)))
    return load(str(folder / "config.yaml"))


def model_of(config: TrainingConfig) -> Transformer:
    torch.set_num_threads(1)
    model = Transformer(config.model)
    init_weights(model, 3, config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # not all ones, so that none can be taken for another
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def hf_logits(weights: dict[str, torch.Tensor], config: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """A Llama as transformers computes it, from its names and its configuration alone."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return weights[name] * (x * torch.rsqrt(variance + config["rms_norm_eps"]))

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    B, T = tokens.shape
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    inverse = 1.0 / (config["rope_theta"] ** (torch.arange(0, size, 2).float() / size))
    angles = torch.outer(torch.arange(T).float(), inverse)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    mask = torch.full((T, T), float("-inf")).triu(1)
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        h = norm(x, f"{p}.input_layernorm.weight")
        q, k, v = (
            (h @ weights[f"{p}.self_attn.{name}_proj.weight"].T).view(B, T, -1, size).transpose(1, 2) for name in "qkv"
        )
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
        attention = torch.softmax(q @ k.transpose(2, 3) / size**0.5 + mask, dim=-1) @ v
        x = x + attention.transpose(1, 2).reshape(B, T, -1) @ weights[f"{p}.self_attn.o_proj.weight"].T
        h = norm(x, f"{p}.post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(h @ weights[f"{p}.mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ weights[f"{p}.mlp.up_proj.weight"].T)) @ weights[f"{p}.mlp.down_proj.weight"].T
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, "model.norm.weight") @ head.T


@pytest.mark.parametrize("tied", [False, True])
def test_hf_computes_the_same(tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.tools.export_hf.FILE", 100_000)
    monkeypatch.setattr(export, "PIECE", 9_000)
    config = write_config(tmp_path / "run", model__tie_embeddings=tied, model__rope_theta=500.0)
    model = model_of(config)
    state = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    save(str(tmp_path / "run"), {**state, "optim.exp_avg.norm.weight": torch.ones(64)}, {"step": 20})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--format", "hf"]) == 0

    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        with safetensors.safe_open(tmp_path / "hf" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            weights.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    assert weights.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    assert ("lm_head.weight" in weights) != tied
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert described["architectures"] == ["LlamaForCausalLM"]
    assert described["torch_dtype"] == "float32"
    tokens = torch.randint(0, 90, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens)
        torch.testing.assert_close(hf_logits(weights, described, tokens), expected, rtol=1e-4, atol=1e-5)

    # And back, into a run of the same shape.
    write_config(tmp_path / "back", model__tie_embeddings=tied, model__rope_theta=500.0)
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "back"), "--map", "llama"]) == 0
    loaded, commit = load_model(config, str(tmp_path / "back"), torch.device("cpu"))
    assert commit == Commit(attempt=0, generation=0, step=0)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), expected)


def test_hf_weights_in_another_type(tmp_path: Path) -> None:
    model = model_of(write_config(tmp_path / "run"))
    state = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    save(str(tmp_path / "run"), state, {"step": 20})
    words = ["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--format", "hf", "--dtype", "bfloat16"]
    assert main(words) == 0
    found = safetensors.torch.load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors")
    assert torch.equal(found["model.norm.weight"], model.norm.weight.detach().bfloat16())
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


TITAN = {
    "embedding": "tok_embeddings",
    "blocks": "layers",
    "ffn": "feed_forward",
    "gate": "w1",
    "down": "w2",
    "up": "w3",
    "head": "output",
}


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as torchtitan orders them: what pairs by halves, next to each other."""
    rows = weight.shape[0]
    halves = weight.view(heads, 2, rows // heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape).clone()


def titan_state(model: Transformer, qkv: str) -> dict[str, Any]:
    """What torchtitan would save of this model, and of an optimizer that has the weights for its averages."""
    config = model.config
    weights = {}
    for name, value in model.named_parameters():
        theirs = ".".join(TITAN.get(part, part) for part in name.split("."))
        heads = config.n_heads if ".wq." in name else config.n_kv_heads
        value = neighbours(value.detach(), heads) if ".wq." in name or ".wk." in name else value.detach()
        weights[theirs.replace("attention.w", f"attention.{qkv}w") if ".wo." not in theirs else theirs] = value
    optimizer: dict[str, Any] = {}
    for name, value in weights.items():
        optimizer[f"state.{name}.exp_avg"] = value * 2
        optimizer[f"state.{name}.exp_avg_sq"] = value * 3
        optimizer[f"state.{name}.step"] = torch.tensor(30.0)
        optimizer[f"param_groups.{name}.lr"] = 1e-3
    rest = {"train_state": {"step": torch.tensor(30), "ntokens_seen": 4096}, "lr_scheduler": {"last_epoch": 30}}
    return {**weights, "optimizer": optimizer, "dataloader": {"dp_rank_0": b"..."}, **rest}


@pytest.mark.parametrize("qkv", ["", "qkv_linear."])
def test_torchtitans_names_and_rows_become_ours(tmp_path: Path, qkv: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run")
    model = model_of(config)
    assert model.config.tie_embeddings
    dcp.save(titan_state(model, qkv), checkpoint_id=tmp_path / "step-30")
    assert main(["import", str(tmp_path / "step-30"), str(tmp_path / "run")]) == 0
    assert "names of torchtitan mapped" in capsys.readouterr().out
    found = tensors_of(str(tmp_path / "run"))
    for name, value in model.named_parameters():
        assert torch.equal(found.pop(f"model.{name}"), value), name
        assert torch.equal(found.pop(f"optim.exp_avg.{name}"), value * 2), name
        assert torch.equal(found.pop(f"optim.exp_avg_sq.{name}"), value * 3), name
    assert found == {}
    values = state_of(str(tmp_path / "run"))["imported"]["values"]
    assert (values["optimizer.step"], values["train_state.ntokens_seen"]) == (30.0, 4096)
    loaded, commit = load_model(config, str(tmp_path / "run"), torch.device("cpu"))
    assert commit.step == 30
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_torchtitans_rows_need_the_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(write_config(tmp_path / "run"))
    dcp.save(titan_state(model, ""), checkpoint_id=tmp_path / "step-30")
    words = ["import", str(tmp_path / "step-30"), str(tmp_path / "other")]
    assert "give --heads" in refused(capsys, *words)
    assert "7 query heads do not fit" in refused(capsys, *words, "--heads", "7")
    assert main([*words, "--heads", "4"]) == 0
    weight = model.blocks["0"].attention.wq.weight  # type: ignore[union-attr]
    assert torch.equal(tensors_of(str(tmp_path / "other"))["model.blocks.0.attention.wq.weight"], weight)
    assert torch.equal(to_halves(neighbours(weight.detach(), 4), 4), weight)
    assert main([*words[:2], str(tmp_path / "kept"), "--map", "none"]) == 0
    assert "layers.0.attention.wq.weight" in tensors_of(str(tmp_path / "kept"))


def test_another_model_keeps_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"tok_embeddings.weight": torch.ones(4, 2), "layers.0.attention.wq.bias": torch.ones(2)}
    dcp.save(state, checkpoint_id=tmp_path / "step-1")
    words = ["import", str(tmp_path / "step-1"), str(tmp_path / "run")]
    assert "layers.0.attention.wq.bias is no part of the Llama" in refused(capsys, *words, "--map", "llama")
    assert main(words) == 0
    assert "names kept, since tensor layers.0.attention.wq.bias" in capsys.readouterr().out
    assert tensors_of(str(tmp_path / "run")).keys() == state.keys()


def test_a_matrix_that_should_be_tied_and_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path / "run")
    embedding = torch.randn(90, 64)
    folder = tmp_path / "hf"
    folder.mkdir()
    for head, code in ((embedding, 0), (embedding + 1, 2)):
        state = {"model.embed_tokens.weight": embedding, "lm_head.weight": head.clone()}
        safetensors.torch.save_file(state, folder / "model.safetensors")
        assert main(["import", str(folder), str(tmp_path / "run")]) == code
    assert "the output matrix differs from the embedding" in capsys.readouterr().err
    assert tensors_of(str(tmp_path / "run")).keys() == {"model.embedding.weight"}


def broken(header: dict[str, Any], data: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "says that its header has 1152921504606846976"),
        (b"\x02" + bytes(7) + b"xx", "its header cannot be read"),
        (broken({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 7), "tensor w does not lie in the file"),
        (broken({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8), "tensor w does not lie in the file"),
        (broken({"w": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, 8), "of an unknown type"),
        (broken({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}, 8), "does not lie in the file"),
        (broken({"w": 3}, 8), "its header cannot be read"),
        (broken({"__metadata__": {"DCP_SHARDING_INFO": "{}"}}, 0), "join the files first"),
    ],
)
def test_a_broken_safetensors_file(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(content)
    assert message in refused(capsys, "import", str(tmp_path / "hf"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_index_names_only_files_of_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "hf" / "a.safetensors")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../outside.safetensors"}}))
    assert "names '../outside.safetensors', which is not in the folder" in refused(
        capsys, "import", str(tmp_path / "hf"), str(tmp_path / "run")
    )


# --- exports ---------------------------------------------------------------------------------------------------------


def test_one_file_for_torch(tmp_path: Path) -> None:
    given = every_kind()
    save(str(tmp_path / "run"), given, {"step": 20, "loss": 1.5})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "x" / "all.pt"), "--format", "torch"]) == 0
    found = torch.load(tmp_path / "x" / "all.pt", weights_only=True)
    assert {name: bits(value) for name, value in found["tensors"].items()} == {
        name: bits(value) for name, value in given.items()
    }
    assert found["state"] == {"step": 20, "loss": 1.5}
    words = ["export", str(tmp_path / "run"), str(tmp_path / "some.pt"), "--format", "torch"]
    assert main([*words, "--only", "bf16", "--only", "cube"]) == 0
    assert torch.load(tmp_path / "some.pt", weights_only=True)["tensors"].keys() == {"bf16.empty.inside", "cube"}


@pytest.mark.parametrize("kind", ["dcp", "torch", "hf"])
def test_what_is_there_is_never_overwritten(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(write_config(tmp_path / "run"))
    save(str(tmp_path / "run"), {f"model.{name}": value for name, value in model.named_parameters()}, {"step": 20})
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        words = ["export", str(tmp_path / "run"), str(tmp_path / name), "--format", kind]
        assert f"{name} exists: name another target" in refused(capsys, *words)
    assert (tmp_path / "file").read_text() == "mine"
    assert list((tmp_path / "folder").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link", "run"]
    assert leased(open_storage(str(tmp_path / "run"))) == set()


def damage_last_file(storage: Storage, commit: Commit) -> None:
    name = sorted(name for name in storage.list(commit.path) if name.endswith(".safetensors"))[-1]
    data = bytearray(storage.read(f"{commit.path}/{name}"))
    data[-1] ^= 1
    storage.replace(f"{commit.path}/{name}", bytes(data))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", ["dcp", "torch", "hf"])
@pytest.mark.parametrize("where", ["path", "url"])
def test_damage_is_found_and_nothing_is_left(
    tmp_path: Path, kind: str, where: str, memory_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(write_config(tmp_path / "run"))
    weights = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    commit = save(str(tmp_path / "run"), weights, {"step": 20})
    damage_last_file(open_storage(str(tmp_path / "run")), commit)
    parent = str(tmp_path / "out") if where == "path" else memory_url
    message = refused(capsys, "export", str(tmp_path / "run"), f"{parent}/{kind}", "--format", kind, code=1)
    assert ".safetensors is damaged: the CRC-32C of bytes" in message
    assert open_storage(parent).list("") == []
    if where == "path":
        assert list((tmp_path / "out").iterdir()) == []
    assert leased(open_storage(str(tmp_path / "run"))) == set()


def fill(target: str, then: BaseException | None = None, meanwhile: str = "") -> None:
    """A folder of two files; ``meanwhile`` somebody else makes the last one."""
    with destination.new_folder(target) as folder:
        with folder.file("a") as sink:
            sink.write(b"1")
        if meanwhile:
            open_storage(target).write(meanwhile, b"theirs")
        with folder.file("b", last=True) as sink:
            sink.write(b"2")
        if then is not None:
            raise then


def fill_file(target: str, size: int, then: BaseException) -> None:
    with destination.new_file(target, size) as stream:
        stream.write(b"1")
        raise then


@pytest.mark.parametrize("kind", ["path", "url"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("no")])
def test_an_export_that_is_broken_off_leaves_nothing(
    tmp_path: Path, memory_url: str, kind: str, error: BaseException
) -> None:
    parent = str(tmp_path) if kind == "path" else memory_url
    with pytest.raises(type(error)):
        fill(f"{parent}/folder", error)
    with pytest.raises(type(error)):
        fill_file(f"{parent}/file", 1, error)
    assert open_storage(parent).sizes("") == {}
    assert list(tmp_path.iterdir()) == []
    fill(f"{parent}/folder")
    assert open_storage(f"{parent}/folder").sizes("") == {"a": 1, "b": 1}


def test_a_url_that_somebody_else_fills_meanwhile(memory_url: str) -> None:
    with pytest.raises(CheckpointError, match="exists"):
        fill(f"{memory_url}/x", meanwhile="b")
    assert open_storage(f"{memory_url}/x").sizes("") == {"b": 6}


def test_what_is_too_large_for_an_object_is_not_begun(memory_url: str) -> None:
    with pytest.raises(CheckpointError, match=r"would have 6\.0 GB, too much for one object"):
        fill_file(f"{memory_url}/y", 6 * 10**9, AssertionError("it was begun"))


def test_nobody_removes_what_is_being_exported(tmp_path: Path) -> None:
    commit = save(str(tmp_path), {"w": torch.ones(3)}, {"step": 20})
    storage = open_storage(str(tmp_path))
    with export.opened(storage, commit, lambda count: None):
        assert leased(storage) == {commit}
    assert leased(storage) == set()


def test_what_an_export_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_url, target = str(tmp_path / "run"), str(tmp_path / "out")
    assert "holds no committed checkpoint" in refused(capsys, "export", run_url, target, "--format", "dcp")
    save(run_url, {"model.w": torch.ones(3)}, {"step": 20})
    assert "has no config.yaml that tells" in refused(capsys, "export", run_url, target, "--format", "hf")
    write_config(tmp_path / "run")
    message = refused(capsys, "export", run_url, target, "--format", "hf")
    assert "does not hold the model of config.yaml: they differ in model.blocks.0.attention.wk.weight" in message
    words = ["export", run_url, target, "--format"]
    assert "no tensor whose name begins with x or y" in refused(capsys, *words, "dcp", "--only", "x", "--only", "y")
    assert "--only is for" in refused(capsys, *words, "hf", "--only", "model.")
    assert "--dtype is for" in refused(capsys, *words, "torch", "--dtype", "bfloat16")
    gone = "checkpoints/step_00000021/0000-0000"
    assert f"{gone} is not, or no longer, committed" in refused(capsys, *words, "dcp", "--commit", gone)
    assert not (tmp_path / "out").exists()


def test_without_torch_one_line_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from llm.tools.convert import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "import", "x", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "convert: error: torch is not installed here: pip install 'llmops[train]'\n"


def test_training_goes_on_from_its_own_export(tmp_path: Path) -> None:
    config = tiny(train__max_steps=12, checkpoint__every_steps=6, eval__every_steps=0)
    (first, second), middle = (tmp_path / "first", tmp_path / "second"), "checkpoints/step_00000006/0000-0000"
    assert start(first, config, ranks=1).finish() == [0]
    assert main(["export", str(first), str(tmp_path / "dcp"), "--format", "dcp", "--commit", middle]) == 0
    assert main(["import", str(tmp_path / "dcp"), str(second)]) == 0
    assert start(second, config, ranks=1).finish() == [0]
    steps = trajectory(first)
    assert trajectory(second) == {step: steps[step] for step in range(7, 13)}


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3), "step": 8}, checkpoint_id=tmp_path / "dcp")
    source, run_url, target = (str(tmp_path / name) for name in ("dcp", "run", "out"))
    output, _ = run("ckpt", "import", source, run_url)
    assert output == "imported checkpoints/step_00000008/0000-0000: 1 tensor, 76 B, names kept\n"
    output, _ = run("ckpt", "export", f"{run_url}@8", target, "--format", "dcp")
    assert output.startswith(f"exported checkpoints/step_00000008/0000-0000 to {target}")
    found = {"w": torch.zeros(3)}
    dcp.load(found, checkpoint_id=target)
    assert torch.equal(found["w"], torch.ones(3))
    _, error = run("ckpt", "export", f"{run_url}@8", target, "--format", "dcp", code=2)
    assert error == f"llmops: error: {target} exists: name another target\n"
    _, error = run("ckpt", "export", f"{run_url}@7", target, "--format", "dcp", code=2)
    assert "has no checkpoint of step 7" in error


def test_a_config_without_a_model_is_no_obstacle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp.save({"w": torch.ones(3), "step": 8}, checkpoint_id=tmp_path / "dcp")
    (tmp_path / "run").mkdir()
    config = tmp_path / "run" / "config.yaml"
    for text, code in (("train: {}", 0), ("", 0), ("model: {dim: 3}", 2), ("[", 2)):
        config.write_text(text)
        assert main(["import", str(tmp_path / "dcp"), str(tmp_path / "run")]) == code
    first, second = capsys.readouterr().err.splitlines()
    assert "config.yaml: model: Object missing required field" in first
    assert "config.yaml is not YAML" in second


def test_a_run_that_may_be_alive_takes_no_import(make_run: RunMaker, tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3), "step": 8}, checkpoint_id=tmp_path / "dcp")
    made = make_run("alive", backend="local")
    words = ["ckpt", "import", str(tmp_path / "dcp"), "alive", "--runs-url", make_run.runs_url]
    _, error = run(*words, code=2)
    assert "cancel it first, or import into a folder of its own" in error
    made.submission(backend="local")
    made.start(0)
    made.end(0, "finished")
    run(*words)
    assert newest_commit(open_storage(made.store.url)) == Commit(attempt=0, generation=0, step=8)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_an_import_that_is_broken_off_leaves_nothing(tmp_path: Path, how: str) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "dcp")
    (tmp_path / "dcp" / "__0_0.distcp").unlink()
    os.mkfifo(tmp_path / "dcp" / "__0_0.distcp")  # whoever opens it waits
    program = [*LLMOPS, "ckpt"] if how == "Ctrl-C" else [sys.executable, "-m", "llm.tools.convert"]
    process = subprocess.Popen(
        [*program, "import", str(tmp_path / "dcp"), str(tmp_path / "run"), "--step", "8"],
        cwd=REPOSITORY,
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("run/checkpoints/*/*/importing")):
            assert process.poll() is None
            assert time.monotonic() < deadline, "it did not begin to write"
            time.sleep(0.01)
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        assert process.communicate(timeout=60) == (None, b"")
        assert process.returncode == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_on_s3(tmp_path: Path, s3_url: str) -> None:
    given = every_kind()
    expected = {name: bits(value) for name, value in given.items()}
    dcp.save({**given, "step": 8}, checkpoint_id=f"{s3_url}/dcp")
    run("ckpt", "import", f"{s3_url}/dcp", f"{s3_url}/run")
    assert {name: bits(value) for name, value in tensors_of(f"{s3_url}/run").items()} == expected
    run("ckpt", "export", f"{s3_url}/run", f"{s3_url}/out", "--format", "dcp")
    again = {name: torch.full(value.shape, 1).to(value.dtype) for name, value in given.items()}
    dcp.load(again, checkpoint_id=f"{s3_url}/out")
    assert {name: bits(value) for name, value in again.items()} == expected
    assert main(["export", f"{s3_url}/run", f"{s3_url}/all.pt", "--format", "torch"]) == 0
    one = torch.load(io.BytesIO(open_storage(s3_url).read("all.pt")), weights_only=True)
    assert {name: bits(value) for name, value in one["tensors"].items()} == expected
    assert main(["export", f"{s3_url}/run", f"{s3_url}/out", "--format", "dcp"]) == 2
    assert main(["export", f"{s3_url}/run", f"{s3_url}/all.pt", "--format", "torch"]) == 2
    # What is damaged is found, and leaves nothing in the store.
    storage = open_storage(f"{s3_url}/run")
    commit = newest_commit(storage)
    assert commit is not None
    damage_last_file(storage, commit)
    assert main(["export", f"{s3_url}/run", f"{s3_url}/bad", "--format", "dcp"]) == 1
    assert open_storage(f"{s3_url}/bad").sizes("") == {}
