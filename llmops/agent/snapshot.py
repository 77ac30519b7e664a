"""Unpacking the run's code snapshot on this node, once, whoever asks first."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile

from llmops.agent.rundir import RunDir


def cache_root() -> str:
    """A folder of this user alone on the node's own disk."""
    root = os.path.join(tempfile.gettempdir(), f"llmops-code-{os.getuid()}")
    os.makedirs(root, mode=0o700, exist_ok=True)
    status = os.lstat(root)
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or not os.path.isdir(root) or os.path.islink(root):
        # Anybody may make folders in a shared /tmp: never run code from one that somebody else made.
        return tempfile.mkdtemp(prefix="llmops-code-")
    return root


def unpack(archive: str, rundir: RunDir) -> str:
    """Unpack the content-addressed ``archive`` (path or URL of ``<sha256>.tar.gz``) and return its folder.

    Unpacked aside and renamed into place, so that a folder that exists is whole; attempts and runs of the same code
    share it.
    """
    digest = os.path.basename(archive).split(".", 1)[0]
    target = os.path.join(cache_root(), digest)
    if os.path.isdir(target):
        return target
    aside = tempfile.mkdtemp(prefix=f"{digest[:12]}.", dir=os.path.dirname(target))
    try:
        with rundir.local_copy(archive) as path, tarfile.open(path, "r:gz") as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(aside, filter="data")
            else:  # Python before 3.9.17: the archive is our own, from the run directory.
                tar.extractall(aside)  # noqa: S202
        try:
            os.rename(aside, target)
        except OSError:
            if not os.path.isdir(target):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
