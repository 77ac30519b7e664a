"""What cannot be saved to is found out before any training: one line that says what and where, exit code 1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.checkpoint.proxy import Faults, proxy
from tests.checkpoint.ranks import DEADLINE_S, Nursery, fill
from tests.conftest import BUCKET
from tests.llm.harness import tiny

PATIENCE_S = 3.0


def complaint(nursery: Nursery, folder: Path, url: str, environment: dict[str, str] | None = None) -> str:
    """Train at ``url`` with two ranks; the one line that they end with."""
    folder.mkdir(exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tiny(dist__timeout_s=20)))
    ranks = nursery.train(folder / "ranks", ["--config", str(config), "--run-url", url], PATIENCE_S, environment)
    ranks.wait_gone()
    assert [(ranks.folder / f"code{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    outputs = [(ranks.folder / f"output{rank}.txt").read_text() for rank in (0, 1)]
    for output in outputs:
        assert "Traceback" not in output
        assert " loss " not in output
    lines = {line for output in outputs for line in output.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1
    return lines.pop()


def test_wrong_secret_as_people_see_it(tmp_path: Path, s3_url: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny(dist__dp_shard=1)))
    done = subprocess.run(
        [sys.executable, "-m", "llm.train", "--config", str(config), "--run-url", s3_url],
        env={**os.environ, "AWS_SECRET_ACCESS_KEY": "wrong"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot read {s3_url}: ")
    assert "signature" in line


def test_unknown_key(nursery: Nursery, tmp_path: Path, s3_url: str) -> None:
    line = complaint(nursery, tmp_path / "x", s3_url, {"AWS_ACCESS_KEY_ID": "nobody"})
    assert s3_url in line


def test_missing_bucket(nursery: Nursery, tmp_path: Path, s3_url: str) -> None:
    line = complaint(nursery, tmp_path / "x", s3_url.replace(BUCKET, "never-made"))
    assert "s3://never-made/" in line


def test_unreachable(nursery: Nursery, tmp_path: Path, s3_url: str, dead_port: int) -> None:
    line = complaint(nursery, tmp_path / "x", s3_url, {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{dead_port}"})
    assert s3_url in line
    assert str(dead_port) in line


def test_black_hole(nursery: Nursery, tmp_path: Path, s3_url: str, s3_server: str) -> None:
    with proxy(s3_server) as network:
        network.faults = Faults(ignore=True)
        line = complaint(nursery, tmp_path / "x", s3_url, {"AWS_ENDPOINT_URL": network.url})
    assert s3_url in line


def test_full_disk(nursery: Nursery, tmp_path: Path, small_disk: Path) -> None:
    fill(small_disk / "ballast")
    line = complaint(nursery, tmp_path / "x", str(small_disk / "run"))
    assert "No space left on device" in line
    assert f"{small_disk}/run" in line


def test_too_small_a_disk(nursery: Nursery, tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(7_500_000))
    line = complaint(nursery, tmp_path / "x", str(small_disk / "run"))
    assert re.search(
        rf"cannot be saved in {small_disk}/run: one needs 1\.\d MB, and 0\.\d MB are free: make room", line
    )
