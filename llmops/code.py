"""The code that a run executes, frozen: one archive per distinct content, shared by all runs that have it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from llmops.errors import UserError
from llmops.runs.records import archive_path
from llmops.runs.store import open_store

# Never code, and often larger than it.
SKIPPED_FOLDERS = frozenset(
    {
        ".git",
        ".hg",
        ".svn",
        "__pycache__",
        ".venv",
        "node_modules",
        ".tox",
        ".nox",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
    }
)
MAX_FILES = 100_000
GIT_TIMEOUT_S = 120
# Of every entry, so that equal content gives an equal archive; zip files know no earlier time.
MTIME = 315532800


class CodeSnapshot(NamedTuple):
    """One archive. ``sha256`` is that of the tar file inside it; ``bytes`` counts file contents, uncompressed.

    ``git_commit`` and ``dirty`` are those of the repository it was taken from; ``skipped_links`` lead out of the root.
    """

    sha256: str
    archive: str  # absolute path or URL, as jobs open it
    root: Path
    git_commit: str | None
    dirty: bool
    files: int
    bytes: int
    skipped_links: tuple[str, ...]


class _Entry(NamedTuple):
    name: str  # relative to the root
    path: Path
    size: int
    link: str | None  # target of a symbolic link


def snapshot(root: Path | None, runs_url: str, max_mb: float, exclude: Sequence[str] = ()) -> CodeSnapshot:
    """Archive the files under ``root`` as ``<runs_url>/code/<sha256>.tar.gz``, unless that is there already.

    In a git repository: what git tracks or would offer to add, as it is on disk. Elsewhere: all but what ``.gitignore``
    names. ``exclude`` holds further gitignore patterns. Without ``root`` it is the repository of the current folder, or
    the current folder. Raises :class:`UserError` when the root cannot be used or its files exceed ``max_mb``
    (10^6 bytes).
    """
    chosen = _root(root)
    top = _git(chosen, "rev-parse", "--show-toplevel")
    if root is None and top is not None:
        chosen = Path(top.rstrip("\n"))
    _refuse_root(chosen)
    store = open_store(runs_url)
    skip = _inside(store.local_path, chosen)
    names = _repository_files(chosen) if top is not None else _walk(chosen, "", [])
    entries, skipped = _entries(chosen, names, skip, exclude)
    total = sum(entry.size for entry in entries)
    if total > max_mb * 1e6 or len(entries) > MAX_FILES:
        raise UserError(_too_large(chosen, entries, total, max_mb))
    if not entries and root is not None:
        raise UserError(f"code.root={root}: no file in it is code: all are ignored or excluded, or it is empty")
    commit, dirty = _revision(chosen) if top is not None else (None, False)
    with io.BytesIO() as buffer:
        count, written = _write_tar(buffer, entries)
        with buffer.getbuffer() as content:
            digest = hashlib.sha256(content).hexdigest()
            path = archive_path(digest)
            if not store.exists(path):
                store.create(path, gzip.compress(content, compresslevel=3, mtime=0))
    return CodeSnapshot(digest, f"{store.job_url}/{path}", chosen, commit, dirty, count, written, tuple(skipped))


def current_folder() -> str:
    """The current folder inside a snapshot that is taken without ``root``; empty at its top."""
    prefix = _git(Path.cwd(), "rev-parse", "--show-prefix")
    return prefix.rstrip("\n").rstrip("/") if prefix else ""


def _root(root: Path | None) -> Path:
    chosen = Path(os.path.realpath(os.path.expanduser(root or Path())))  # noqa: PTH111 - copes with links to themselves
    if not chosen.is_dir():
        raise UserError(f"code.root={root}: there is no such folder")
    return chosen


def _refuse_root(chosen: Path) -> None:
    home = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111 - Path.expanduser fails where there is no home
    if chosen == home or chosen in home.parents:
        what = "the file system's root" if chosen == chosen.parent else f"{chosen}, which holds your home directory"
        what = f"{chosen}, your home directory" if chosen == home else what
        raise UserError(
            f"the code snapshot would be of {what}: run llmops in the project's folder, set code.root=FOLDER, or turn "
            "it off with code.enabled=false"
        )
    if chosen == chosen.parent:
        raise UserError("the code snapshot would be of the file system's root: set code.root=FOLDER")


def _inside(folder: Path | None, root: Path) -> str | None:
    """The runs folder relative to the root, when it lies in it."""
    if folder is None:
        return None
    resolved = Path(os.path.realpath(folder))
    if resolved == root:
        raise UserError(
            f"runs_url={folder} is the folder of the code itself: choose a folder of its own, such as runs/"
        )
    return resolved.relative_to(root).as_posix() if resolved.is_relative_to(root) else None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or ``None`` where there is no git or no repository."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**env, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{folder}: git {arguments[0]} did not finish in {GIT_TIMEOUT_S} s; set code.root=FOLDER to a smaller one"
        ) from error
    return os.fsdecode(done.stdout) if done.returncode == 0 else None


def _revision(folder: Path) -> tuple[str | None, bool]:
    """The commit, if there is one, and whether the files differ from it."""
    text = _git(folder, "status", "--porcelain=v2", "--branch", "-z", "--untracked-files=normal", "--", ".")
    commit, dirty = None, False
    for line in (text or "").split("\0"):
        if line.startswith("# branch.oid "):
            oid = line.removeprefix("# branch.oid ")
            commit = None if oid == "(initial)" else oid
        elif line and not line.startswith("# "):
            dirty = True
    return commit, dirty


def _repository_files(folder: Path, prefix: str = "") -> Iterator[str]:
    """Names that git tracks or would offer to add, those of submodules and nested repositories included."""
    listing = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listing is None:  # a submodule that is not checked out, or no repository after all
        return
    for name in sorted(set(listing.split("\0")) - {""}):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            if (path / ".git").exists():
                yield from _repository_files(path, f"{prefix}{name.rstrip('/')}/")
        else:
            yield f"{prefix}{name}"


def _walk(folder: Path, prefix: str, rules: list[tuple[str, object]]) -> Iterator[str]:
    """Names below a folder that no ``.gitignore`` on the way excludes."""
    ignore = folder / ".gitignore"
    if ignore.is_file():
        rules = [(prefix, _patterns(ignore.read_text("utf-8", "replace").splitlines())), *rules]
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError as error:
        raise UserError(f"{folder}: cannot be read; leave it out with code.exclude=[{prefix}]") from error
    for entry in entries:
        name = prefix + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if _ignored(name + "/" if is_folder else name, rules):
            continue
        if not is_folder:
            yield name
        elif entry.name not in SKIPPED_FOLDERS and not Path(entry.path, "pyvenv.cfg").exists():
            yield from _walk(Path(entry.path), f"{name}/", rules)


def _patterns(lines: Sequence[str]) -> object:
    import pathspec

    return pathspec.GitIgnoreSpec.from_lines(lines)


def _ignored(name: str, rules: list[tuple[str, object]]) -> bool:
    """The nearest ``.gitignore`` that says something about a name decides."""
    for prefix, patterns in rules:
        include = patterns.check_file(name.removeprefix(prefix)).include  # type: ignore[attr-defined]
        if include is not None:
            return bool(include)
    return False


def _entries(
    root: Path, names: Iterator[str], skip: str | None, exclude: Sequence[str]
) -> tuple[list[_Entry], list[str]]:
    """What to archive, in order of name, and the links that were left out because they lead elsewhere."""
    patterns = [("", _patterns(exclude))] if exclude else []
    entries, skipped = [], []
    for name in names:
        if skip is not None and f"{name}/".startswith(f"{skip}/"):
            continue
        if patterns and _ignored(name, patterns):
            continue
        path = root / name
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # tracked, and deleted on disk
        if stat.S_ISREG(status.st_mode):
            entries.append(_Entry(name, path, status.st_size, None))
        elif stat.S_ISLNK(status.st_mode):
            link = _link(root, name)
            if link is None:
                skipped.append(name)
            else:
                entries.append(_Entry(name, path, 0, link))
        if len(entries) > 2 * MAX_FILES:
            break  # far too many already
    entries.sort(key=lambda entry: entry.name)
    return entries, skipped


def _link(root: Path, name: str) -> str | None:
    """Target of a symbolic link as the archive can hold it, or ``None`` when it leads out of the root."""
    path = root / name
    target = Path(os.path.realpath(path))  # unlike Path.resolve, it copes with a link to itself
    if not target.is_relative_to(root) or target == path:
        return None
    link = os.fspath(path.readlink())
    # Spelled through the root's own name, it would lead out wherever the archive is unpacked.
    spelled_inside = not os.path.normpath(os.path.join(os.path.dirname(name), link)).startswith(("..", "/"))  # noqa: PTH118, PTH120
    return link if spelled_inside else os.path.relpath(target, path.parent)


def _write_tar(buffer: IO[bytes], entries: list[_Entry]) -> tuple[int, int]:
    """A tar file that depends on names, contents and executable bits alone. Returns the numbers of files and bytes."""
    count = written = 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.mtime = MTIME
            if entry.link is not None:
                info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.link, 0o777
                tar.addfile(info)
            else:
                content = None
                with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                    content = _read(entry)
                if content is None:
                    continue
                # A file may have changed since it was listed: what counts is what is read here.
                info.size = len(content)
                info.mode = 0o755 if os.access(entry.path, os.X_OK) else 0o644
                tar.addfile(info, io.BytesIO(content))
                written += len(content)
            count += 1
    return count, written


def _read(entry: _Entry) -> bytes:
    try:
        return entry.path.read_bytes()
    except PermissionError as error:
        raise UserError(f"{entry.path}: cannot be read; leave it out with code.exclude=[{entry.name}]") from error


def _too_large(root: Path, entries: list[_Entry], total: int, max_mb: float) -> str:
    largest = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in _largest(entries))
    if total <= max_mb * 1e6:
        return (
            f"the code snapshot of {root} has more than {MAX_FILES} files, most of it in {largest}; leave folders out "
            "with code.exclude=[PATTERN] or .gitignore, or set code.root=FOLDER"
        )
    return (
        f"the code snapshot of {root} is {total / 1e6:.0f} MB, more than code.max_mb={max_mb:g}; largest: {largest}; "
        "leave them out with code.exclude=[PATTERN] or .gitignore, or raise code.max_mb"
    )


def _largest(entries: list[_Entry]) -> list[tuple[str, int]]:
    """The three largest files or folders; a folder is opened while one thing in it is nearly all of it."""
    prefix = ""
    while True:
        sizes: dict[str, int] = {}
        for entry in entries:
            if entry.name.startswith(prefix):
                head, slash, _ = entry.name[len(prefix) :].partition("/")
                sizes[prefix + head + slash] = sizes.get(prefix + head + slash, 0) + entry.size
        ranked = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        if not ranked or not ranked[0][0].endswith("/") or ranked[0][1] < 0.8 * sum(sizes.values()):
            return ranked
        prefix = ranked[0][0]
