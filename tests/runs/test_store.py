"""Every store behaves the same: a directory, memory, and a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmops.errors import ClusterError, UserError
from llmops.runs import object_store
from llmops.runs.store import Store, default_runs_url, open_store


@pytest.fixture(params=["posix", "memory", "s3", "ssh"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "posix":
        return str(tmp_path / "runs")
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


def test_what_is_put_is_read_back(store: Store) -> None:
    store.put("a/b.json", b"0123456789")
    store.put("a/b.json", b"9876543210")
    assert store.get("a/b.json") == b"9876543210"
    assert store.read("a/b.json", 2, 5) == b"765"
    assert store.read("a/b.json", 8) == b"10"
    assert store.read("a/b.json", 8, 100) == b"10"
    assert store.read("a/b.json", 10) == b""
    assert store.read("a/b.json", 50, 60) == b""
    assert store.size("a/b.json") == 10


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.put("empty", b"")
    assert (store.get("empty"), store.size("empty"), store.read("empty", 0)) == (b"", 0, b"")


def test_names_are_sorted_direct_children(store: Store) -> None:
    for path in ("run/b/x", "run/a", "run/b/y", "run/c", "other/z"):
        store.put(path, b"x")
    assert store.list("run") == ["a", "b", "c"]
    assert store.list("run/b") == ["x", "y"]
    assert store.list("run/a") == []
    assert store.list("nothing") == []
    assert store.list() == ["other", "run"]


def test_a_new_object_is_listed_at_once_whoever_wrote_it(store: Store, url: str) -> None:
    store.put("d/1", b"x")
    assert store.list("d") == ["1"]
    program = f"from llmops.runs.store import open_store; open_store({url!r}).put('d/2', b'y')"
    if url.startswith("memory"):
        open_store(url).put("d/2", b"y")
    else:
        subprocess.run([sys.executable, "-c", program], check=True)
    assert store.list("d") == ["1", "2"]
    assert store.exists("d/2")
    assert store.size("d/2") == 1


def test_what_is_absent_is_not_found(store: Store) -> None:
    store.put("d/1", b"x")
    for path in ("x", "d", "d/1/2"):
        with pytest.raises(FileNotFoundError):
            store.get(path)
        with pytest.raises(FileNotFoundError):
            store.size(path)
        with pytest.raises(FileNotFoundError):
            store.read(path, 0, 4)
    assert store.exists("d")
    assert store.exists("d/1")
    assert not store.exists("d/2")


def test_create_keeps_the_first(store: Store) -> None:
    assert store.create("job/0000/job.json", b"first")
    assert not store.create("job/0000/job.json", b"second")
    assert store.get("job/0000/job.json") == b"first"
    assert store.list("job/0000") == ["job.json"]


def test_of_eight_creators_exactly_one_wins(store: Store) -> None:
    rounds = 1 if store.url.startswith("s3") else 20  # the server lets one contender look per second
    for number in range(rounds):
        start = threading.Barrier(8)

        def attempt(who: int, start: threading.Barrier = start, path: str = f"claims/{number}") -> bool:
            start.wait(10)
            return store.create(path, b"%d" % who)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(attempt, range(8)))
        assert won.count(True) == 1
        assert store.get(f"claims/{number}") == b"%d" % won.index(True)
    assert len(store.list("claims")) == rounds


def test_sub_is_a_store_of_its_own(store: Store, url: str) -> None:
    store.sub("one").sub("two").put("x", b"x")
    assert store.get("one/two/x") == b"x"
    assert store.sub("one").url == f"{url}/one"
    assert store.sub("one").list() == ["two"]
    assert store.sub("").url == store.url


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../b", "a//b", "a/", ".", "a\0b"])
def test_paths_stay_inside(tmp_path: Path, path: str) -> None:
    for store in (open_store(tmp_path), open_store("memory://inside")):
        for verb in (store.get, store.list, store.exists, store.size, store.sub):
            with pytest.raises(ValueError, match="not a path inside"):
                verb(path)
        with pytest.raises(ValueError, match="not a path inside"):
            store.create(path, b"")


# Directories


def test_a_directory_by_any_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("runs", "./runs", "~/runs", f"file://{tmp_path}/runs", tmp_path / "runs"):
        assert open_store(name).local_path == tmp_path / "runs"
        assert open_store(name).url == str(tmp_path / "runs")
    assert open_store(f"file://{tmp_path}/with%20space").local_path == tmp_path / "with space"


def test_files_being_written_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    seen: list[list[str]] = []
    link = os.link

    def slow_link(source: Path, target: Path) -> None:
        seen.append(store.list("d"))
        assert len(list((tmp_path / "d").iterdir())) == 1
        link(source, target)

    monkeypatch.setattr(os, "link", slow_link)
    assert store.create("d/x", b"x")
    assert seen == [[]]
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["x"]


def test_create_sets_the_mode(tmp_path: Path) -> None:
    open_store(tmp_path).create("secret", b"", mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_a_link_that_the_server_made_twice_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the reply to the first link is lost, the second finds the name taken, by us."""
    link = os.link

    def link_with_lost_reply(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_with_lost_reply)
    assert open_store(tmp_path).create("x", b"mine")
    assert open_store(tmp_path).get("x") == b"mine"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    store = open_store(tmp_path)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ClusterError, match=f"^{tmp_path}: No space left on device"):
        store.put("x", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match=f"^{tmp_path}: permission denied"):
        open_store(tmp_path).create("x", b"")


def test_a_directory_store_does_not_import_fsspec(tmp_path: Path) -> None:
    program = (
        "import sys; from llmops.runs.store import open_store; s = open_store(sys.argv[1]); s.create('x', b''); "
        "s.list(); sys.exit('fsspec' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


# URLs that cannot work


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "is empty"),
        ("file://host/runs", "three slashes"),
        ("http://example.org/runs", "no exclusive create"),
        ("s4://bucket/runs", "no exclusive create"),
        ("s3://", "bucket is missing"),
    ],
)
def test_unfit_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_store(url)


def test_default_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPS_RUNS_URL", "s3://bucket/runs")
    assert default_runs_url() == "s3://bucket/runs"
    monkeypatch.delenv("LLMOPS_RUNS_URL")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_runs_url() == "/data/llmops/runs"


# Object stores


def test_s3_refuses_wrong_credentials_in_one_line(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=f"^{s3_url}: access denied") as caught:
        open_store(s3_url).put("x", b"x")
    assert "\n" not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()


class LostReply:
    """An object store whose first conditional put succeeds without an answer; the client's second is refused."""

    protocol = ("s3",)

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}

    def pipe_file(self, key: str, data: bytes, mode: str = "overwrite", **options: dict[str, str]) -> None:
        if key not in self.objects:
            self.objects[key] = (data, options["Metadata"])
        raise OSError(22, "At least one of the pre-conditions you specified did not hold")

    def exists(self, key: str) -> bool:
        return key in self.objects

    def metadata(self, key: str) -> dict[str, str]:
        return self.objects[key][1]

    def invalidate_cache(self, key: str) -> None:
        pass


def test_a_put_sent_twice_recognises_itself() -> None:
    store = object_store.FsspecStore(LostReply(), "bucket/runs", "s3://bucket/runs")
    assert store.create("x", b"same bytes")
    assert not store.create("x", b"same bytes")


def test_an_unreachable_store_is_one_line(s3_server: str, dead_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{dead_port}")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ClusterError, match="s3://bucket/runs: the store did not answer") as caught:
        open_store("s3://bucket/runs").list()
    assert "\n" not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()
