"""The verbs as the launcher calls them, with what is really rendered, and with no more rights than the Role gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmops.backends import k8s
from llmops.backends.base import Rejected, Submission
from llmops.backends.k8s import client
from llmops.backends.k8s.resources import WORKLOADS, JobId
from llmops.errors import UserError
from llmops.job import Array
from tests.k8s.api import recorded
from tests.k8s.api.server import ApiServer
from tests.k8s.api.test_submit import put_pods, real, stored
from tests.k8s.conftest import write_kubeconfig
from tests.k8s.manifests import build

ROLES = Path(__file__).parents[3] / "k8s"
RUN = "Train_it-20260101-abcd"


def submission(tag: str = f"{RUN}.0.0123abcd", trials: int = 0, **cluster: Any) -> Submission:
    """What the launcher would submit."""
    backend, of = k8s.K8sBackend(), build.cluster(**{"nodes": 2, **cluster})
    backend.check(of, f"s3://bucket/runs/{RUN}")
    options = backend.options(
        of, {"tag": tag, "run_id": RUN, "runs_url": "s3://bucket/runs", "warning_s": 0, "save_s": 20, "trials": trials}
    )
    array = Array([[0, trials - 1]], trials, None) if trials else None
    spec = build.spec(options["workload"], of, run_id=RUN, tag=tag, options=options, array=array)
    return Submission(spec, None, backend.render(of, spec, None), [])


def role_rules() -> list[dict[str, Any]]:
    """What the project's Role for whoever launches allows."""
    roles = [
        each
        for path in sorted(ROLES.rglob("*.yaml"))
        for each in yaml.safe_load_all(path.read_text())
        if each and each.get("kind") == "Role" and "launch" in each["metadata"]["name"]
    ]
    assert len(roles) == 1, f"{ROLES} holds {len(roles)} Roles for the launcher"
    return list(roles[0]["rules"])


def test_the_verbs_need_the_role_and_no_more(server: ApiServer, kubeconfig: Path) -> None:
    """The double refuses what the Role does not allow; and what the Role allows is all used."""
    rules = role_rules()
    server.users["admin-token"] = ("launcher", rules)
    for workload, gang in (
        ("job", "volcano"),
        ("jobset", "coscheduling"),
        ("pytorchjob", "none"),
        ("trainjob", "none"),
    ):
        use_all_verbs(server, workload, gang)
    used = {(request.resource, request.verb) for request in server.requests if request.resource}
    granted = {
        (f"{group}/{resource}", verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == used


def use_all_verbs(server: ApiServer, workload: str, gang: str) -> None:
    """Submit, lose an answer, be refused, look, find, follow and cancel."""
    backend, plural = k8s.K8sBackend(), WORKLOADS[workload].plural
    first = backend.submit(submission(workload=workload, gang=gang))
    server.fail("lost", method="POST", path=f"/{plural}$", test=real)
    tag = f"{RUN}.1.00000001"
    second = backend.submit(submission(tag, workload=workload))
    assert first == f"prod/default/{workload}/train-it-20260101-abcd-0123abcd"
    server.fail(recorded.raw("jobs/quota-pod-403"), method="POST", path=f"/{plural}$", test=real)
    with pytest.raises(Rejected, match="exceeded quota"):
        backend.submit(submission(f"{RUN}.2.00000002", workload=workload, gang=gang))
    assert not [name for _, name in stored(server) if "00000002" in name]
    assert backend.look([first]).views[first].state == "pending"
    name = first.rsplit("/", 1)[1]
    put_pods(server, workload, name, 2)
    assert backend.look([first]).views[first].state == "running"
    assert backend.find(tag) == second
    look = backend.look((), (tag, f"{RUN}.7.77777777"))
    assert look.found == {tag: second}
    assert look.views[second].state == "pending"
    server.log(f"{name}-0", b"2026-11-22T12:00:00.1Z hello\n")
    assert "hello" in [line.text for line in backend.logs(first)]
    assert next(line for line in backend.logs(first, done=lambda: False) if not line.note).text == "hello"
    backend.cancel([first], graceful=True)
    assert backend.look([first]).views[first].state == "completing"
    server.store.objects.clear()


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_refused_submission_leaves_nothing(server: ApiServer, kubeconfig: Path, workload: str) -> None:
    server.fail(recorded.raw("jobs/quota-pod-403"), times=9, method="POST", path=f"/{WORKLOADS[workload].plural}$")
    with pytest.raises(Rejected, match="exceeded quota"):
        k8s.K8sBackend().submit(submission(workload=workload))
    assert stored(server) == []


def test_auto_asks_what_is_served_and_a_name_asks_nothing(server: ApiServer, kubeconfig: Path) -> None:
    assert submission(workload="job").spec.options["workload"] == "job"
    assert server.requests == []
    assert submission().spec.options["workload"] == "pytorchjob"
    server.absent.add("kubeflow.org")
    assert submission().spec.options["workload"] == "job"


def test_what_no_pod_could_reach_is_refused(tmp_path: Path) -> None:
    backend = k8s.K8sBackend()
    run_url = f"{tmp_path}/runs/run"
    backend.check(build.cluster(), "s3://b/runs/run")
    with pytest.raises(UserError, match=rf"runs_url: the folder {tmp_path}/runs .*cluster\.mounts"):
        backend.check(build.cluster(mounts=[{"path": "/data", "pvc": "data"}]), run_url)
    backend.check(build.cluster(mounts=[{"path": str(tmp_path), "pvc": "home"}]), run_url)


def test_a_kubeconfig_that_the_config_names_is_found_again(
    server: ApiServer, kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`status` has only the job id."""
    own = write_kubeconfig(tmp_path / "own", server.url, namespace="default")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    job_id = k8s.K8sBackend().submit(submission(workload="job", kubeconfig=str(own)))
    assert k8s.K8sBackend().look([job_id]).views[job_id].state == "pending"
    parsed = JobId.parse(job_id)
    assert parsed is not None
    assert (parsed.context, parsed.kubeconfig) == ("prod", str(own))
    own.unlink()  # as on another machine, which knows the context too
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    k8s._connect.cache_clear()
    assert k8s.K8sBackend().look([job_id]).views[job_id].state == "pending"


def test_rendering_needs_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert submission(workload="job", namespace="team-a").spec.options["job_id"].startswith("/team-a/job/")
    with pytest.raises(Rejected, match="no cluster is known"):
        k8s.K8sBackend().submit(submission(workload="job"))


def test_inside_a_cluster_its_own_account_is_used(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    for name, text in (("token", "admin-token"), ("ca.crt", "no certificate"), ("namespace", "team-b")):
        (tmp_path / name).write_text(text)
    host, port = server.url.removeprefix("http://").split(":")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    monkeypatch.setattr(client, "NAMESPACE_FILE", str(tmp_path / "namespace"))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    assert client.current(None, None) == ("", "team-b")
    api = client.connect("")
    assert api.server == f"https://{host}:{port}"


def test_the_client_is_imported_only_when_it_is_needed() -> None:
    code = "import sys, llmops.backends.k8s as k8s; k8s.K8sBackend(); print('kubernetes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
