"""What an administrator applies (k8s/), and the image (docker/): read, for want of kustomize and an engine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests.build import WORKLOADS, cluster, objects, pods
from tests.k8s.manifests.schemas import problems

TREE = Path(__file__).parents[3]
BASES = sorted(path.parent for path in (TREE / "k8s").glob("*/kustomization.yaml"))
CLUSTER_WIDE = {"Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass"}


def resources(base: Path) -> list[dict[str, Any]]:
    """The objects of a base, in order."""
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())
    return [item for name in listed["resources"] for item in yaml.safe_load_all((base / name).read_text())]


def everything() -> dict[tuple[str, str], dict[str, Any]]:
    return {(item["kind"], item["metadata"]["name"]): item for base in BASES for item in resources(base)}


def test_all_bases_are_there():
    assert [base.name for base in BASES] == ["base", "kueue", "monitoring", "priority", "storage"]
    readme = (TREE / "k8s" / "README.md").read_text()
    for base in BASES:
        assert f"| `{base.name}` |" in readme


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_a_base_lists_what_it_has_and_all_of_it_is_valid(base):
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())
    assert (listed["apiVersion"], listed["kind"]) == ("kustomize.config.k8s.io/v1beta1", "Kustomization")
    assert set(listed) <= {"apiVersion", "kind", "namespace", "resources"}
    assert sorted([*listed["resources"], "kustomization.yaml"]) == sorted(path.name for path in base.iterdir())
    for item in resources(base):
        assert problems(item) == []
        assert (item["metadata"].get("namespace") is None) == (item["kind"] in CLUSTER_WIDE)


def test_what_is_named_is_there():
    found = everything()
    binding = found["RoleBinding", "launcher"]
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == ("Role", "launcher")
    assert ("ServiceAccount", binding["subjects"][0]["name"]) in found
    queue = found["LocalQueue", "training"]
    spec = found["ClusterQueue", queue["spec"]["clusterQueue"]]["spec"]
    for group in spec["resourceGroups"]:
        for flavor in group["flavors"]:
            assert ("ResourceFlavor", flavor["name"]) in found
            assert [each["name"] for each in flavor["resources"]] == group["coveredResources"]
    namespace = spec["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert ("Namespace", namespace) in found
    assert {item["metadata"]["namespace"] for item in found.values() if "namespace" in item["metadata"]} == {namespace}


def test_the_launcher_may_do_nothing_that_could_give_it_more():
    rules = everything()["Role", "launcher"]["rules"]
    for rule in rules:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert not {"secrets", "pods/exec", "serviceaccounts/token", "rolebindings"} & set(rule["resources"])
    writable = {name for rule in rules if "create" in rule["verbs"] for name in rule["resources"]}
    assert "pods" not in writable


def test_the_monitor_finds_the_pods():
    spec = everything()["PodMonitor", "llmops"]["spec"]
    for workload in WORKLOADS:
        for pod in pods(objects(workload, nodes=2, metrics={"enabled": True, "port": 9400})):
            assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
            assert set(spec["podTargetLabels"]) <= set(pod["metadata"]["labels"])
            ports = pod["spec"]["containers"][0]["ports"]
            assert [each["name"] for each in ports] == [each["port"] for each in spec["podMetricsEndpoints"]]
            noted = pod["metadata"]["annotations"]
            assert (noted["prometheus.io/scrape"], noted["prometheus.io/port"]) == (
                "true",
                str(ports[0]["containerPort"]),
            )


@pytest.mark.parametrize(
    ("nodes", "index", "role", "kept"),
    [
        *(("1", "", "", True), ("1", "7", "", True), ("2", "0", "", True), ("2", "1", "", False)),
        *(("12", "", "master", True), ("2", "", "worker", False), ("10", "10", "", False)),
    ],
)
def test_the_monitor_looks_for_the_trainer_where_rank_0_is_alone(nodes, index, role, kept):
    """``nodes``, ``index`` and ``role`` as they are in a pod's labels; Prometheus joins them with ";"."""
    rule = everything()["PodMonitor", "llmops"]["spec"]["podMetricsEndpoints"][1]["relabelings"][0]
    assert rule["action"] == "keep"
    assert bool(re.fullmatch(rule["regex"], f"{nodes};{index};{role}")) == kept


def test_the_operators_rules_are_those_of_prometheus():
    alerts = yaml.safe_load((TREE / "docker" / "prometheus" / "alerts.yml").read_text())
    assert everything()["PrometheusRule", "llmops"]["spec"] == alerts
    service, monitor = everything()["Service", "llmops-metrics"], everything()["ServiceMonitor", "llmops-metrics"]
    deployed = everything()["Deployment", "llmops-metrics"]["spec"]
    chosen = service["spec"]["selector"]
    assert chosen == deployed["selector"]["matchLabels"] == deployed["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]


def test_pods_pass_the_namespaces_pod_security_standard():
    """The restricted standard, rule by rule, as far as the defaults concern it."""
    assert (
        everything()["Namespace", "llmops"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )
    mounts = [{"path": "/r", "pvc": "runs"}, {"path": "/s", "secret": "s"}, {"path": "/m", "memory": ""}]
    for workload in WORKLOADS:
        for pod in pods(objects(workload, nodes=2, mounts=mounts)):
            spec, (container,) = pod["spec"], pod["spec"]["containers"]
            assert not spec.get("hostNetwork")
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            allowed = {"name", "configMap", "emptyDir", "persistentVolumeClaim", "secret"}
            assert all(set(volume) <= allowed for volume in spec["volumes"])


INSTRUCTION = re.compile(r"^(FROM|ARG|ENV|RUN|COPY|USER|WORKDIR|ENTRYPOINT|CMD|LABEL)\s+(.*)$")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments. What is none fails."""
    text = (TREE / "docker" / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    found = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            match = INSTRUCTION.match(line)
            assert match, line
            found.append((match[1], match[2]))
    return found


def test_the_image_is_built_in_stages_and_runs_as_nobody():
    found = instructions()
    stages = [value for name, value in found if name == "FROM"]
    assert len(stages) == 2
    names = {value.split("=")[0]: value.partition("=")[2] for name, value in found if name == "ARG"}
    for stage in stages:
        image = stage.split()[0]
        assert re.fullmatch(r"\$\{\w+\}", image), "images are chosen by build arguments"
        default = names[image[2:-1]]
        assert re.fullmatch(r"[a-z0-9/-]+:[\w.-]+", default), f"{default} names a registry, or no tag"
    last = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    user = [value for name, value in found[last:] if name == "USER"][-1]
    assert user == str(cluster().security.run_as_user)
    assert found[-1][0] in ("ENTRYPOINT", "CMD")


def test_the_image_has_no_secret_and_copies_what_exists():
    found = instructions()
    ignored = (TREE / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    for name, value in found:
        if name in ("ARG", "ENV"):
            assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", value, re.IGNORECASE)
        if name == "COPY" and "--from" not in value:
            *sources, _ = shlex.split(value)
            for source in sources:
                assert (TREE / source).exists(), source
                assert f"!{source}" in ignored, f"{source} is not sent to the builder"
    packaged = {word for name, value in found if name == "RUN" for word in re.findall(r"\[([\w,]+)\]", value)}
    extras = set(
        re.findall(r"^(\w+) = \[", (TREE / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M)
    )
    assert packaged
    assert all(set(each.split(",")) <= extras for each in packaged)


def test_the_compose_file_mounts_what_exists_and_holds_no_password():
    compose = yaml.safe_load((TREE / "docker" / "compose.yml").read_text())
    assert set(compose["services"]) == {"s3", "prometheus", "grafana"}
    for service in compose["services"].values():
        default = re.fullmatch(r"\$\{\w+:-([a-z0-9/-]+:[\w.-]+)\}", service["image"])
        assert default, f"{service['image']} names a registry, or cannot be chosen"
        ports, shown = service.get("ports", []), str([service.get("command"), service.get("environment")])
        assert ports or (service["network_mode"] == "host" and "127.0.0.1" in shown)
        for port in ports:
            assert port.startswith("127.0.0.1:"), "beside a laptop, not for its network"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            named = not source.startswith(".")
            assert source in compose["volumes"] if named else (TREE / "docker" / source).exists()
    text = (TREE / "docker" / "compose.yml").read_text()
    assert not re.search(r"(PASSWORD|SECRET\w*): *[^$\s]", text)
    assert yaml.safe_load((TREE / "docker" / "grafana" / "prometheus.yaml").read_text())["apiVersion"] == 1


def test_the_images_install_steps_work_in_a_clean_environment(tmp_path):
    """The script of the build stage, as it is, but for its folder and for what would be downloaded."""
    build = []
    for name, value in instructions()[1:]:
        build.append((name, value))
        if name == "RUN":
            break
    source = tmp_path / "src"
    source.mkdir()
    for name, value in build:
        if name == "COPY":
            *files, target = shlex.split(value)
            for file in files:
                to = source / (file if target == "./" else target)
                if (TREE / file).is_dir():
                    shutil.copytree(TREE / file, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(TREE / file, to)
    script = build[-1][1].replace("/opt/llmops", str(tmp_path / "venv")).replace("python -m", f"{sys.executable} -m")
    script = script.replace("pip install", "pip install --quiet --no-index --no-deps --no-build-isolation")
    # The builder is the tests' own: nothing can be downloaded.
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    done = subprocess.run(["sh", "-ec", script], cwd=source, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for file in ("llmops/_templates/pod.yaml.j2", "llmops/_conf/cluster/k8s.yaml", "llm/train/__main__.py"):
        assert (packages / file).exists(), file
    assert (tmp_path / "venv" / "bin" / "llmops").exists()
