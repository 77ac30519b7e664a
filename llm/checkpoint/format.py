"""The checkpoint format: names, manifests, and the rules that a manifest must obey before anything in it is used.

    checkpoints/step_00000100/0002-0000/          step, attempt, generation
        rank00000-000.safetensors                 pieces of tensors that rank 0 held; files of bounded size
        parts/00000.8388736.<sha256>.json         part manifest of rank 0: rank, bytes of data, digest of this file
        manifest.json                             the last to appear; its presence is the commit

Nothing is ever overwritten or renamed, and a folder without manifest.json does not count. The name of a part manifest
carries its digest: one listing tells rank 0 that a rank is done, and what exactly it commits.

A tensor is a box of ``shape`` values; a piece is a smaller box of it, at ``offset``, stored row-major. Every block of a
piece has a CRC-32C, and so has the header of every file, so that no byte can change unnoticed.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import sys
from array import array
from itertools import pairwise
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from llm.utils.structs import ready

FORMAT = 2
ROOT = "checkpoints"
MANIFEST = "manifest.json"
PARTS = "parts"
MIN_BLOCK, MAX_BLOCK = 4 << 10, 1 << 20  # bytes that share a checksum

# Bytes per value, by the names that safetensors uses.
ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

_COMMIT = re.compile(r"checkpoints/step_([0-9]{8,18})/([0-9]{4,18})-([0-9]{4,18})")
_FILE = re.compile(r"rank(\d{5,})-(\d{3,})\.safetensors")
_PART = re.compile(r"([0-9]{5,18})\.([0-9]{1,18})\.([0-9a-f]{64})\.json")

Count = Annotated[int, Meta(ge=0, lt=2**62)]
Dimensions = Annotated[list[Count], Meta(max_length=16)]


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or trusted. One line that names the file and, if any, the tensor."""


class DamagedError(CheckpointError):
    """Proof that a committed checkpoint is not what was saved: the one before it is the newest that can be trusted.

    A store that does not answer, or refuses, proves nothing and never raises this.
    """


class Commit(msgspec.Struct, frozen=True, order=True):
    """Name of a checkpoint. Ordered for resuming: a newer attempt counts, whatever an older one has written since."""

    attempt: int
    generation: int
    step: int

    @property
    def path(self) -> str:
        """Folder relative to the run directory."""
        return f"{ROOT}/step_{self.step:08d}/{self.attempt:04d}-{self.generation:04d}"

    @staticmethod
    def parse(path: str) -> Commit:
        """The inverse of ``path``. Raises CheckpointError."""
        match = _COMMIT.fullmatch(path.strip("/"))
        if match is not None:
            step, attempt, generation = (int(group) for group in match.groups())
            commit = Commit(attempt=attempt, generation=generation, step=step)
            if commit.path == path.strip("/"):  # with more zeros it would be another folder
                return commit
        raise CheckpointError(f"{path} does not name a checkpoint: expected checkpoints/step_00000100/0000-0000")


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A box of one tensor: ``shape`` values that start at ``offset`` of the tensor, in one file."""

    offset: Dimensions
    shape: Dimensions
    file: Count  # index into PartManifest.files
    begin: Count  # first byte in the file
    block: Count  # bytes per checksum; the last block may be shorter
    crc32c: str  # base64 of one little-endian uint32 per block

    def checksums(self) -> array[int]:
        """The CRC-32C of every block, in order."""
        return unpack_checksums(self.crc32c)


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank saved of one tensor."""

    dtype: str  # as safetensors names it
    shape: Dimensions  # of the whole tensor
    pieces: list[Piece]
    placement: str = ""  # how it was spread over the mesh, one mark per mesh dimension: S0, S1, R

    def bytes(self, piece: Piece) -> int:
        """Size of one of its pieces."""
        return math.prod(piece.shape) * ITEMSIZE[self.dtype]


class DataFile(msgspec.Struct, frozen=True, kw_only=True):
    """A safetensors file. ``header`` bytes come before the data."""

    name: str
    bytes: Count
    header: Count
    header_crc32c: Annotated[int, Meta(ge=0, lt=2**32)]


class PartManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank saved. Replicated tensors are in the part of one rank only."""

    format: int
    rank: Count
    files: list[DataFile]
    tensors: dict[str, Tensor]
    rng: dict[str, str]  # generator -> base64 of its state


class PartEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How the manifest refers to a part: digest of the part manifest, bytes in its data files."""

    sha256: str
    bytes: Count


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The commit record. ``state`` is everything that is no tensor and no random generator."""

    format: int
    step: Count
    attempt: Count
    generation: Count
    time: float  # of the commit, epoch seconds
    seconds: float  # from the request to the commit
    world_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    mesh: dict[str, int]  # dimension -> ranks
    parent: str | None  # the commit that this one descends from
    code: str  # version of the program that saved
    parts: list[PartEntry]  # of rank 0, 1, ...
    state: dict[str, Any]
    sha256: str = ""  # of this record with the field empty

    @property
    def bytes(self) -> int:
        """Size of all data files."""
        return sum(part.bytes for part in self.parts)

    @property
    def commit(self) -> Commit:
        """Where it must lie."""
        return Commit(attempt=self.attempt, generation=self.generation, step=self.step)


def file_name(rank: int, index: int) -> str:
    """A data file of a rank."""
    return f"rank{rank:05d}-{index:03d}.safetensors"


def part_name(rank: int, size: int, sha256: str) -> str:
    """Path of a part manifest below its commit's folder; ``size`` counts the bytes of the rank's data files."""
    return f"{PARTS}/{rank:05d}.{size}.{sha256}.json"


def parse_part_name(name: str) -> tuple[int, PartEntry] | None:
    """(rank, entry) from the name of a file in the parts folder; None for anything else."""
    match = _PART.fullmatch(name)
    if match is None:
        return None
    rank, entry = int(match[1]), PartEntry(bytes=int(match[2]), sha256=match[3])
    return (rank, entry) if part_name(rank, entry.bytes, entry.sha256) == f"{PARTS}/{name}" else None


def block_size(piece_bytes: int) -> int:
    """Bytes per checksum: a reader of other rows reads at most 1/64 of a piece in vain at either end."""
    return min(max(1 << max(piece_bytes // 128, 1).bit_length(), MIN_BLOCK), MAX_BLOCK)


def pack_checksums(values: array[int]) -> str:
    """Base64 of little-endian uint32."""
    if sys.byteorder == "big":
        values = array("I", values)
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()


def unpack_checksums(text: str) -> array[int]:
    """The inverse of :func:`pack_checksums`. Raises ValueError."""
    values = array("I")
    values.frombytes(base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def seal(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, its own digest inside."""
    bare = msgspec.structs.replace(manifest, sha256="")
    digest = hashlib.sha256(msgspec.json.encode(bare)).hexdigest()
    return msgspec.json.encode(msgspec.structs.replace(bare, sha256=digest))


def open_manifest(data: bytes, commit: Commit) -> Manifest:
    """Decode and check the manifest of ``commit``. Raises DamagedError, or CheckpointError for another format."""
    path = f"{commit.path}/{MANIFEST}"
    manifest = _decode(data, Manifest, path)
    if seal(manifest) != data:
        raise DamagedError(f"{path} is damaged: its content and its own sha256 differ")
    if manifest.commit != commit:
        raise DamagedError(f"{path} belongs to another checkpoint: {manifest.commit.path}")
    if len(manifest.parts) != manifest.world_size:
        raise DamagedError(f"{path} lists {len(manifest.parts)} parts for {manifest.world_size} ranks")
    if any(not re.fullmatch("[0-9a-f]{64}", part.sha256) for part in manifest.parts):
        raise DamagedError(f"{path} is damaged: the digest of a part is none")
    _check_parent(manifest, commit, path)
    return manifest


def open_part(data: bytes, commit: Commit, rank: int, entry: PartEntry) -> PartManifest:
    """Decode and check a part manifest: every piece lies inside its tensor and its file, and none overlap.

    Raises DamagedError, or CheckpointError for another format.
    """
    path = f"{commit.path}/{part_name(rank, entry.bytes, entry.sha256)}"
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DamagedError(f"{path} is damaged: its content and its sha256 differ")
    part = _decode(data, PartManifest, path)
    if part.rank != rank:
        raise DamagedError(f"{path} belongs to rank {part.rank}")
    _check_files(part, entry, path)
    spans: list[list[tuple[int, int, str]]] = [[] for _ in part.files]
    for name, tensor in part.tensors.items():
        if tensor.dtype not in ITEMSIZE:
            raise DamagedError(f"{path}: tensor {name} has the unknown type {tensor.dtype}")
        for piece in tensor.pieces:
            _check_piece(piece, name, tensor, part, path)
            spans[piece.file].append((piece.begin, piece.begin + tensor.bytes(piece), name))
    for file, ranges in zip(part.files, spans, strict=True):
        for (_, end, first), (begin, _, second) in pairwise(sorted(ranges)):
            if begin < end:
                raise DamagedError(f"{path}: tensors {first} and {second} overlap in {file.name}")
    return part


def _check_parent(manifest: Manifest, commit: Commit, path: str) -> None:
    """Parents are older: nobody who follows them walks in circles."""
    try:
        older = manifest.parent is None or Commit.parse(manifest.parent) < commit
    except CheckpointError:
        older = False
    if not older:
        raise DamagedError(f"{path} is damaged: it says that it descends from {manifest.parent}")


def _check_files(part: PartManifest, entry: PartEntry, path: str) -> None:
    for index, file in enumerate(part.files):
        if file.name != file_name(part.rank, index):
            raise DamagedError(f"{path}: {file.name!r} is not the name of file {index} of rank {part.rank}")
        if not 8 <= file.header <= file.bytes:
            raise DamagedError(f"{path}: {file.name} cannot have a header of {file.header} of {file.bytes} bytes")
    if (total := sum(file.bytes for file in part.files)) != entry.bytes:
        raise DamagedError(f"{path}: its files have {total} bytes, the commit says {entry.bytes}")


def _check_piece(piece: Piece, name: str, tensor: Tensor, part: PartManifest, path: str) -> None:
    where = f"{path}: a piece of tensor {name}"
    if not len(piece.offset) == len(piece.shape) == len(tensor.shape):
        raise DamagedError(f"{where} has {len(piece.shape)} dimensions, the tensor has {len(tensor.shape)}")
    if any(o + n > limit for o, n, limit in zip(piece.offset, piece.shape, tensor.shape, strict=True)):
        raise DamagedError(f"{where} reaches outside: {piece.shape} at {piece.offset} of {tensor.shape}")
    if piece.file >= len(part.files):
        raise DamagedError(f"{where} is in file {piece.file} of {len(part.files)}")
    file, size = part.files[piece.file], tensor.bytes(piece)
    if piece.begin < file.header or piece.begin + size > file.bytes:
        raise DamagedError(
            f"{where} is at bytes {piece.begin} to {piece.begin + size} of {file.name}, which has {file.bytes}"
        )
    if not MIN_BLOCK <= piece.block <= MAX_BLOCK:
        raise DamagedError(f"{where} has blocks of {piece.block} bytes")
    try:
        count = len(piece.checksums())
    except ValueError:
        raise DamagedError(f"{where} has checksums that are not base64") from None
    if count != -(-size // piece.block):
        raise DamagedError(f"{where} has {count} checksums for {size} bytes in blocks of {piece.block}")


M = TypeVar("M", Manifest, PartManifest)


def _decode(data: bytes, kind: type[M], path: str) -> M:
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT:
            raise CheckpointError(f"{path} has format {version}, this version reads {FORMAT}: use the writer's")
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    except RecursionError:
        raise DamagedError(f"{path} is damaged: its values are nested too deeply") from None


class _Version(msgspec.Struct):
    format: int


ready(PartManifest, Manifest, _Version)
