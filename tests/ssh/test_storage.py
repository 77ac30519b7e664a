"""Checkpoints' files on another host."""

from __future__ import annotations

import pytest

from llmops.runs.ssh_storage import SshStorage, open_storage
from llmops.runs.store import open_store


@pytest.fixture
def storage(ssh_url):
    found = open_storage(open_store(ssh_url))
    assert isinstance(found, SshStorage)
    return found


def test_files_are_written_once_read_in_parts_and_removed(storage):
    storage.create("step/a", b"0123456789")
    storage.create("step/a", b"0123456789")  # the answer to the first may have been lost
    with pytest.raises(FileExistsError):
        storage.create("step/a", b"other")
    storage.write("step/b", memoryview(b"bb"))
    storage.replace("step/b", b"b")
    first, second = bytearray(3), bytearray(20)
    assert storage.read_into("step/a", 2, [memoryview(first), memoryview(second)]) == 8
    assert (bytes(first), bytes(second[:5])) == (b"234", b"56789")
    assert storage.read("step/a", 1, 3) == b"12"
    with pytest.raises(FileNotFoundError):
        storage.read("step/c")
    assert storage.sizes("step") == {"a": 10, "b": 1}
    assert storage.sizes("") == {"step": None}
    assert storage.sizes("nothing") == {}
    storage.remove("step/a")
    storage.remove("step/a")
    storage.remove_folder("step", only_empty=True)
    assert storage.list("step") == ["b"]
    storage.remove_folder("step")
    storage.remove_folder("step")
    assert storage.list("") == []
