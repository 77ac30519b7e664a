"""What rank 0 serves and pushes, and what it does when it cannot."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from llm.train.control import Control
from llm.train.exporter import BIND, PUSHGATEWAY, Exporter
from llm.train.throughput import Throughput, flops_per_token, gpu_memory
from llm.utils.config import ModelConfig, TrainConfig
from llm.utils.metrics_server import Server, join_bind, parse_bind
from tests.launcher.harness import TINY, Launcher
from tests.metrics.parts import get, promtool, pushgateway, until

CPU = torch.device("cpu")


def told(exporter: Exporter) -> dict[str, float]:
    """All samples, by name and labels."""
    found = {}
    for family in exporter.collect():
        for sample in family.samples:
            found[sample.name + "".join(f" {value}" for value in sample.labels.values())] = sample.value
    return found


def step(exporter: Exporter, seconds: float = 0.25, **changes) -> None:
    values = {"step": 7, "loss": 2.5, "norm": 1.0, "lr": 1e-3, "tokens": 1000, "data_s": 0.05, "mfu": 0.4, **changes}
    exporter.stepped(seconds=seconds, **values)


@pytest.fixture
def exporter(tmp_path, monkeypatch):
    monkeypatch.delenv(BIND, raising=False)
    monkeypatch.delenv(PUSHGATEWAY, raising=False)
    return Exporter(Control(0, str(tmp_path)))


def test_numbers_are_those_that_the_loop_tells(exporter):
    assert not {"llmops_train_loss", "llmops_train_mfu_ratio"} & set(told(exporter))  # not known, so not there
    step(exporter)
    step(exporter, seconds=4.0, step=8, mfu=0.1)
    exporter.evaluated(2.25)
    exporter.committed(1.5, 4096)
    exporter.failed()
    exporter.stalled(0.75)
    exporter.stalled(1.25)
    found = told(exporter)
    expected = {
        "step": 8, "loss": 2.5, "tokens_total": 2000, "tokens_per_second": 250, "mfu_ratio": 0.1, "eval_loss": 2.25,
        "data_wait_seconds_total": 0.1, "grad_norm": 1, "learning_rate": 1e-3, "checkpoint_bytes_total": 4096,
        "checkpoint_failures_total": 1, "checkpoint_stall_seconds_total": 1.25, "checkpoint_seconds_sum": 1.5,
        "step_seconds_count": 2, "step_seconds_sum": 4.25, "step_seconds_bucket 0.2": 0, "step_seconds_bucket 0.3": 1,
        "step_seconds_bucket 3.0": 1, "step_seconds_bucket 5.0": 2, "step_seconds_bucket +Inf": 2,
    }  # fmt: skip
    assert {name: found[f"llmops_train_{name}"] for name in expected} == pytest.approx(expected)
    assert abs(found["llmops_train_checkpoint_last_commit_timestamp_seconds"] - time.time()) < 5


def test_memory_of_a_gpu_is_asked_for_when_somebody_scrapes(tmp_path):
    asked = []

    def memory():
        asked.append(1)
        return {"allocated": 1, "reserved": 3, "peak": 2}

    exporter = Exporter(Control(0, str(tmp_path)), memory)
    step(exporter)
    assert not asked
    assert told(exporter)["llmops_train_gpu_memory_bytes peak"] == 2
    assert gpu_memory(CPU) is None


def test_it_serves_where_the_environment_says_and_tells_the_supervisor(exporter, tmp_path, monkeypatch):
    monkeypatch.setenv(BIND, "127.0.0.1:0")
    exporter.start()
    until((tmp_path / "metrics.0").exists, "the port")
    port = json.loads((tmp_path / "metrics.0").read_text())["port"]
    step(exporter)
    text = get(f"http://127.0.0.1:{port}/metrics")
    assert b"llmops_train_loss 2.5" in text
    promtool("check", "metrics", text=text)


@pytest.mark.parametrize("bind", ["taken", "nonsense", "256.1.1.1:0"])
def test_a_port_that_cannot_be_opened_is_a_warning(exporter, tmp_path, monkeypatch, capfd, bind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv(BIND, f"127.0.0.1:{taken.getsockname()[1]}" if bind == "taken" else bind)
        before = set(threading.enumerate())
        exporter.start()
        for thread in (
            set(threading.enumerate()) - before
        ):  # what is captured is read once: it may lose what comes meanwhile
            thread.join(60)
        said = capfd.readouterr().err
    assert said.startswith("warning: no metrics are served at LLMOPS_METRICS_BIND=")
    assert said.count("\n") == 1
    step(exporter)
    assert not (tmp_path / "metrics.0").exists()


def test_without_the_environment_nothing_is_imported():
    script = (
        "import sys; from llm.train.exporter import Exporter; from llm.train.control import Control\n"
        "each = Exporter(Control(0)); each.start(); each.stepped(1, 1.0, 1.0, 1.0, 1, 1.0, 0.0, None); each.close()\n"
        "print([name for name in sys.modules if name.startswith(('prometheus_client', 'http.server'))])"
    )
    env = {name: value for name, value in os.environ.items() if name not in (BIND, PUSHGATEWAY)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_step_costs_microseconds(exporter):
    began = time.perf_counter()
    for _ in range(10_000):
        step(exporter)
    assert (time.perf_counter() - began) / 10_000 < 100e-6  # a few on an idle machine


def test_the_addresses_of_servers():
    for text, pair in (("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:9401", ("::1", 9401)), ("node7:1", ("node7", 1))):
        assert parse_bind(text) == pair
        assert join_bind(*pair) == text
    for wrong in ("9400", ":9400", "a:b", "a:70000", ""):
        with pytest.raises(ValueError, match="ADDRESS:PORT"):
            parse_bind(wrong)


def test_a_server_answers_on_ipv6_and_says_what_there_is():
    server = Server("::1", 0, {"/metrics": ("text/plain", lambda: b"x 1\n")})
    try:
        assert get(f"http://[::1]:{server.server_port}/metrics?a=b") == b"x 1\n"
        with pytest.raises(OSError, match="404"):
            get(f"http://[::1]:{server.server_port}/other")
    finally:
        server.close()
    with pytest.raises(OSError):
        get(f"http://[::1]:{server.server_port}/metrics")


def model(**changes) -> ModelConfig:
    shape = {"name": "m", "vocab_size": 1000, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128}
    return ModelConfig(**{**shape, "max_seq_len": 32, **changes})


def train(**changes) -> TrainConfig:
    sizes = {"max_steps": 1, "seq_len": 32, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1.0}
    return TrainConfig(**{**sizes, **changes})


def test_flops_are_those_of_the_weights_that_are_multiplied_and_of_attention():
    from llm.model.transformer import Transformer

    for tied in (False, True):
        config = model(tie_embeddings=tied)
        weights = sum(each.numel() for each in Transformer(config).parameters())
        multiplied = weights - (0 if tied else 1000 * 64)
        assert flops_per_token(config, 32) == 6 * multiplied + 12 * 2 * 64 * 32


def test_flops_agree_with_what_torch_counts():
    """Forward and backward are three times the forward's matrix products, which torch counts itself."""
    from torch.utils.flop_counter import FlopCounterMode

    from llm.model.transformer import Transformer

    config = model(n_kv_heads=4)
    rows = torch.zeros((3, 32), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        Transformer(config)(rows).sum().backward()
    ours = flops_per_token(config, 32) * rows.numel()
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.15)  # norms; attention is counted in different ways


def test_mfu_is_a_share_of_all_devices(monkeypatch):
    flops = flops_per_token(model(), 32)
    assert Throughput(model(), train(peak_tflops=0.001), 4, CPU).mfu(1000) == pytest.approx(flops * 1000 / 4e9)
    assert Throughput(model(), train(), 4, CPU).mfu(1000) is None
    gpu = torch.device("cuda", 0)
    for name, dtype, peak in (
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA L40", "bfloat16", 181e12),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("Something New", "bfloat16", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = Throughput(model(), train(dtype=dtype), 1, gpu).mfu(1e6)
        assert found == (None if peak is None else pytest.approx(flops * 1e6 / peak))


def test_a_short_job_pushes_what_it_has_done(tmp_path):
    with pushgateway(tmp_path) as url:
        launcher = Launcher(tmp_path / "runs", "local")
        run_id = launcher.submit(
            *TINY,
            "cluster.ranks_per_node=1",
            "train.max_steps=12",
            "train.warmup_steps=1",
            f"metrics.pushgateway={url}",
        )
        launcher.wait(run_id, "finished")
        text = get(f"{url}/metrics").decode()
    (line,) = [each for each in text.splitlines() if each.startswith("llmops_train_step{")]
    for label in (f'run_id="{run_id}"', 'job="llmops"', 'kind="train"'):
        assert label in line
    assert float(line.split()[-1]) == 12
    assert "llmops_train_checkpoint_seconds_count" in text


def test_a_gateway_that_never_answers_holds_up_the_end_for_seconds_only(exporter, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        monkeypatch.setenv(PUSHGATEWAY, f"http://127.0.0.1:{silent.getsockname()[1]}")
        exporter.start()
        began = time.monotonic()
        exporter.close()
        assert time.monotonic() - began < 6
    assert "cannot be pushed" in until(lambda: capfd.readouterr().err, "a warning")
