"""What the one Job of a study says, and which studies are refused before there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmops.backends.k8s import K8sBackend, manifests
from llmops.errors import UserError
from llmops.job import Array
from tests.k8s.manifests.build import WORKLOADS, cluster, objects, pods, spec
from tests.k8s.manifests.schemas import problems

SHIPPED = Path(__file__).parents[3] / "templates"


def study(workload: str = "array", trials: int = 6, parallel: int | None = None, **values: Any) -> dict[str, Any]:
    """The objects of a study by kind, valid ones."""
    of = cluster(**values)
    array = Array([[0, trials - 1]], trials, parallel)
    text = manifests.render(of, spec(workload, of, array=array), None)
    found = {item["kind"]: item for item in manifests.load(text)}
    assert [problem for item in found.values() for problem in problems(item)] == []
    return found


def variables(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["spec"]["containers"]
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


def test_each_index_is_retried_and_given_up_alone() -> None:
    found = study(trials=1000, parallel=8, cpus="2", secret_env={"HF_TOKEN": {"secret": "hf", "key": "token"}})
    job = found["Job"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 1000, 8)
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [77]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75, 143]}},
    ]
    # The run counts 20 failures itself; a pod that never starts must not hold up its study for days.
    assert job["backoffLimitPerIndex"] == 30
    assert "maxFailedIndexes" not in job
    assert "backoffLimit" not in job
    assert set(found) == {"ConfigMap", "Job"}
    assert found["Job"]["metadata"]["labels"]["llmops.trials"] == "1000"
    (pod,) = pods(found)
    (same,) = pods(objects("job", cpus="2"))
    shared = ("restartPolicy", "terminationGracePeriodSeconds", "securityContext", "volumes")
    assert {key: pod["spec"][key] for key in shared} == {key: same["spec"][key] for key in shared}
    assert pod["spec"]["containers"][0]["resources"] == same["spec"]["containers"][0]["resources"]
    assert variables(pod)["HF_TOKEN"] == {"secretKeyRef": {"name": "hf", "key": "token"}}


def test_a_pod_is_node_0_of_the_trial_that_its_index_says() -> None:
    (pod,) = pods(study())
    env = variables(pod)
    assert (env["LLMOPS_FIRST_NODE"], env["LLMOPS_REPLICA"]) == ("0", "0")
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["LLMOPS_ELEMENT"] == {"fieldRef": {"fieldPath": index}}
    command = pod["spec"]["containers"][0]["command"]
    assert command[2:] == ["k8s", "--study", "s3://bucket/runs/train-20260101-abcd", "--submission", "0"]


def test_all_trials_run_at_once_unless_told_and_never_more_than_there_are() -> None:
    assert study(trials=6)["Job"]["spec"]["parallelism"] == 6
    assert study(trials=6, parallel=50)["Job"]["spec"]["parallelism"] == 6


def test_a_queue_admits_as_many_trials_as_its_quota_has_room_for() -> None:
    job = study(parallel=4, queue="team-a", annotations={"note": "x"})["Job"]
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert job["metadata"]["annotations"] == {"kueue.x-k8s.io/job-min-parallelism": "1", "note": "x"}
    # Kueue takes a minimum below the parallelism only.
    assert "annotations" not in study(parallel=1, queue="team-a")["Job"]["metadata"]
    assert "annotations" not in study()["Job"]["metadata"]
    own = study(queue="q", annotations={"kueue.x-k8s.io/job-min-parallelism": "3"})["Job"]["metadata"]
    assert own["annotations"] == {"kueue.x-k8s.io/job-min-parallelism": "3"}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_trial_of_several_pods_is_a_workload_as_a_run_is(workload: str) -> None:
    found = study(workload, trials=1, nodes=2, queue="team-a")
    for pod in pods(found):
        assert variables(pod)["LLMOPS_ELEMENT"] == "0"
        assert "--study" in pod["spec"]["containers"][0]["command"]
    assert "llmops.trials" not in found[list(found)[-1]]["metadata"]["labels"]


@pytest.mark.parametrize(
    ("values", "parallel", "words"),
    [
        ({"nodes": 2}, None, "trials of 2 pods each need a Kueue queue"),
        ({"nodes": 2, "queue": "q"}, 4, "sweep.max_parallel=4: trials of 2 pods run as the quota of cluster.queue=q"),
        ({"workload": "jobset"}, None, "cluster.workload=jobset: a study of one-pod trials is one Indexed Job"),
        ({"active_deadline_s": 60}, None, "it would end all trials of the study together"),
    ],
)
def test_what_no_study_can_be_is_said_in_one_line(values: dict[str, Any], parallel: int | None, words: str) -> None:
    with pytest.raises(UserError) as caught:
        K8sBackend().array_limits(cluster(**values), parallel)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_submission_holds_what_the_api_takes_or_one_trial_of_several_pods() -> None:
    assert K8sBackend().array_limits(cluster(), 8).elements == 100_000
    assert K8sBackend().array_limits(cluster(workload="job"), None).elements == 100_000
    assert K8sBackend().array_limits(cluster(nodes=2, queue="q"), None).elements == 1


def test_a_template_that_is_not_for_studies_is_refused(tmp_path: Path) -> None:
    """The Job of a run would start the first trial alone, and nobody would miss the others."""
    with pytest.raises(UserError, match=r"job\.yaml\.j2: the Job of a study must be Indexed with completions: 6"):
        study(template=str(SHIPPED / "job.yaml.j2"))
    one = tmp_path / "own.yaml.j2"
    one.write_text((SHIPPED / "array.yaml.j2").read_text().replace("backoffLimitPerIndex:", "maxFailedIndexes: 0 #"))
    with pytest.raises(UserError, match=r"own\.yaml\.j2: .* must not end the others"):
        study(template=str(one))
    with pytest.raises(UserError, match=r"cluster\.patches\.Job: the Job of a study must be"):
        study(patches={"Job": {"spec": {"completions": 1}}})
