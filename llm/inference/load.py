"""A run's model and tokenizer, from its directory."""

from __future__ import annotations

import torch

from llm.checkpoint.format import CheckpointError, Commit, Manifest
from llm.checkpoint.lineage import newest_commit, read_manifest, read_part
from llm.data.streaming import TOKENIZER
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.model.transformer import Transformer
from llm.train.base import check_base, fill, identity
from llm.train.lora import add_adapters, trained
from llm.train.pieces import DTYPES, local_pieces
from llm.train.resharding import load as load_tensors
from llm.train.world import World
from llm.utils.config import ConfigError, TrainingConfig
from llm.utils.storage import Storage, open_storage


def load_model(
    config: TrainingConfig,
    run_url: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    commit: Commit | None = None,
    world: World | None = None,
) -> tuple[Transformer, Commit]:
    """The model of a run's ``commit`` (None: the newest), on ``device``; of a ``world`` of several ranks each gets its
    part (``llm.inference.parallel``). Raises CheckpointError, and ConfigError for a model that they cannot share."""
    storage = open_storage(run_url)
    commit = commit or newest_commit(storage)
    if commit is None:
        raise CheckpointError(f"{run_url} holds no committed checkpoint yet")
    world = world or World(0, 1, 0, device, grouped=False)
    manifest = read_manifest(storage, commit)
    if world.size > 1:
        from llm.inference.parallel import only_once, split_model

        if config.lora.rank:
            raise ConfigError(
                f"lora.rank={config.lora.rank}: ranks cannot share a model with adapters; merge them by "
                "python -m llm.tools.lora_export first"
            )
        with torch.device("meta"):
            model = _as_saved(Transformer(config.model), storage, commit, manifest)
        load_tensors(storage, commit, manifest, split_model(model, world), world, prefixes=("model.",))
        only_once(model, world)
        return model.to(dtype).eval().requires_grad_(False), commit
    with device:
        model = _as_saved(Transformer(config.model), storage, commit, manifest)
    add_adapters(model, config.lora)
    parameters = dict(model.named_parameters())
    if config.lora.rank:
        fill(config, parameters)
        check_base(identity(config, parameters, world), manifest.state.get("base"))
    pieces = local_pieces({f"model.{name}": value for name, value in trained(parameters).items()})
    load_tensors(storage, commit, manifest, pieces, world, prefixes=("model.",))
    return model.to(dtype).eval().requires_grad_(False), commit


def _as_saved(model: Transformer, storage: Storage, commit: Commit, manifest: Manifest) -> Transformer:
    """``model`` with the types of values that its tensors were saved in: training's are float32, imported ones any."""
    missing = {f"model.{name}" for name, _ in model.named_parameters()}
    found: dict[str, torch.dtype] = {}
    for rank in range(manifest.world_size):  # each rank of most layouts holds a part of every tensor
        if not missing:
            break
        for name, tensor in read_part(storage, commit, manifest, rank).tensors.items():
            if name in missing:
                found[name] = DTYPES[tensor.dtype]
                missing.remove(name)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(found.get(f"model.{name}", parameter.dtype))
    return model


def load_run_tokenizer(run_url: str, commit: Commit) -> Tokenizer:
    """The tokenizer that a run was trained with. Raises ConfigError where the run directory has another one."""
    storage = open_storage(run_url)
    names = storage.list(TOKENIZER)
    found = load_tokenizer(f"{run_url.rstrip('/')}/{TOKENIZER}/{names[0]}" if names else "bytes")
    wanted = read_manifest(storage, commit).state.get("data", {}).get("tokenizer")
    if wanted not in (None, found.sha256):  # an imported checkpoint knows none
        raise ConfigError(
            f"{commit.path} was trained with a tokenizer whose SHA-256 is {wanted[:12]}…, and {run_url}/{TOKENIZER} "
            f"has {found.name} ({found.sha256[:12]}…): restore the file"
        )
    return found
