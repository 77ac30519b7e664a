"""The code snapshot: what is in it, where it goes, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llmops.agent.rundir import RunDir
from llmops.agent.snapshot import unpack
from llmops.code import CodeSnapshot, snapshot
from llmops.errors import UserError

GIT = {
    "GIT_AUTHOR_NAME": "ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
}


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "protocol.file.allow=always", "-c", "init.defaultBranch=main", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **GIT}, capture_output=True, text=True, check=True
    ).stdout


def write(folder: Path, files: dict[str, str]) -> Path:
    """Make files with their folders."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def members(taken: CodeSnapshot) -> list[str]:
    with tarfile.open(taken.archive) as tar:
        return tar.getnames()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project that is in no repository."""
    return write(tmp_path / "project", {"train.py": "print(1)\n", "pkg/mod.py": "x = 1\n"})


@pytest.fixture
def repo(root: Path) -> Path:
    """The project, committed."""
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "first")
    return root


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., CodeSnapshot]:
    def taken(root: Path | None, max_mb: float = 10, exclude: tuple[str, ...] = ()) -> CodeSnapshot:
        return snapshot(root, str(tmp_path / "runs"), max_mb, exclude)

    return taken


Take = Callable[..., CodeSnapshot]


def test_archive_is_named_by_its_content(root: Path, take: Take, tmp_path: Path) -> None:
    taken = take(root)
    archive = Path(taken.archive)
    assert archive == tmp_path / "runs" / "code" / f"{taken.sha256}.tar.gz"
    assert hashlib.sha256(gzip.decompress(archive.read_bytes())).hexdigest() == taken.sha256
    assert os.listdir(archive.parent) == [archive.name]
    assert (taken.files, taken.bytes) == (2, 15)
    assert (taken.git_commit, taken.dirty, taken.skipped_links) == (None, False, ())


def test_equal_content_is_one_archive(root: Path, take: Take, tmp_path: Path) -> None:
    first = take(root)
    before = Path(first.archive).stat().st_mtime_ns
    for path in root.rglob("*.py"):
        os.utime(path, (1, 1))
    copy = root.rename(tmp_path / "elsewhere")
    second = take(copy)
    assert (second.sha256, second.archive) == (first.sha256, first.archive)
    assert Path(first.archive).stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["content", "name", "mode", "link"])
def test_any_difference_is_another_archive(change: str, root: Path, take: Take) -> None:
    first = take(root)
    if change == "content":
        (root / "train.py").write_text("print(2)\n")
    elif change == "name":
        (root / "train.py").rename(root / "train2.py")
    elif change == "mode":
        (root / "train.py").chmod(0o755)
    else:
        (root / "train.py").unlink()
        (root / "train.py").symlink_to("pkg/mod.py")
    assert take(root).sha256 != first.sha256


def test_the_supervisor_unpacks_it(root: Path, take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (root / "train.py").chmod(0o744)
    (root / "by_root.py").symlink_to(root / "pkg" / "mod.py")
    (root / "pkg" / "around.py").symlink_to("../../project/train.py")
    (root / "pkg_again").symlink_to("pkg")
    (root / "naïve \n name.py").write_text("")
    (root / os.fsdecode(b"latin\xe9.py")).write_text("")
    folder = Path(unpack(take(root).archive, RunDir(str(tmp_path))))
    assert sorted(os.listdir(folder)) == sorted(os.listdir(root))
    assert os.access(folder / "train.py", os.X_OK)
    assert not os.access(folder / "pkg" / "mod.py", os.X_OK)
    assert (folder / "by_root.py").readlink() == Path("pkg/mod.py")
    assert (folder / "pkg" / "around.py").read_text() == "print(1)\n"
    assert (folder / "pkg_again" / "mod.py").read_text() == "x = 1\n"


def test_links_that_lead_out_are_left_out(root: Path, take: Take, tmp_path: Path) -> None:
    write(tmp_path, {"secret": "x"})
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "pkg" / "up").symlink_to("../../secret")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nothing")
    taken = take(root)
    assert taken.skipped_links == ("loop", "out", "pkg/up")
    assert members(taken) == ["dangling", "pkg/mod.py", "train.py"]


def test_uncommitted_work_is_included(repo: Path, take: Take) -> None:
    assert not take(repo).dirty
    write(repo, {"new.py": "new", ".gitignore": "*.log\n/data\n", "a.log": "x", "data/big": "x", "pkg/b.log": "x"})
    (repo / "train.py").write_text("print('edited')\n")
    (repo / "pkg" / "mod.py").unlink()
    taken = take(repo)
    assert members(taken) == [".gitignore", "new.py", "train.py"]
    assert taken.git_commit == git(repo, "rev-parse", "HEAD").strip()
    assert taken.dirty


def test_root_without_a_choice_is_the_repository(repo: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo / "pkg")
    assert take(None).root == repo
    assert members(take(Path("."))) == ["mod.py"]


def test_root_without_a_choice_outside_a_repository(root: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert take(None).root == root


def test_a_git_hook_does_not_mislead(repo: Path, take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert take(repo).git_commit is not None


def test_repository_without_a_commit(root: Path, take: Take) -> None:
    git(root, "init")
    taken = take(root)
    assert (taken.git_commit, taken.dirty, taken.files) == (None, True, 2)


def test_submodules_and_nested_repositories(repo: Path, take: Take, tmp_path: Path) -> None:
    library = write(tmp_path / "library", {"lib.py": "lib", ".gitignore": "*.o\n"})
    git(library, "init")
    git(library, "add", ".")
    git(library, "commit", "-m", "lib")
    git(repo, "submodule", "add", str(library), "deps/lib")
    git(repo, "clone", str(library), "untracked")
    write(repo, {"deps/lib/x.o": "object", "deps/lib/new.py": "new"})
    names = members(take(repo))
    assert names == [
        ".gitmodules",
        "deps/lib/.gitignore",
        "deps/lib/lib.py",
        "deps/lib/new.py",
        "pkg/mod.py",
        "train.py",
        "untracked/.gitignore",
        "untracked/lib.py",
    ]
    git(repo, "submodule", "deinit", "-f", "deps/lib")
    assert "deps/lib/lib.py" not in members(take(repo))


def test_gitignore_holds_without_git(root: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, {".gitignore": "*.log\nout/\n!keep.log\n", "a.log": "x", "keep.log": "x", "out/x": "x", "pkg/out": "x"})
    write(root, {"pkg/.gitignore": "!a.log\n/mod.py\n", "pkg/a.log": "x", "pkg/sub/mod.py": "x"})
    expected = [".gitignore", "keep.log", "pkg/.gitignore", "pkg/a.log", "pkg/out", "pkg/sub/mod.py", "train.py"]
    assert members(take(root)) == expected
    git(root, "init")
    assert members(take(root)) == expected
    monkeypatch.setenv("PATH", "")
    assert members(take(root)) == expected


def test_what_is_never_code(root: Path, take: Take) -> None:
    for name in (".venv/x", "pkg/__pycache__/mod.pyc", "node_modules/x", "env/pyvenv.cfg", "env/lib"):
        write(root, {name: "x"})
    os.mkfifo(root / "pipe")
    assert members(take(root)) == ["pkg/mod.py", "train.py"]


def test_exclude(repo: Path, take: Take) -> None:
    write(repo, {"data/a.bin": "x", "data/b.txt": "x"})
    assert members(take(repo, exclude=("*.bin", "pkg/"))) == ["data/b.txt", "train.py"]
    assert members(take(repo, exclude=("/data/*", "!/data/b.txt"))) == ["data/b.txt", "pkg/mod.py", "train.py"]


def test_runs_inside_the_root_are_left_out(repo: Path) -> None:
    write(repo, {"runs/r1/run.json": "{}"})
    taken = snapshot(repo, str(repo / "runs"), 10)
    assert members(taken) == ["pkg/mod.py", "train.py"]
    assert snapshot(repo, str(repo / "runs"), 10).sha256 == taken.sha256


def test_runs_folder_is_the_root(root: Path) -> None:
    with pytest.raises(UserError, match="is the folder of the code itself"):
        snapshot(root, str(root), 10)


def test_too_large(root: Path, take: Take) -> None:
    write(root, {"pkg/data/a": "a" * 900_000, "pkg/data/b": "b" * 300_000, "model.bin": "m" * 100_000})
    with pytest.raises(UserError) as caught:
        take(root, max_mb=1)
    message = str(caught.value)
    assert "is 1 MB, more than code.max_mb=1" in message
    assert "largest: pkg/data/a (0.9 MB), pkg/data/b (0.3 MB)" in message
    assert "code.exclude=[PATTERN] or .gitignore, or raise code.max_mb" in message
    assert take(root, max_mb=1.4).files == 5
    assert take(root, max_mb=1, exclude=("pkg/data/",)).files == 3


def test_too_many_files(root: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmops.code.MAX_FILES", 3)
    write(root, {f"many/{number}": "x" for number in range(20)})
    with pytest.raises(UserError, match="more than 3 files, most of it in many/"):
        take(root)


@pytest.mark.parametrize("make_repository", [False, True])
def test_home_is_refused(make_repository: bool, root: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    if make_repository:
        git(root, "init")
    monkeypatch.chdir(root / "pkg" if make_repository else root)
    with pytest.raises(UserError, match="your home directory: run llmops in the project's folder"):
        take(None)
    with pytest.raises(UserError, match="which holds your home directory"):
        take(root.parent)
    with pytest.raises(UserError, match="of the file system's root"):
        take(Path("/"))
    assert take(root / "pkg").files == 1


def test_root_that_is_not_there(take: Take, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        take(tmp_path / "nope")


def test_nothing_to_take(take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in it is code"):
        take(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    assert take(None).files == 0


def test_file_that_cannot_be_read(root: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(UserError, match=r"mod.py: cannot be read; leave it out with code.exclude=\[pkg/mod.py\]"):
        take(root)


def test_file_that_vanishes(root: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "mod.py":
            path.unlink()
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    taken = take(root)
    assert (members(taken), taken.files) == (["train.py"], 1)


def test_object_store(root: Path, memory_url: str) -> None:
    from llmops.runs.store import open_store

    taken = snapshot(root, memory_url, 10)
    assert taken.archive == f"{memory_url}/code/{taken.sha256}.tar.gz"
    data = open_store(memory_url).get(f"code/{taken.sha256}.tar.gz")
    assert hashlib.sha256(gzip.decompress(data)).hexdigest() == taken.sha256
    assert snapshot(root, memory_url, 10) == taken
