"""Starting from the weights of a Hugging Face folder: every rank reads the rows that it holds, and nobody the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm.checkpoint.format import ITEMSIZE, CheckpointError
from llm.model.transformer import Transformer
from llm.tools.hf_import import SUFFIX, Place, places
from llm.tools.hf_names import HF, recognise
from llm.train.pieces import DTYPES
from llm.utils.config import ConfigError, ModelConfig
from llm.utils.sharding import local, slices
from llm.utils.storage import Storage, open_storage

SHOWN = 5  # names in an error


@dataclass(frozen=True)
class Pretrained:
    """Where the weights of a folder lie, by our names."""

    storage: Storage
    weights: dict[str, Place]

    @torch.no_grad()
    def fill(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy each parameter's values, of which this rank may hold only a part. Memory: the rows of one parameter."""
        for name, parameter in parameters.items():
            box = slices(parameter)
            rows = self.rows(name, tuple(parameter.shape), box[0])
            local(parameter).copy_(rows[(slice(None), *box[1:])])

    def rows(self, name: str, shape: tuple[int, ...], rows: slice) -> Tensor:
        """``rows`` of the parameter ``name``, of whole ``shape``, as the folder has them."""
        return _rows(self.storage, self.weights[name], rows)


def open_pretrained(url: str, config: ModelConfig) -> Pretrained:
    """The folder at ``url``, a path or any fsspec URL, as weights of ``config``.

    Raises ConfigError where it is none, or where tensors are missing, left over or of another shape.
    """
    storage = open_storage(url)
    sizes = storage.sizes("")
    if not any(name.endswith(SUFFIX) for name in sizes):
        raise ConfigError(f"train.init_from={url}: there is no {SUFFIX} file; give a Hugging Face folder")
    try:
        theirs = places(storage, sizes)
        family = recognise(theirs)
        if family is None or family.kind != HF:
            raise ConfigError(f"train.init_from={url}: no model.embed_tokens.weight: not a Llama, Qwen or Mistral")
        weights = {}
        for name, place in theirs.items():
            target = family.target(name)
            if target is not None and target.kind == "model":
                weights[target.name.removeprefix("model.")] = place
    except CheckpointError as error:
        raise ConfigError(f"train.init_from={url}: {error}") from error
    if config.tie_embeddings:
        weights.pop("head.weight", None)  # the same values again
    with torch.device("meta"):
        expected = {name: list(p.shape) for name, p in Transformer(config).named_parameters()}
    there = {name: place.shape for name, place in weights.items()}
    for what, names in (
        ("has no", expected.keys() - there.keys()),
        ("also has", there.keys() - expected.keys()),
        ("has another shape of", {name for name in expected.keys() & there.keys() if expected[name] != there[name]}),
    ):
        if names:
            shown = ", ".join(sorted(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            raise ConfigError(f"train.init_from={url} {what} {shown}: set model to the shape of these weights")
    return Pretrained(storage, weights)


def _rows(storage: Storage, place: Place, rows: slice) -> Tensor:
    """Rows ``rows`` of the tensor at ``place``: they lie together."""
    width = ITEMSIZE[place.dtype]
    for size in place.shape[1:]:
        width *= size
    data = torch.empty((rows.stop - rows.start) * width, dtype=torch.uint8)
    if len(data):
        done = storage.read_into(place.file, place.begin + rows.start * width, [data.numpy().data])
        if done < len(data):
            raise CheckpointError(f"{storage.url}/{place.file} is cut short")
    return data.view(DTYPES[place.dtype]).view(-1, *place.shape[1:])
