"""One checkpoint in detail, and two side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llm.checkpoint import diff
from llm.checkpoint.format import PartManifest
from llmops.checkpoints.change import reading
from llmops.checkpoints.survey import Entry, Survey, describe_entry
from llmops.checkpoints.target import told
from llmops.errors import ClusterError

FACTS = ("world_size", "mesh", "code")


def page(survey: Survey, entry: Entry) -> dict[str, Any]:
    """The stable JSON object of ``llmops ckpt show --json``: that of ``ls``, with state, parts and tensors."""
    parts = _parts(survey, entry)
    with told(survey.target.url):
        tensors = diff.tensors(entry.commit, parts)
    assert entry.manifest is not None
    return {
        **describe_entry(survey, entry),
        "url": survey.target.url,
        "state": entry.manifest.state,
        "parts": [
            {"rank": part.rank, "files": len(part.files), "bytes": sum(file.bytes for file in part.files)}
            for part in parts
        ],
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "placement": tensor.placement,
                "pieces": len(tensor.boxes),
                "values": math.prod(tensor.shape),
                "bytes": tensor.bytes,
            }
            for name, tensor in tensors.items()
        },
    }


def differences(
    one: tuple[Survey, Entry], two: tuple[Survey, Entry], values: bool, progress: Callable[[str], None]
) -> dict[str, Any]:
    """``facts`` and ``state``: (name, in one, in two); ``tensors``: (name, how); ``values``: the tensors whose contents
    differ, None unless ``values`` are wanted; ``compared``: how many tensors both have. ``progress`` is told each one.
    """
    (a, first), (b, second) = one, two
    parts = _parts(a, first), _parts(b, second)
    assert first.manifest is not None
    assert second.manifest is not None
    with told(a.target.url):
        left = diff.tensors(first.commit, parts[0])
    with told(b.target.url):
        right = diff.tensors(second.commit, parts[1])
    both = diff.comparable(left, right)
    different = None
    if values:
        different = []
        with told(a.target.url), reading(a.storage, first.commit), reading(b.storage, second.commit):
            for name in both:
                progress(name)
                if not diff.same_values(a.storage, left[name], b.storage, right[name]):
                    different.append(name)
    facts = [(name, getattr(first.manifest, name), getattr(second.manifest, name)) for name in FACTS]
    return {
        "facts": [fact for fact in facts if fact[1] != fact[2]],
        "state": list(diff.state_differences(first.manifest.state, second.manifest.state)),
        "tensors": list(diff.tensor_differences(left, right)),
        "values": different,
        "compared": len(both),
    }


def _parts(survey: Survey, entry: Entry) -> list[PartManifest]:
    if entry.manifest is None:
        raise ClusterError(f"{survey.target.url}/{entry.commit.path}/{entry.problem}")
    with told(survey.target.url):
        return diff.read_parts(survey.storage, entry.commit, entry.manifest)
