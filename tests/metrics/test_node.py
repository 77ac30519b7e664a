"""The helper of a node: what it serves, whom it tells, and that nothing of it is ever the run's matter."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmops.agent.exporter import NodeExporter, Plan, reachable
from llmops.monitor.node_exporter import ends, parse_gpus
from llmops.monitor.targets import Endpoints, live_targets, write_endpoints
from llmops.runs.store import open_store
from tests.launcher.harness import TINY, Launcher
from tests.metrics.parts import get, promtool, until

SLEEP = ("cluster.ranks_per_node=1", "code.enabled=false")


class Helper:
    """One helper process with a control directory and a rank of its own."""

    def __init__(self, tmp_path: Path, run_url: str, **changes: Any) -> None:
        self.control = tmp_path / "control"
        self.control.mkdir()
        self.rank = subprocess.Popen(["sleep", "60"], start_new_session=True)
        self.store = open_store(run_url)
        self.about = {
            "run_url": run_url,
            "attempt": 3,
            "node": 1,
            "name": "n7",
            "control": str(self.control),
            "bind": "127.0.0.1",
            "address": "127.0.0.1",
            "port": 0,
            "ranks": {"0": self.rank.pid},
            **changes,
        }
        self.exporter = NodeExporter(sys.executable, self.about)

    def endpoints(self) -> dict[str, Any]:
        path = "attempts/0003/endpoints/0001.json"
        until(lambda: self.store.exists(path), "the endpoints")
        return json.loads(self.store.get(path))

    def samples(self) -> dict[str, float]:
        text = get(f"http://{self.endpoints()['address']}/metrics")
        promtool("check", "metrics", text=text)
        lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.fixture
def helper(tmp_path):
    made: list[Helper] = []

    def make(run_url: str = f"{tmp_path}/run", **changes: Any) -> Helper:
        made.append(Helper(tmp_path, run_url, **changes))
        return made[0]

    yield make
    for each in made:
        each.exporter.close()
        each.rank.kill()
        each.rank.wait()


def test_it_serves_what_the_ranks_do(helper):
    one = helper()
    (one.control / "heartbeat.0").write_text(json.dumps({"step": 41, "phase": "train"}))
    found = one.samples()
    assert found['llmops_node_rank_step{rank="0"}'] == 41
    assert 0 <= found['llmops_node_rank_heartbeat_age_seconds{rank="0"}'] < 20
    assert found['llmops_node_rank_up{rank="0"}'] == 1
    assert found['llmops_node_rank_memory_bytes{rank="0"}'] > 100_000
    assert found['llmops_node_rank_cpu_seconds_total{rank="0"}'] >= 0
    assert (found["llmops_node_stop_requested"], found["llmops_node_attempt"]) == (0, 3)
    (one.control / "stop").write_text("{}")
    (one.control / "heartbeat.0").write_text('{"step": ')  # caught in the middle of a write
    one.rank.kill()
    one.rank.wait()
    found = one.samples()
    assert found["llmops_node_stop_requested"] == 1
    assert found['llmops_node_rank_up{rank="0"}'] == 0
    assert not {'llmops_node_rank_step{rank="0"}', 'llmops_node_rank_memory_bytes{rank="0"}'} & set(found)


def test_it_tells_of_rank_0_once_that_serves_and_of_nobody_else(helper):
    one = helper()
    assert one.endpoints()["train"] is None
    (one.control / "metrics.0").write_text('{"port": "x"}')
    (one.control / "metrics.0").write_text('{"port": 4711}')
    until(lambda: one.endpoints()["train"] == "127.0.0.1:4711", "the trainer's address")
    assert one.endpoints()["node"] == "n7"


def test_in_an_object_store_too(helper, s3_url):
    assert helper(f"{s3_url}/run").endpoints()["address"].startswith("127.0.0.1:")


def test_a_store_that_refuses_takes_nothing_from_the_node(helper, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    one = helper(f"{tmp_path}/file/run")
    told = until(lambda: capfd.readouterr().err, "the reason")
    assert "where metrics are served could not be stored" in told
    assert one.exporter.process is not None
    assert one.exporter.process.poll() is None


def test_it_is_deaf_to_signals_and_ends_with_its_supervisor(helper):
    one = helper()
    one.endpoints()
    process = one.exporter.process
    assert process is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
    assert one.samples()
    began = time.monotonic()
    one.exporter.close()
    assert process.returncode == 0
    assert time.monotonic() - began < 1


def test_one_that_dies_is_started_once_more(helper, capfd):
    one = helper()
    first = one.endpoints()["time"]
    for start in (1, 2):
        process = one.exporter.process
        assert process is not None
        assert one.exporter.starts == start
        process.kill()
        process.wait()
        one.exporter.tend()
        if start == 1:
            until(lambda: one.endpoints()["time"] > first, "the new one")
    assert one.exporter.process is None
    one.exporter.tend()
    said = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == [
        "the metrics of this node are interrupted",
        "the metrics of this node are not served",
    ]


def test_a_port_that_is_taken_is_two_lines_and_no_second_try(helper, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        one = helper(port=taken.getsockname()[1])
        until(lambda: one.exporter.tend() or one.exporter.process is None, "it to give up")
    assert one.exporter.starts == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("llmops: no metrics are served at 127.0.0.1:")
    assert second == "llmops: the metrics of this node are not served: their process returned 2"


def test_an_interpreter_without_llmops_costs_the_run_nothing(tmp_path):
    """As in an image that has the user's program alone."""
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\n[ "$2" = llmops.monitor.node_exporter ] && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    launcher = Launcher(tmp_path / "runs", "local")
    run_id = launcher.submit(*SLEEP, f"cluster.python={python}", command=("sleep", "3"))
    launcher.wait(run_id, "finished")
    log = (tmp_path / "runs" / run_id / "job" / "0000" / "supervisor.log").read_text()
    assert log.count("the metrics of this node are interrupted: their process returned 1") == 1
    assert log.count("the metrics of this node are not served: their process returned 1") == 1


def test_it_is_not_started_by_hand():
    done = subprocess.run(
        [sys.executable, "-m", "llmops.monitor.node_exporter"], input="", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_earlier_ends_are_counted_by_reason(make_run):
    run = make_run()
    for number, reason in enumerate(["preempted", "failed", "preempted"]):
        run.start(number)
        run.end(number, reason, "requeue")
    run.start(3)  # its supervisor died
    run.start(4)
    assert ends(run.store, 4) == {"preempted": 2, "failed": 1, "lost": 1}


def test_gpus_that_tell_nothing_are_left_out():
    found = parse_gpus("0, 1024, 81559, 87\n1, [N/A], 81559, 0\n\nNo devices were found\n2, 0, 4, 0\n")
    assert found == [("0", 2.0**30, 81559 * 2.0**20, 0.87), ("2", 0.0, 4 * 2.0**20, 0.0)]


def spec(**metrics: Any) -> dict[str, Any]:
    backend, options = metrics.pop("backend", "local"), metrics.pop("options", {})
    return {"metrics": {"enabled": True, **metrics}, "backend": backend, "options": options}


def test_where_a_node_serves(monkeypatch):
    plan = Plan(spec(), "10.0.0.7")
    assert (plan.bind, plan.address, plan.port) == ("10.0.0.7", "10.0.0.7", 0)
    assert plan.rank_environment(0) == {"LLMOPS_METRICS_BIND": "10.0.0.7:0"}
    assert plan.rank_environment(1) == {}
    plan = Plan(spec(host="0.0.0.0", port=9000, pushgateway="http://gw"), "fd00::7")
    assert (plan.bind, plan.address) == ("0.0.0.0", "fd00::7")
    told = {"LLMOPS_METRICS_BIND": "0.0.0.0:9001", "LLMOPS_METRICS_PUSHGATEWAY": "http://gw"}
    assert plan.rank_environment(0) == told
    assert Plan(spec(host="::1"), "10.0.0.7").rank_environment(0) == {"LLMOPS_METRICS_BIND": "[::1]:0"}
    pod = spec(backend="k8s", options={"metrics_port": 9400})
    assert Plan(pod, "10.0.0.7").rank_environment(0) == {"LLMOPS_METRICS_BIND": "10.0.0.7:9401"}
    for off in (spec(enabled=False), {"backend": "local", "options": {}}):
        assert not Plan(off, "10.0.0.7").enabled
        assert Plan(off, "10.0.0.7").rank_environment(0) == {}


def test_a_slurm_job_of_one_node_serves_where_others_reach_it(monkeypatch):
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.5")
    assert Plan(spec(backend="slurm"), "127.0.0.1").bind == "127.0.0.5"
    assert Plan(spec(), "127.0.0.1").bind == "127.0.0.1"
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "192.0.2.1")  # of no machine: for examples
    assert reachable("127.0.0.1") == "127.0.0.1"
    monkeypatch.delenv("SLURM_LAUNCH_NODE_IPADDR")
    assert reachable("127.0.0.1") == "127.0.0.1"
    assert reachable("10.0.0.7") == "10.0.0.7"


def test_discovery_reads_what_is_whole_of_attempts_that_run(make_run):
    run = make_run()
    run.submission(0)
    run.start(0)
    whole = Endpoints(node="n1", address="10.0.0.1:1", train="10.0.0.1:2", time=1.0)
    write_endpoints(run.store, 0, 0, whole)
    write_endpoints(run.store, 0, 1, Endpoints(node="n2", address="10.0.0.2:1", time=1.0))
    run.store.put("attempts/0000/endpoints/0002.json", b"{")
    run_id = run.load().id
    one = {"id": run_id, "name": "tiny", "state": "running", "attempts": [{"number": 0, "state": "running"}]}
    store = open_store(make_run.runs_url)
    found = [target.to_json() for target in live_targets(store, [one])]
    labels = {"run": "tiny", "run_id": run_id, "attempt": "0"}
    assert found == [
        {"targets": ["10.0.0.1:1"], "labels": {**labels, "node": "n1", "job_kind": "node"}},
        {"targets": ["10.0.0.1:2"], "labels": {**labels, "node": "n1", "job_kind": "train"}},
        {"targets": ["10.0.0.2:1"], "labels": {**labels, "node": "n2", "job_kind": "node"}},
    ]
    for gone in ({"state": "preempted"}, {"attempts": []}, {"attempts": [{"number": 0, "state": "preempted"}]}):
        assert live_targets(store, [{**one, **gone}]) == []


def test_nothing_is_served_where_it_is_switched_off(tmp_path):
    launcher = Launcher(tmp_path / "runs", "local")
    run_id = launcher.submit(*TINY, "cluster.ranks_per_node=1", "train.max_steps=100000", "metrics.enabled=false")
    try:
        launcher.wait_step(run_id, 2)
        (pid,) = launcher.ranks(run_id).values()
        env = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"LLMOPS_METRICS_BIND" not in env
        (agent,) = launcher.agents(run_id)
        helpers = [each for each in Path("/proc").glob("[0-9]*") if _is_helper(each, agent)]
        assert helpers == []
        assert not (tmp_path / "runs" / run_id / "attempts" / "0000" / "endpoints").exists()
    finally:
        launcher.ok("cancel", run_id)


def _is_helper(process: Path, parent: int) -> bool:
    try:
        fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[1]) == parent and b"node_exporter" in (process / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("metrics.pushgateway=gateway:9091", "metrics.pushgateway=gateway:9091: not a URL"),
        ("metrics.port=65535", "metrics.port=65535: the next one is the trainer's"),
        ("metrics.port=70000", "metrics.port"),
        ("metrics.host=''", "metrics.host"),
    ],
)
def test_what_cannot_work_is_refused(value, told, tmp_path):
    done = Launcher(tmp_path / "runs", "local").call("render", "recipe=tiny", value)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_pods_have_ports_unless_they_share_their_nodes_network(tmp_path):
    launcher = Launcher("s3://bucket/runs", "k8s")

    def rendered(*values: str) -> str:
        common = ("cluster.workload=job", "cluster.image=lab/train:1.0", "cluster.namespace=a")
        return launcher.ok("render", "--backend", "k8s", "recipe=tiny", *common, *values)

    text = rendered()
    assert "name: metrics-train" in text
    assert "containerPort: 9400" in text
    assert 'prometheus.io/port: "9400"' in text
    assert "containerPort: 9601" in rendered("metrics.port=9600", "cluster.host_network=true")
    for none in ("metrics.enabled=false", "cluster.host_network=true"):
        text = rendered(none)
        assert "prometheus.io" not in text
        assert "containerPort" not in text
