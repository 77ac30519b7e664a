"""Tags are names of commits that stay what they are."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from llm.checkpoint.format import CheckpointError, Commit
from llm.checkpoint.lineage import commits, delete, folders
from llm.checkpoint.tags import add_tag, check_name, delete_tag, read_tags
from llm.utils.local_storage import LocalStorage
from tests.checkpoint.maker import make_commit


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path)


@pytest.fixture
def two(storage):
    held = [{"x": (np.zeros(2, np.float32), [2], [0])}]
    return make_commit(storage, 10, held), make_commit(storage, 20, held)


def test_tags_come_and_go(storage, two):
    add_tag(storage, two[0], "good")
    add_tag(storage, two[0], "also.good-1_x", by="ada")
    add_tag(storage, two[0], "good")
    assert read_tags(storage) == ({"good": two[0], "also.good-1_x": two[0]}, [])
    with pytest.raises(CheckpointError, match=r"good is checkpoints/step_00000010/0000-0000: delete that tag first"):
        add_tag(storage, two[1], "good")
    delete_tag(storage, "good")
    add_tag(storage, two[1], "good")
    assert read_tags(storage)[0]["good"] == two[1]
    with pytest.raises(CheckpointError, match="there is no tag better"):
        delete_tag(storage, "better")
    assert folders(storage) == commits(storage) == list(two), "tags are no checkpoints"


@pytest.mark.parametrize(
    "name", ["", "7", "٧", "latest", "a/b", "../x", ".hidden", "-x", "a b", "a\n", "x" * 65, "é", "a@b"]
)
def test_names_that_cannot_be(storage, two, name):
    for call in (lambda: check_name(name), lambda: add_tag(storage, two[0], name), lambda: delete_tag(storage, name)):
        with pytest.raises(CheckpointError, match="cannot be a tag"):
            call()
    assert storage.list("") == ["checkpoints"]


def test_only_commits_are_tagged(storage, two):
    for commit in (Commit(attempt=0, generation=0, step=30), two[0]):
        delete(storage, commit)
        with pytest.raises(CheckpointError, match="it was not tagged"):
            add_tag(storage, commit, "gone")
    assert read_tags(storage) == ({}, [])


def test_one_of_many_who_want_a_name_gets_it(storage, two):
    barrier = threading.Barrier(8)
    lost = []

    def want(commit):
        barrier.wait()
        try:
            add_tag(storage, commit, "wanted")
        except CheckpointError:
            lost.append(commit)

    threads = [threading.Thread(target=want, args=(two[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = read_tags(storage)[0]["wanted"]
    assert lost == [two[1 - two.index(winner)]] * 4


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"commit": "/etc/passwd", "time": 1}', b"\xff"])
def test_tags_that_cannot_be_read(storage, two, content):
    storage.write("tags/bad.json", content)
    storage.write("tags/not ours", b"")
    add_tag(storage, two[0], "good")
    assert read_tags(storage) == ({"good": two[0]}, ["tags/bad.json"])
    with pytest.raises(CheckpointError, match="bad can no longer be read: delete that tag first"):
        add_tag(storage, two[0], "bad")
    delete_tag(storage, "bad")
    assert read_tags(storage) == ({"good": two[0]}, [])
