"""A run in pods: whatever ends one of them, the ranks go on together, within bounds, and controllers hear the truth."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmops.config.compose import load_config
from llmops.runs.lineage import merged_metrics
from llmops.runs.model import RunRecord, SubmissionRecord
from llmops.runs.records import create_run, load_run, write_submission
from llmops.runs.store import Store
from tests.agent.pods import Pods, retry
from tests.launcher.harness import TINY

WORKLOADS = ("job", "jobset", "pytorchjob")
STOPPED = {"job": 75, "jobset": 75, "pytorchjob": 143}
GIVEN_UP = {"job": 77, "jobset": 77, "pytorchjob": 1}


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Callable[..., Pods]]:
    """Makes workloads that are gone after the test."""
    made: list[Pods] = []

    def make(workload: str, **options: Any) -> Pods:
        made.append(Pods(tmp_path, workload, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
        each_alive = each.ranks_alive()
        assert not each_alive, f"ranks outlive their pods: {each_alive}"


@pytest.mark.parametrize("workload", WORKLOADS)
def test_all_pods_finish_and_node_0_lets_them_go_first(pods: Callable[..., Pods], workload: str) -> None:
    made = pods(workload, nodes=3).start()
    made.until_running(0)
    made.tell("finish")
    made.until_over()
    assert made.state == "succeeded"
    # A PyTorchJob is over, and its workers are signalled, when its master is: by then they have said goodbye.
    assert sorted(made.codes) == [(0, 0), (1, 0), (2, 0)]
    assert "did not leave" not in made.logs()
    assert made.reasons() == ["finished"]
    made.start(1)  # a JobSet may restart what has finished
    made.pods[1].wait(30)
    assert made.pods[1].returncode == 0


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("node", [0, 1])
def test_a_pod_that_is_deleted_stops_all_and_all_go_on(pods: Callable[..., Pods], workload: str, node: int) -> None:
    made = pods(workload).start()
    made.until_running(0)
    made.delete(node)
    made.until_running(1)
    assert (node, STOPPED[workload]) in made.codes
    assert {code for _, code in made.codes} == {STOPPED[workload]}
    made.tell("finish")
    made.until_over()
    assert made.state == "succeeded"
    assert made.reasons() == ["preempted", "finished"]
    assert made.rundir.get("attempts/0000/end.json")["saved"]


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("node", [0, 1])
def test_a_pod_that_is_killed_is_replaced(pods: Callable[..., Pods], workload: str, node: int) -> None:
    made = pods(workload).start()
    made.until_running(0)
    before = (made.root / "started-0-0").read_text()
    made.delete(node, signal.SIGKILL)
    made.until_running(1)
    assert (made.root / "started-1-0").read_text() != before  # never the same rendezvous
    made.tell("finish")
    made.until_over()
    assert made.state == "succeeded"
    reasons = {"node_failure", "preempted"} if node else {"?"}  # a JobSet stops node 0 in the same moment
    assert made.reasons()[0] in reasons
    assert made.reasons()[1:] == ["finished"]


@pytest.mark.parametrize(("workload", "node"), [pytest.param("job", 0, marks=pytest.mark.long), ("pytorchjob", 1)])
def test_training_goes_on_bit_by_bit(tmp_path: Path, undisturbed: dict[int, float], workload: str, node: int) -> None:
    config = load_config(TINY)
    record = RunRecord(
        id="x", name="x", owner="me", host="here", created=0, backend="k8s", kind="llm", command=[], nodes=2,
        ranks_per_node=1,
    )  # fmt: skip
    run = create_run(str(tmp_path), record, config.yaml_text.encode())
    write_submission(run, SubmissionRecord(number=0, tag="x.0.0", backend="k8s", created=0))
    command = [sys.executable, "-m", "llm.train", "--config", f"{run.url}/config.yaml"]
    made = Pods(Path(run.url), workload, command=command, kind="llm")
    try:
        made.start()
        made.until(lambda: any(step >= 12 for step in steps(run)), "step 12")
        made.delete(node)
        made.until_over()
    finally:
        made.close()
    assert made.state == "succeeded"
    assert made.reasons() == ["preempted", "finished"]
    assert {step["step"]: step["loss"] for step in merged_metrics(load_run(run))} == undisturbed


def steps(run: Store) -> list[int]:
    """Steps of attempt 0 so far."""
    parts = sorted(Path(run.url).glob("metrics/0000/*.jsonl"))
    lines = [json.loads(line) for part in parts for line in part.read_text().splitlines() if line.endswith("}")]
    return [line["step"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_bug_is_tried_again_in_the_same_pods_and_then_given_up(pods: Callable[..., Pods], workload: str) -> None:
    made = pods(workload, retry=retry(max_no_progress=2))
    made.tell("fail-0-1")
    made.tell("fail-1-0")
    made.start().until_over()
    assert made.state == "failed"
    assert sorted(made.codes) == [(0, GIVEN_UP[workload]), (1, GIVEN_UP[workload])]
    assert made.reasons() == ["failed", "failed"]
    assert "told to fail" in made.rundir.get("attempts/0001/end.json")["error"]


def test_pods_that_always_die_are_given_up(pods: Callable[..., Pods]) -> None:
    """Too little memory takes the supervisor too, and a PyTorchJob would make new pods for ever."""
    made = pods("pytorchjob", retry=retry(max_no_progress=2)).start()
    for attempt in (0, 1):
        made.until_running(attempt)
        made.delete(0, signal.SIGKILL)
        made.until(lambda before=attempt: len(made.codes) > before, "the end of the pod")
    made.until_over()
    assert made.state == "failed"
    assert made.reasons() == ["?", "?"]


def test_all_pods_at_once(pods: Callable[..., Pods]) -> None:
    """An eviction of the whole workload, as a queue does it."""
    made = pods("jobset", nodes=3).start()
    made.until_running(0)
    for node in range(3):
        made.delete(node)
    made.until_running(1)
    assert [code for _, code in made.codes] == [75] * 3
    made.tell("finish")
    made.until_over()
    assert made.reasons() == ["preempted", "finished"]


@pytest.mark.parametrize("graceful", [True, False])
def test_a_cancelled_run_never_comes_back(pods: Callable[..., Pods], graceful: bool) -> None:
    made = pods("job").start()
    made.until_running(0)
    made.rundir.create("job/0000/intent.json", {"intent": "end", "graceful": graceful})
    made.until_over()
    assert made.state == "failed"
    assert {code for _, code in made.codes} == {77}
    assert made.reasons() == ["cancelled"]
    assert made.rundir.get("attempts/0000/end.json")["saved"] is graceful
    made.start(0)  # by a controller that does not know it yet
    assert made.pods[0].wait(30) == 77


def test_a_superseded_pod_of_node_0_lets_go(pods: Callable[..., Pods]) -> None:
    """A node that was lost and comes back: its pods are of another life."""
    made = pods("job").start()
    made.until_running(0)
    old = dict(made.pods)
    for pod in old.values():
        pod.send_signal(signal.SIGSTOP)
    made.start().until_running(1)
    new = dict(made.pods)
    for pod in old.values():
        pod.send_signal(signal.SIGCONT)
    made.tell("finish")
    made.until_over()
    assert made.state == "succeeded"
    made.pods = old
    made.state = "running"
    made.until(lambda: all(pod.poll() is not None for pod in old.values()), "the old pods to leave")
    assert not set(old.values()) & set(new.values())
    assert made.reasons()[-1] == "finished"


def test_a_pod_that_comes_late_is_waited_for_and_named(pods: Callable[..., Pods]) -> None:
    made = pods("job", nodes=3).start(0, 2)
    made.until(lambda: "waiting for the pods of nodes [1" in made.logs(), "a line that names node 1")
    assert made.rundir.list("attempts") == []
    made.delete(0)
    made.until(lambda: (0, 75) in made.codes, "the deleted pod to leave at once")
    made.start(1)
    made.tell("finish")
    made.until_over()
    assert made.state == "succeeded"
    assert made.reasons() == ["finished"]


def test_what_is_missing_is_said(pods: Callable[..., Pods], monkeypatch: pytest.MonkeyPatch) -> None:
    made = pods("job")
    (made.root / "job/0000/spec.json").write_text("{")
    made.start(0)
    made.until(lambda: made.codes, "the pod to leave")
    assert made.codes == [(0, 1)] or made.codes == [(0, 77)]
    assert "is not JSON" in made.logs()
