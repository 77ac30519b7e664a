"""The metadata of a DCP directory is a stranger's pickle: nothing in it may run, and nothing wrong in it counts."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from llm.checkpoint.format import CheckpointError
from llm.tools.dcp_metadata import Chunk, Place, read_metadata


def metadata(directory: Path) -> bytes:
    return (directory / ".metadata").read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What DCP itself writes for a few tensors and values."""
    directory = tmp_path_factory.mktemp("dcp")
    state = {"model": {"w": torch.ones(4, 3), "s": torch.tensor(3), "e": torch.zeros(0, 4)}, "step": 5, "none": None}
    dcp.save(state, checkpoint_id=directory)
    return metadata(directory)


def test_what_dcp_writes_is_understood(saved: bytes) -> None:
    content = read_metadata(saved, "x/.metadata")
    assert content.tensors.keys() == {"model.w", "model.s", "model.e"}
    assert content.values.keys() == {"step", "none"}
    weight = content.tensors["model.w"]
    assert (weight.dtype, weight.shape) == ("F32", [4, 3])
    assert [(chunk.offset, chunk.shape, chunk.place.file) for chunk in weight.chunks] == [
        ([0, 0], [4, 3], "__0_0.distcp")
    ]
    assert [chunk.shape for chunk in content.tensors["model.e"].chunks] == [[0, 4]]


# --- what would run --------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    """STACK_GLOBAL, which takes dotted names apart."""
    return text(module) + text(name) + b"\x93"


def hostile(command: str) -> dict[str, bytes]:
    """Pickles that run ``command``, each in another way."""
    start, end = b"\x80\x04", b"."
    call = text(command) + b"\x85R"  # TUPLE1 REDUCE
    getattr_ = named("builtins", "getattr")
    metadata_class = named("torch.distributed.checkpoint.metadata", "Metadata")
    size = named("torch", "Size")
    builtins = getattr_ + metadata_class + text("__init__") + b"\x86R"  # getattr(Metadata, "__init__")
    builtins = getattr_ + builtins + text("__globals__") + b"\x86R"
    return {
        "posix.system": start + named("posix", "system") + call + end,
        "os.system": start + b"cos\nsystem\n" + call + end,
        "builtins.exec": pickle.dumps(Call(exec, f"import os; os.system({command!r})")),
        "builtins.eval": pickle.dumps(Call(eval, f"__import__('os').system({command!r})")),
        "torch.serialization.os.system": start + named("torch", "serialization.os.system") + call + end,
        "torch.os.system": start + named("torch", "os.system") + call + end,
        "torch.storage._load_from_bytes": start
        + named("torch.storage", "_load_from_bytes")
        + b"\x8e"
        + len(evil := torch_file(command)).to_bytes(8, "little")
        + evil
        + b"\x85R"
        + end,
        "torch._utils._rebuild_tensor_v2": start + named("torch._utils", "_rebuild_tensor_v2") + call + end,
        "torch.load": start + named("torch", "load") + call + end,
        "subprocess.Popen": pickle.dumps(Call(__import__("subprocess").Popen, command, -1, None, None, None, None)),
        "inst": start + b"(" + text(command) + b"iposix\nsystem\n" + end,
        "obj": start + b"(" + named("posix", "system") + text(command) + b"o" + end,
        # Through what is allowed: a pickle gets an inert stand-in for it, and never the thing itself.
        "getattr": start + builtins + call + end,
        "build": start + size + b"}" + text("__code__") + named("posix", "system") + b"sb" + call + end,
        "persistent": start + text("x") + b"Q" + end,
        "giant memo": start + text("x") + b"r\xff\xff\xff\xff" + text(command) + b"." + end,
        "extension": start + b"\x82\x01" + end,
    }


def torch_file(command: str) -> bytes:
    stream = io.BytesIO()
    torch.save(Call(os.system, command), stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", hostile(""))
def test_a_hostile_pickle_runs_nothing(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    data = hostile(f"touch {canary}")[name]
    with pytest.raises(CheckpointError) as caught:
        read_metadata(data, "x/.metadata")
    assert not canary.exists()
    message = str(caught.value)
    assert "\n" not in message
    if "." in name:
        assert message == (f"x/.metadata refers to {name}, which is no part of DCP's metadata; nothing was loaded")


@pytest.mark.parametrize("name", ["posix.system", "os.system", "builtins.exec", "inst", "obj"])
def test_they_are_hostile(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    pickle.loads(hostile(f"touch {canary}")[name])
    assert canary.exists()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_broken_file_is_a_checkpoint_error(saved: bytes, data: st.DataObject) -> None:
    broken = bytearray(saved)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(broken)))
    for attempt in (bytes(broken), bytes(broken[:cut])):
        try:
            content = read_metadata(attempt, "x")
        except CheckpointError:
            continue
        for tensor in content.tensors.values():
            assert all(isinstance(chunk, Chunk) and ".." not in chunk.place.file for chunk in tensor.chunks)


# --- what would be wrong ---------------------------------------------------------------------------------------------


def made(chunks: list[tuple[list[int], list[int]]], **place: Any) -> bytes:
    """Metadata of one tensor ``w`` of 4 x 3 floats."""
    described = [ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)) for offset, shape in chunks]
    info = {"relative_path": "__0_0.distcp", "offset": 0, "length": 5000, **place}
    return pickle.dumps(
        Metadata(
            {"w": TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([4, 3]), described)},
            storage_data={MetadataIndex("w", offset): _StorageInfo(**info) for offset, _ in chunks},
        )
    )


WHOLE = [([0, 0], [4, 3])]


def test_chunks_are_boxes_of_the_tensor() -> None:
    halves = [([0, 0], [2, 3]), ([2, 0], [2, 3])]
    tensor = read_metadata(made(halves), "x").tensors["w"]
    assert tensor.chunks == [Chunk(offset, shape, Place("__0_0.distcp", 0, 5000)) for offset, shape in halves]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (made(WHOLE, relative_path="../../etc/passwd"), r"'\.\./\.\./etc/passwd', which is not inside"),
        (made(WHOLE, relative_path="/etc/passwd"), "which is not inside"),
        (made(WHOLE, relative_path="s3://elsewhere/x"), "which is not inside"),
        (made(WHOLE, relative_path=""), "which is not inside"),
        (made(WHOLE, relative_path=7), "which is not inside"),
        (made(WHOLE, offset=-1), "for a list of numbers"),
        (made(WHOLE, length=2**70), "for a list of numbers"),
        (made(WHOLE, length=40), "more than fits into 40 bytes"),
        (made(WHOLE, transform_descriptors=["zstd"]), "compressed or encrypted"),
        (made([([0, 0], [3, 3])]), "have 9 of its 12 values"),
        (made([([0, 0], [3, 3]), ([2, 0], [2, 3])]), "overlap"),
        (made([([1, 0], [4, 3])]), "reaches outside"),
        (made([([0], [4])]), "1 dimensions"),
        (pickle.dumps(Metadata({"w": 3}, storage_data={})), "neither a tensor nor a value"),
        (pickle.dumps(Metadata({}, storage_data=None)), "lacks the lists"),
        (pickle.dumps({"a": 1}), "holds a dict"),
        (b"", "is no metadata"),
    ],
)
def test_what_dcp_would_not_have_written_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_metadata(data, "x/.metadata")


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        (TensorProperties(torch.complex128), "type torch.complex128, which safetensors does not know"),
        (TensorProperties(torch.float32, layout=torch.sparse_coo), "layout torch.sparse_coo: only dense"),
    ],
)
def test_tensors_that_cannot_be_kept_are_named(properties: TensorProperties, message: str) -> None:
    entry = TensorStorageMetadata(properties, torch.Size([1]), [])
    with pytest.raises(CheckpointError, match=f"tensor w has the {message}"):
        read_metadata(pickle.dumps(Metadata({"w": entry}, storage_data={})), "x")
