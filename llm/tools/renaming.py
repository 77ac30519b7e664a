"""Giving the tensors of an imported checkpoint the names, and the order of rows, that this program's model has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llm.checkpoint.format import CheckpointError
from llm.checkpoint.image import Box
from llm.tools.dcp_import import to_json
from llm.tools.hf_names import TITAN, Family, Target, recognise, to_halves
from llm.tools.source import Item, Source
from llm.train.pieces import DTYPES

EMBEDDING, HEAD = "model.embedding.weight", "model.head.weight"
COUNTS = "optimizer.step"  # the name under which what an optimizer counts is kept


def rename(source: Source, mode: str, heads: int | None, tied: bool) -> str:
    """Change ``source`` in place; returns what was done, in words.

    ``mode`` is llama, auto (llama where the names are those of one) or none. ``heads`` are the query heads, which only
    torchtitan's order of rows needs; ``tied`` says that the model has no output matrix of its own. Raises
    CheckpointError for what cannot be mapped; in ``auto``, names that are not a plain Llama's are kept.
    """
    family = None if mode == "none" else recognise(item.box.name for item in source.items)
    if family is None:
        if mode == "llama":
            raise CheckpointError("--map llama: there is no tok_embeddings.weight and no embed_tokens.weight")
        return "names kept"
    by_name: dict[str, list[Item]] = defaultdict(list)
    for item in source.items:
        by_name[item.box.name].append(item)
    try:
        targets = {name: family.target(name) for name in by_name}
    except CheckpointError as error:
        if mode == "llama":
            raise
        return f"names kept, since {error}"
    source.items = _renamed(source, by_name, targets, _head_size(family, by_name, targets, heads))
    if tied:
        source.items = _without_head(source.items)
    return f"names of {'torchtitan' if family.kind == TITAN else 'Hugging Face'} mapped"


def _renamed(
    source: Source, by_name: dict[str, list[Item]], targets: dict[str, Target | None], head_size: int
) -> list[Item]:
    items: list[Item] = []
    counts = []
    for name, pieces in by_name.items():
        target, box = targets[name], pieces[0].box
        if target is None:
            if box.shape:
                items += pieces
            else:
                source.values[name] = to_json(pieces[0].read())
        elif target.kind == "step":
            counts.append(to_json(_joined(pieces).reshape(-1)[0]))
        elif head_size and target.rotary:
            whole = Box(name=target.name, dtype=box.dtype, shape=box.shape, offset=[0, 0], local_shape=box.shape)
            items.append(Item(whole, partial(_reordered, pieces, box.shape[0] // head_size)))
        elif target.kind != "dropped":
            items += [_called(piece, target.name) for piece in pieces]
    if counts:
        source.values[COUNTS] = max(counts)
    return items


def _called(item: Item, name: str) -> Item:
    box = item.box
    return Item(
        Box(name=name, dtype=box.dtype, shape=box.shape, offset=box.offset, local_shape=box.local_shape), item.read
    )


def _head_size(
    family: Family, by_name: dict[str, list[Item]], targets: dict[str, Target | None], heads: int | None
) -> int:
    """Rows of wq or wk that one head has; 0 where the rows are in our order."""
    if family.kind != TITAN:
        return 0
    shapes = {
        target.name: by_name[name][0].box.shape
        for name, target in targets.items()
        if target and target.rotary and target.kind == "model"
    }
    if heads is None:
        raise CheckpointError(
            "torchtitan's rows of wq and wk are ordered by head: give --heads, the number of query heads, or put the "
            "model's config.yaml into the run directory first"
        )
    size = next((shape[0] // heads for name, shape in shapes.items() if ".wq." in name and len(shape) == 2), 0)
    if not size or size % 2 or any(len(shape) != 2 or shape[0] % size for shape in shapes.values()):
        found = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:2])
        raise CheckpointError(f"{heads} query heads do not fit the weights, such as {found}: correct --heads")
    return size


def _reordered(pieces: Sequence[Item], heads: int) -> Tensor:
    return to_halves(_joined(pieces), heads)


def _joined(pieces: Sequence[Item]) -> Tensor:
    """The whole tensor."""
    box = pieces[0].box
    whole = torch.empty(box.shape, dtype=DTYPES[box.dtype])
    for piece in pieces:
        place = tuple(slice(o, o + n) for o, n in zip(piece.box.offset, piece.box.local_shape, strict=True))
        whole[place] = piece.read()
    return whole


def _without_head(items: list[Item]) -> list[Item]:
    """Of two matrices that are equal one stays: the model has one for both ends. Raises CheckpointError otherwise."""
    head = [item for item in items if item.box.name == HEAD]
    if head:
        embedding = [item for item in items if item.box.name == EMBEDDING]
        if not embedding or not torch.equal(_joined(embedding), _joined(head)):
            raise CheckpointError(
                "the run's config.yaml says model.tie_embeddings=true, but the output matrix differs from the embedding"
            )
    return [item for item in items if not item.box.name.endswith("head.weight")]
