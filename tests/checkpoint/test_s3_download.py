"""Ranges of S3 objects that come straight from the socket, and what is left to s3fs."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs

from llm.utils.object_storage import ObjectStorage
from tests.checkpoint.proxy import Faults, Proxy, proxy

DATA = os.urandom(3_000_000)
SIGNED = "GET .*X-Amz-Signature"  # s3fs signs in a header


@pytest.fixture
def network(s3_server: str) -> Iterator[Proxy]:
    """A proxy in front of the S3 server, to see what is asked and how."""
    with proxy(s3_server) as made:
        yield made


@pytest.fixture
def at(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ObjectStorage]]:
    """The store, reached by an URL and other settings of the environment. The file x is in it."""
    ObjectStorage(s3_url).write("x", DATA)

    def reach(endpoint: str, **environment: str) -> ObjectStorage:
        for name, value in {"AWS_ENDPOINT_URL": endpoint, **environment}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        return ObjectStorage(s3_url)

    yield reach
    s3fs.S3FileSystem.clear_instance_cache()


def fetch(storage: ObjectStorage, start: int, *sizes: int) -> list[bytes]:
    buffers = [bytearray(size) for size in sizes]
    count = storage.read_into("x", start, [memoryview(each) for each in buffers])
    assert count == min(sum(sizes), max(len(DATA) - start, 0))
    return [bytes(each) for each in buffers]


def test_bytes_go_into_one_buffer_after_the_other(at: Callable[..., ObjectStorage], network: Proxy) -> None:
    storage = at(network.url)
    assert fetch(storage, 10, 0, 5, 1_000_000, 0, 1) == [
        b"", DATA[10:15], DATA[15:1_000_015], b"", DATA[1_000_015:1_000_016],
    ]  # fmt: skip
    assert fetch(storage, 2_999_990, 4, 100)[0] == DATA[2_999_990:2_999_994]
    assert fetch(storage, 3_000_000, 5) == [bytes(5)]
    assert network.count(SIGNED) >= 2
    with ThreadPoolExecutor(8) as pool:
        for start, (data,) in zip(
            range(0, 800, 8), pool.map(lambda at: fetch(storage, at, 8), range(0, 800, 8)), strict=True
        ):
            assert data == DATA[start : start + 8]


def test_a_connection_that_the_store_has_closed_is_replaced(at: Callable[..., ObjectStorage], network: Proxy) -> None:
    storage = at(network.url)
    fetch(storage, 0, 10)
    network.faults = Faults(match=SIGNED, first=1, cut_answer=0)
    assert fetch(storage, 20, 10) == [DATA[20:30]]
    assert fetch(storage, 30, 10) == [DATA[30:40]]


def test_a_download_that_stands_still_is_sent_again(
    at: Callable[..., ObjectStorage], network: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.utils.object_storage.STALL_S", 0.5)
    storage = at(network.url)
    network.faults = Faults(match=SIGNED, first=1, ignore=True)
    assert fetch(storage, 0, 1000) == [DATA[:1000]]
    assert network.count(SIGNED) == 2
    network.faults = Faults(match="GET", ignore=True)
    with pytest.raises(OSError, match=r"get s3://.*/x failed for .* tries") as caught:
        storage.within(2.0).read_into("x", 0, [memoryview(bytearray(10))])
    assert "Signature" not in str(caught.value)


def test_what_the_store_refuses_s3fs_explains(at: Callable[..., ObjectStorage], network: Proxy) -> None:
    storage = at(network.url, AWS_SECRET_ACCESS_KEY="wrong")
    with pytest.raises(PermissionError, match="get s3://") as caught:
        storage.read_into("x", 0, [memoryview(bytearray(10))])
    assert "X-Amz" not in str(caught.value)
    asked = network.count(SIGNED)
    with pytest.raises(PermissionError):
        storage.read_into("x", 0, [memoryview(bytearray(10))])
    assert network.count(SIGNED) == asked  # only s3fs knows how to ask this store


def test_through_a_proxy_of_the_environment_s3fs_goes(
    at: Callable[..., ObjectStorage], network: Proxy, dead_port: int
) -> None:
    storage = at(network.url, http_proxy=f"http://127.0.0.1:{dead_port}", no_proxy="")
    with pytest.raises(OSError, match="get s3://"):
        storage.within(1.0).read_into("x", 0, [memoryview(bytearray(10))])
    assert network.seen == []
    direct = at(network.url, no_proxy="127.0.0.1")
    assert fetch(direct, 0, 10) == [DATA[:10]]
    assert network.count(SIGNED) == 1


def test_by_https_with_an_authority_of_the_site(
    at: Callable[..., ObjectStorage], s3_server: str, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "2", *name, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *options], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with proxy(s3_server, context) as secure:
        with pytest.raises(OSError, match=r"(?i)certificate"):
            at(secure.url).within(15.0).read_into("x", 0, [memoryview(bytearray(10))])
        storage = at(secure.url, AWS_CA_BUNDLE=str(certificate))
        assert fetch(storage, 5, 1_000_000) == [DATA[5:1_000_005]]
        assert secure.count(SIGNED) == 1
