"""The checkpoint format: names, manifests, and which commit is the newest. Free of torch.

    checkpoints/step_00000100/0002-0000/      step, attempt, generation
        rank00000.safetensors                 this rank's rows of every tensor
        rank00000.json                        part manifest: where each of them belongs, and its CRC-32
        manifest.json                         the last to appear; its presence is the commit

Nothing is ever overwritten, and a folder without manifest.json does not count.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, TypeVar

import msgspec

from llm.utils.storage import Storage

FORMAT = 1
ROOT = "checkpoints"
MANIFEST = "manifest.json"
_COMMIT = re.compile(r"checkpoints/step_(\d{8,})/(\d{4,})-(\d{4,})")


class CheckpointError(Exception):
    """A checkpoint that cannot be written or trusted. One line that names the file and, if any, the tensor."""


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
        if match is None:
            raise CheckpointError(f"{path} does not name a checkpoint: expected checkpoints/step_00000100/0000-0000")
        step, attempt, generation = (int(group) for group in match.groups())
        return Commit(attempt=attempt, generation=generation, step=step)


class TensorPart(msgspec.Struct, frozen=True, kw_only=True):
    """The box of one tensor that one rank saved: ``local_shape`` values at ``offset`` of the global ``shape``."""

    dtype: str  # as safetensors names it
    shape: list[int]
    offset: list[int]
    local_shape: list[int]
    begin: int  # first byte in the data file
    end: int
    crc32: int


class PartManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank saved."""

    format: int
    rank: int
    file: str
    bytes: int
    tensors: dict[str, TensorPart]
    rng: dict[str, str]  # generator -> base64 of its state


class PartEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How the manifest refers to a part manifest."""

    rank: int
    manifest: str
    sha256: str
    file: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The commit record. ``state`` is everything that is no tensor and no random generator."""

    format: int
    step: int
    attempt: int
    generation: int
    time: float
    world_size: int
    parent: str | None
    parts: list[PartEntry]
    state: dict[str, Any]
    sha256: str = ""  # of this record with the field empty


def seal(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, its own digest inside."""
    bare = msgspec.structs.replace(manifest, sha256="")
    digest = hashlib.sha256(msgspec.json.encode(bare)).hexdigest()
    return msgspec.json.encode(msgspec.structs.replace(bare, sha256=digest))


M = TypeVar("M", Manifest, PartManifest)


def shard_name(rank: int) -> str:
    """Data file of a rank."""
    return f"rank{rank:05d}.safetensors"


def part_name(rank: int) -> str:
    """Part manifest of a rank."""
    return f"rank{rank:05d}.json"


def decode(data: bytes, kind: type[M], path: str) -> M:
    """Parse a manifest or part manifest. Raises CheckpointError naming ``path``."""
    try:
        decoded = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if decoded.format != FORMAT:
        raise CheckpointError(f"{path} has format {decoded.format}, this version reads {FORMAT}: use a newer llmops")
    return decoded


def read_manifest(storage: Storage, commit: Commit) -> Manifest:
    """The manifest of a commit. Raises CheckpointError when it is missing, damaged or somewhere else than it says."""
    path = f"{commit.path}/{MANIFEST}"
    try:
        data = storage.read(path)
    except FileNotFoundError:
        raise CheckpointError(f"{storage.url}/{path} does not exist: this checkpoint was never committed") from None
    manifest = decode(data, Manifest, path)
    if seal(manifest) != data:
        raise CheckpointError(f"{path} is damaged: its content and its own sha256 differ")
    if Commit(attempt=manifest.attempt, generation=manifest.generation, step=manifest.step) != commit:
        raise CheckpointError(f"{path} belongs to another checkpoint: step {manifest.step}, attempt {manifest.attempt}")
    if [part.rank for part in manifest.parts] != list(range(manifest.world_size)):
        raise CheckpointError(f"{path} does not list one part for each of its {manifest.world_size} ranks")
    return manifest


def folders(storage: Storage) -> list[Commit]:
    """Every checkpoint folder, committed or not, oldest first."""
    paths = [f"{ROOT}/{step}/{name}" for step in storage.list(ROOT) for name in storage.list(f"{ROOT}/{step}")]
    return sorted(Commit.parse(path) for path in paths if _COMMIT.fullmatch(path))


def commits(storage: Storage) -> list[Commit]:
    """Every committed checkpoint, oldest first."""
    return [commit for commit in folders(storage) if MANIFEST in storage.list(commit.path)]


def newest_commit(storage: Storage) -> Commit | None:
    """The commit to resume from: the last of the newest attempt that committed anything."""
    for commit in reversed(folders(storage)):
        if MANIFEST in storage.list(commit.path):
            return commit
    return None


def ancestors(storage: Storage, commit: Commit, manifest: Manifest) -> list[Commit]:
    """The chain of commits that ends in ``commit``, oldest first, as far back as it can be read."""
    chain = [commit]
    while manifest.parent is not None:
        parent = Commit.parse(manifest.parent)
        try:
            manifest = read_manifest(storage, parent)
        except CheckpointError:  # removed by retention, or damaged: in neither case does this run need it
            break
        chain.append(parent)
    return chain[::-1]


def delete(storage: Storage, commit: Commit) -> None:
    """Remove a checkpoint: first the manifest, so that nobody ever sees a commit whose data is gone."""
    storage.remove(f"{commit.path}/{MANIFEST}")
    storage.remove_folder(commit.path)
    storage.remove_folder(f"{ROOT}/step_{commit.step:08d}", only_empty=True)
