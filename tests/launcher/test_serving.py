"""A run that serves another run's model, by the launcher: it says where it is, ends in order, and comes back."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from llmops.monitor.endpoint import endpoint
from llmops.runs.records import JobRecord, Submission, SubmissionRecord, load_run
from llmops.runs.store import open_store
from tests.inference.server_process import LIMIT_S, make_run
from tests.launcher.harness import Launcher


def address(local: Launcher, run_id: str, attempt: str) -> str:
    """Where the run serves, once this attempt does."""
    file = Path(local.url, run_id, "endpoint.json")

    def serves() -> bool:
        return file.exists() and json.loads(file.read_text())["attempt"] == attempt

    local.wait_for(serves, LIMIT_S, "it serves", run_id)
    shown = local.ok("status", run_id)
    url = f"http://127.0.0.1:{json.loads(file.read_text())['port']}/v1"
    assert f"hamlet at {url}" in shown
    return url


def complete(url: str) -> str:
    body = json.dumps({"model": "hamlet", "prompt": "To be", "max_tokens": 5, "temperature": 0}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/completions", body), timeout=LIMIT_S) as answer:
        return str(json.loads(answer.read())["choices"][0]["text"])


def test_a_model_is_served_until_it_is_cancelled_and_again(local: Launcher, tmp_path: Path) -> None:
    trained = make_run(tmp_path / "hamlet")
    run_id = local.submit("task=serve", f"run={trained}", "step=7", "serve.name=hamlet")
    assert "hamlet-serve" in run_id
    text = complete(address(local, run_id, "0"))
    local.ok("cancel", "--graceful", run_id)
    local.wait(run_id, "cancelled")
    assert "hamlet at" not in local.ok("status", run_id)
    local.ok("resume", run_id)
    assert complete(address(local, run_id, "1")) == text
    local.ok("cancel", "--graceful", run_id)
    value = local.wait(run_id, "cancelled")
    assert [each["state"] for each in value["attempts"]] == ["cancelled", "cancelled"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["run=null"], "task=serve needs run=NAME"),
        (["run=/nowhere"], "run=/nowhere: there is no run"),
        (["step=8"], "step=8"),
        (["step=every"], "one checkpoint is served"),
        (["cluster.ranks_per_node=2"], "runs as one process"),
        (["serve.api_key_env=NO_KEY"], "secrets=[NO_KEY]"),
        (["serve.port=0"], "serve.port"),
    ],
)
def test_what_cannot_be_served_is_not_submitted(local: Launcher, tmp_path: Path, change: list[str], said: str) -> None:
    trained = make_run(tmp_path / "hamlet")
    refused = local.call("submit", "task=serve", f"run={trained}", *change)
    assert refused.returncode == 2, refused.stderr
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("backend", "job", "host", "url", "command"),
    [
        ("local", "12", "127.0.0.1", "http://127.0.0.1:9000/v1", None),
        ("slurm", "12", "127.0.0.1", "http://127.0.0.1:9000/v1", "ssh -N -L 9000:127.0.0.1:9000 node7"),
        ("slurm", "12", "0.0.0.0", "http://node7:9000/v1", None),
        ("slurm", "12", "fd00::1", "http://[fd00::1]:9000/v1", None),
        ("k8s", "prod/ml/job/x", "127.0.0.1", "http://127.0.0.1:9000/v1",
         "kubectl --context prod -n ml port-forward pod/node7 9000"),
        ("k8s", "/ml/job/x", "127.0.0.1", "http://127.0.0.1:9000/v1", "kubectl -n ml port-forward pod/node7 9000"),
    ],
)  # fmt: skip
def test_how_it_is_reached(tmp_path: Path, backend: str, job: str, host: str, url: str, command: str | None) -> None:
    store = open_store(tmp_path)
    store.put("endpoint.json", json.dumps({"host": host, "port": 9000, "node": "node7", "model": "m"}).encode())
    submission = Submission(
        SubmissionRecord(number=0, tag="tag", backend=backend, created=0.0), JobRecord(job_id=job, by="job", time=0.0)
    )
    run = replace(load_run(store), submissions=[submission])
    assert endpoint(run) == {"url": url, "model": "m", "command": command}
    assert endpoint(replace(run, store=open_store(tmp_path / "other"))) is None
