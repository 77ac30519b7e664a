"""The double of an API server, and what the verbs need to find it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import llmops.backends.k8s as k8s
from llmops.backends.k8s import client
from tests.k8s.api.server import ADMIN, ApiServer


def write_kubeconfig(path: Path, url: str, token: str | None = ADMIN, namespace: str = "default") -> Path:
    """A kubeconfig with one context, ``prod``."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "prod",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": token} if token else {}}],
        "contexts": [{"name": "prod", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def server() -> Iterator[ApiServer]:
    double = ApiServer()
    yield double
    double.close()


@pytest.fixture
def kubeconfig(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """KUBECONFIG of the double; retries as in life, but without their pauses."""
    path = write_kubeconfig(tmp_path / "kubeconfig", server.url)
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(client, "BACKOFF_S", 0.001)
    k8s._connect.cache_clear()
    yield path
    k8s._connect.cache_clear()


@pytest.fixture
def api(kubeconfig: Path) -> client.Api:
    return client.connect("prod")
