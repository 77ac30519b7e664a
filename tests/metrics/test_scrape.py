"""A real run, scraped by a real Prometheus that learns of it from ``llmops metrics``; the dashboard's queries on it."""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.launcher.harness import Launcher
from tests.metrics.parts import TREE, get, llmops_metrics, prometheus, promtool, until

DASHBOARD = json.loads((TREE / "docker" / "grafana" / "dashboards" / "runs.json").read_text())
# One GPU, as nvidia-smi tells of it: the machine may have none.
NVIDIA_SMI = "#!/bin/sh\necho '0, 1024, 81559, 87'\necho '1, [N/A], [N/A], [N/A]'\n"
LONG = (
    *("recipe=tiny", "cluster.ranks_per_node=1", "train.max_steps=100000", "train.peak_tflops=0.1"),
    *("train.global_batch_size=4", "train.micro_batch_size=4", "eval.every_steps=20", "eval.batches=1"),
    *("eval.sample_prompts=[]", "checkpoint.every_steps=20"),
)
CONFIG = """
global: {{scrape_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: llmops
    static_configs: [{{targets: ["{address}"]}}]
  - job_name: llmops-jobs
    http_sd_configs: [{{url: "http://{address}/sd", refresh_interval: 1s}}]
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The run, its Prometheus and the URL of ``llmops metrics``."""
    folder = tmp_path_factory.mktemp("metrics")
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    launcher = Launcher(folder / "runs", "local")
    launcher.env["PATH"] = f"{tool.parent}:{launcher.env['PATH']}"
    run_id = launcher.submit(*LONG, "--name", "scraped")
    try:
        with llmops_metrics(launcher.env) as url:
            rules = TREE / "docker" / "prometheus" / "alerts.yml"
            config = CONFIG.format(address=url.removeprefix("http://"), rules=rules)
            with prometheus(folder, config) as server:
                yield launcher, run_id, server, url
    finally:
        launcher.ok("cancel", run_id)


def test_series_of_the_run_its_node_and_its_trainer_arrive_with_their_labels(scene):
    _, run_id, server, _ = scene
    ids = {"run": "scraped", "run_id": run_id, "attempt": "0"}
    (train,) = until(lambda: server.query("llmops_train_step > 20"), "steps of the trainer")
    assert {**ids, "job_kind": "train", "job": "llmops-jobs"}.items() <= train["metric"].items()
    (up,) = until(lambda: server.query('llmops_node_rank_up{rank="0"} == 1'), "the node")
    assert {**ids, "job_kind": "node", "node": train["metric"]["node"]}.items() <= up["metric"].items()
    (state,) = until(lambda: server.query('llmops_run_state{state="running"} == 1'), "the run's state")
    assert state["metric"]["run_id"] == run_id
    until(lambda: server.query("llmops_train_checkpoint_seconds_count > 1"), "checkpoints")
    (mfu,) = server.query("llmops_train_mfu_ratio")
    assert 0 < float(mfu["value"][1]) < 2
    for each in server.targets():
        assert each["health"] == "up", each
        promtool("check", "metrics", text=get(each["scrapeUrl"]))


def test_every_panel_of_the_dashboard_has_data(scene):
    _, _, server, _ = scene
    missing = set(queries())

    def answered() -> bool:
        missing.difference_update([each for each in missing if server.query(each)])
        return not missing

    deadline = time.monotonic() + 40
    while not answered() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not missing


def queries() -> list[str]:
    """What the panels ask, for all runs. Only a trainer on a GPU knows of that one's memory."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert len(found) > 20
    filled = [each.replace("$run", ".*").replace("$__rate_interval", "10s") for each in found]
    assert not [each for each in filled if "$" in each]
    return [each for each in filled if "llmops_train_gpu_memory_bytes" not in each]


def test_what_a_screen_shows_is_what_prometheus_has(scene):
    launcher, run_id, server, _ = scene
    (info,) = until(lambda: server.query("llmops_run_info"), "the run's labels")
    (queue,) = until(lambda: server.query('llmops_queue_jobs{state="running"} == 1'), "the queue")
    assert queue["metric"]["backend"] == "local"
    status = launcher.status(run_id)
    assert {key: info["metric"][key] for key in ("owner", "backend", "run")} == {
        "owner": status["owner"],
        "backend": "local",
        "run": "scraped",
    }
    (gpu,) = until(lambda: server.query("llmops_node_gpu_utilization_ratio"), "the GPU")
    assert (gpu["metric"]["gpu"], gpu["value"][1]) == ("0", "0.87")


def test_the_alerts_are_loaded_and_none_fires(scene):
    _, _, server, _ = scene
    groups = json.loads(get(f"{server.url}/api/v1/rules"))["data"]["groups"]
    names = {rule["name"] for group in groups for rule in group["rules"]}
    assert names == set(re.findall(r"alert: (\w+)", (TREE / "docker" / "prometheus" / "alerts.yml").read_text()))
    assert not server.query('ALERTS{alertstate="firing"}')


def test_targets_go_with_the_run(tmp_path):
    other = Launcher(tmp_path / "runs", "local")
    run_id = other.submit(*LONG, "--name", "short")
    with llmops_metrics(other.env) as url:
        until(lambda: len(json.loads(get(f"{url}/sd"))) == 2, "the run's targets")
        other.ok("cancel", run_id)
        until(lambda: json.loads(get(f"{url}/sd")) == [], "them to go")
        text = get(f"{url}/metrics").decode()
        assert f'llmops_run_state{{run_id="{run_id}",state="cancelled"}} 1.0' in text
    until(lambda: other.alive(run_id) == [], "the job's processes to end")
