"""Whatever is configured: the objects are valid, say exactly what was meant, and hold no secret."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmops.backends.k8s import manifests
from llmops.backends.k8s.resources import ARRAY, JobId
from llmops.config import k8s_rules
from llmops.config.schema import K8sCluster
from llmops.errors import UserError
from llmops.job import Array
from llmops.render import json_value
from tests.k8s.manifests.build import WORKLOADS, cluster, pods, spec
from tests.k8s.manifests.schemas import problems

ANY = st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])
# What some YAML parser or Kubernetes itself would read as something else.
TRAPS = [
    "y",
    "n",
    "No",
    "on",
    "OFF",
    "true",
    "null",
    "~",
    "Null",
    ".inf",
    ".NaN",
    "1",
    "0x1F",
    "0o17",
    "017",
    "1_000",
    "1e3",
    "1.",
    "+.5",
    "1:20:30",
    "2026-01-01",
    "<<",
    "-",
    "?",
    ":",
    "#",
    "&",
    "*",
    "!",
    "|",
    ">",
    "%a",
    "@a",
    "`a",
    "$(x)",
    "$$(x)",
    "$$",
    "$é",
    "$",
    "a$(b)c",
    "$(LLMOPS_POD)",
    "{{x}}",
    "{%x%}",
    "${x}",
    "!!str",
    "=",
]
ODD = [
    "",
    " ",
    " a ",
    "a: b",
    "a #b",
    "- a",
    "a\nb",
    "\n",
    "a\\n",
    "\t",
    "\x7f",
    "\x85",
    "\u2028a",
    "\ufeff",
    "\U0001f600",
    '"',
]
TEXT = st.one_of(st.sampled_from(TRAPS + ODD), st.text(ANY, max_size=40))
ENV_NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True).filter(
    lambda name: not k8s_rules.SECRET_NAME.search(name) and not name.startswith("LLMOPS_")
)
NAME = st.sampled_from(["y", "no", "null", "123", "0x1f", "1e3", "a-b", "a.b.c", "x" * 60])
KEY = st.sampled_from(["y", "on", "a/b", "example.org/team", "1", "a_b.c", "x" * 63])
VALUE = st.sampled_from(["", "y", "true", "1", "1.0", "0123", "a_b", "x" * 63])
QUANTITY = st.sampled_from(["1", "2.5", "64Gi", "1e3", "500M", ".5", "007"])
ENV = st.dictionaries(ENV_NAME, TEXT, max_size=4)
RUN_ID = st.one_of(st.from_regex(r"[a-z0-9-]{1,60}", fullmatch=True), st.text(ANY, min_size=1, max_size=80))


def source(kind: str) -> Any:
    sizes = st.sampled_from(["", "1Gi"])
    values = {"empty_dir": sizes, "memory": sizes, "host_path": st.sampled_from(["/", "/data", "/a b/$(c)"])}
    return st.fixed_dictionaries({kind: values.get(kind, NAME)})


MOUNT = st.one_of(*(source(kind) for kind in ("pvc", "host_path", "config_map", "secret", "empty_dir", "memory")))
PATHS = ["/data", "/runs", "/tmp", "/dev/shm", "/y", "/a b/$(c)", "/é", "/home/x#y", "/" + "z" * 200]


@st.composite
def clusters(draw: Any) -> K8sCluster:
    """Any configuration that the rules let pass."""
    paths = draw(st.lists(st.sampled_from(PATHS), unique=True, max_size=4))
    mounts = [{"path": path, "read_only": draw(st.booleans()), **draw(MOUNT)} for path in paths]
    for mount, name in zip(mounts, draw(st.permutations(["y", "null", "1", "data"])), strict=False):
        mount.update(draw(st.sampled_from([{}, {"name": name}, {"sub_path": "a/$(b) c"}])))
    optional = {
        "image_pull_policy": st.sampled_from(["Always", "IfNotPresent", "Never"]),
        "work_dir": st.sampled_from(["/app", "/a b/$(c)", "/é\n"]),
        "cpus": st.sampled_from(["500m", "2.5", "96", "1e3"]),
        "memory": QUANTITY,
        "ephemeral_storage": QUANTITY,
        "shm": QUANTITY,
        "gpus_per_node": st.integers(0, 16),
        "priority_class": NAME,
        "queue": NAME,
        "scheduler": NAME,
        "service_account": NAME,
        "grace_s": st.integers(30, 10_000),
        "active_deadline_s": st.integers(1, 10_000_000),
        "host_network": st.booleans(),
        "gang": st.sampled_from(["none", "volcano", "coscheduling"]),
        "image_pull_secrets": st.lists(NAME, unique=True, max_size=2),
        "config_env": st.lists(NAME, unique=True, max_size=2),
        "resources": st.dictionaries(st.sampled_from(["rdma/hca", "hugepages-2Mi"]), st.just("1")),
        "node_selector": st.dictionaries(KEY, VALUE, max_size=3),
        "labels": st.dictionaries(KEY, VALUE, max_size=3),
        "annotations": st.dictionaries(KEY, TEXT, max_size=3),
        "tolerations": st.lists(st.fixed_dictionaries({"key": KEY, "operator": st.just("Equal"), "value": VALUE})),
        "secret_env": st.dictionaries(
            ENV_NAME, st.fixed_dictionaries({"secret": NAME, "key": st.just("y")}), max_size=2
        ),
        "topology_spread": st.lists(
            st.fixed_dictionaries(
                {
                    "maxSkew": st.integers(1, 3),
                    "topologyKey": KEY,
                    "whenUnsatisfiable": st.sampled_from(["DoNotSchedule", "ScheduleAnyway"]),
                }
            ),
            max_size=1,
        ),
        "security": st.fixed_dictionaries(
            {},
            optional={
                "run_as_user": st.one_of(st.none(), st.integers(1, 2**31 - 1)),
                "run_as_group": st.integers(0, 2**31 - 1),
                "fs_group": st.integers(0, 2**31 - 1),
                **{name: st.booleans() for name in ("non_root", "read_only_root", "drop_capabilities", "seccomp")},
                "no_privilege_escalation": st.booleans(),
                "add_capabilities": st.just(["IPC_LOCK"]),
            },
        ),
    }
    values = draw(st.fixed_dictionaries({}, optional=optional))
    return cluster(nodes=draw(st.integers(1, 100_000)), mounts=mounts, **values)


class OldYaml(yaml.SafeLoader):
    """YAML 1.1 to the letter, and Go's reading of numbers: what PyYAML takes for text and others do not."""

    bool_values: ClassVar = {**yaml.SafeLoader.bool_values, "y": True, "n": False}


OldYaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:y|Y|n|N)$"), list("yYnN"))
OldYaml.add_implicit_resolver(
    "tag:yaml.org,2002:null",
    re.compile(r"^[-+]?(?:0o[0-7_]+|[\d_]+(?:\.[\d_]*)?[eE][-+]?\d+|\.\d+)$"),
    list("-+.0123456789"),
)


def expand(text: str) -> str:
    """How Kubernetes expands references in a command or a value: byte by byte, every variable being ``?`` here."""
    data, out, at = text.encode(), "", 0
    start = 0
    while at < len(data):
        if data[at] == 0x24 and at + 1 < len(data):
            out += data[start:at].decode("utf-8", "replace")
            after = data[at + 1]
            end = data.find(b")", at + 2)
            if after == 0x24:
                out, used = out + "$", 1
            elif after == 0x28:
                out, used = (out + "?", end - at) if end > 0 else (out + "$(", 1)
            else:
                out, used = out + "$" + chr(after), 1
            at += used
            start = at + 1
        at += 1
    return out + data[start:].decode("utf-8", "replace")


def test_the_strict_reader_takes_unquoted_text_for_something_else():
    read = yaml.load("[y, N, 1e3, 0o17, .5, yes, 1:20]", OldYaml)
    assert not any(isinstance(value, str) for value in read)
    assert yaml.load(yaml.safe_dump({"a": "y"}), OldYaml) == {"a": True}
    assert yaml.load(manifests.dump([{"a": "y"}]), OldYaml) == {"a": "y"}


def test_kubernetes_own_expansion_is_not_harmless():
    assert [expand(text) for text in ("a$(b)c", "a$$b", "$é", "$(a", "a$")] == ["a?c", "a$b", "$Ã\ufffd", "$(a", "a$"]


@given(st.text("$()ab é", max_size=12))
@settings(max_examples=300, deadline=None)
def test_what_kubernetes_expands_arrives_as_it_was(text):
    assert expand(manifests.literal(text)) == text


# Shrinking a failure of this one would take minutes.
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(st.sampled_from((*WORKLOADS, ARRAY)), clusters(), ENV, RUN_ID, TEXT, st.booleans())
def test_any_run_gives_valid_objects(workload, of, env, run_id, python, shared):
    env = {name: text for name, text in {**env, "A": "$(x) $$ $é $"}.items() if name not in of.secret_env}
    python += "$(x)"
    array = Array([[0, 9]], 10, None) if workload == ARRAY else None
    job = spec(workload, of, run_id=run_id, env=env, python=python, array=array)
    text = manifests.render(of, job, Path("/runs/$(agent) é.pyz") if shared else None)
    found = manifests.load(text)
    assert list(yaml.load_all(text, OldYaml)) == found
    assert [problem for item in found for problem in problems(item)] == []
    by_kind = {item["kind"]: item for item in found}
    assert len(by_kind) == len(found)
    assert found[-1]["kind"] == JobId("", "", workload, "").resource.kind
    for item in found:
        assert manifests.labels(run_id, 0).items() <= item["metadata"]["labels"].items()
    for pod in pods(by_kind):
        check_pod(pod, of, env, job.run_url, python)


def check_pod(pod: dict[str, Any], of: K8sCluster, env: dict[str, str], run_url: str, python: str) -> None:
    inside, (container,) = pod["spec"], pod["spec"]["containers"]
    given = {each["name"]: each for each in container["env"]}
    assert len(given) == len(container["env"])
    for name, value in env.items():
        assert expand(given[name]["value"]) == value
    for name, value in of.secret_env.items():
        reference = given[name]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": value.secret, "key": value.key}
    command = [expand(word) for word in container["command"]]
    assert (command[0], command[2], command[4]) == (python, "k8s", run_url)
    volumes = [volume["name"] for volume in inside["volumes"]]
    assert len(set(volumes)) == len(volumes)
    assert sorted(volumes) == sorted(mount["name"] for mount in container["volumeMounts"])
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert len(set(places)) == len(places)
    assert {"/tmp", "/dev/shm", *(mount.path for mount in of.mounts)} <= set(places)
    assert pod["metadata"].get("annotations", {}).items() >= of.annotations.items()
    assert pod["metadata"]["labels"].items() >= of.labels.items()


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), TEXT),
        lambda inside: st.lists(inside) | st.dictionaries(TEXT, inside),
        max_leaves=8,
    )
)
def test_json_values_and_dumps_are_read_back_as_they_were(value):
    line = json_value(value)
    assert "\n" not in line
    assert json.loads(line) == value
    assert yaml.safe_load(line) == value
    assert yaml.load(line, OldYaml) == value
    written = manifests.dump([{"kind": "X", "value": value}])
    assert manifests.load(written) == [{"kind": "X", "value": value}]
    assert list(yaml.load_all(written, OldYaml)) == [{"kind": "X", "value": value}]


@settings(max_examples=300, deadline=None)
@given(RUN_ID, RUN_ID)
def test_names_and_labels_fit_and_tell_runs_apart(first, second):
    tags = [f"{first}.0.0123abcd", f"{second}.0.0123abce"]
    names = [manifests.object_name(tag, run_id) for tag, run_id in zip(tags, (first, second), strict=True)]
    for name in names:
        assert re.fullmatch(r"[a-z][a-z0-9-]{0,29}-[0-9a-f]{8}", name)
        assert "--" not in name
    assert names[0] != names[1]
    values = [manifests.run_label(first), manifests.run_label(second)]
    assert all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value) for value in values)
    assert (values[0] == values[1]) == (first == second)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12), st.sampled_from(["cpus", "memory", "shm"]))
def test_any_quantity_is_taken_as_kubernetes_does_or_refused(text, key):
    """What the rules let pass is what the API server's own pattern takes."""
    try:
        k8s_rules._check_quantity(f"cluster.{key}", text, "1", zero=True)
    except UserError:
        return
    assert re.fullmatch(
        r"(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?",
        text,
    )
