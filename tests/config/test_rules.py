"""Rules that span several keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from llmops.config.compose import load_config
from llmops.config.recompose import recompose
from llmops.config.schema import (
    K8sCluster,
    RunConfig,
    SecretKey,
    pod_grace_seconds,
    time_limit_seconds,
    warning_seconds,
)
from llmops.errors import UserError

Check = Callable[[list[str]], RunConfig]
S = "cluster=slurm"
K = "cluster=k8s"
OWN = "command=[python,train.py]"
PREPARE = ["task=prepare_data", "prepare.input=[s3://b/*.jsonl]", "prepare.output=/out"]

CASES = [
    (["name=''"], "name='': must be 1 to 100 printable"),
    (["name='a\nb'"], "printable"),
    (["runs_url=''"], "runs_url is empty"),
    (["command=['']"], "its first word, the program, is empty"),
    # the trainer's own rules, with the number of ranks
    (["model.n_heads=3"], "model.n_heads=3 does not divide model.dim=128"),
    (
        ["cluster.ranks_per_node=2"],
        "dist.dp_replicate x dp_shard x cp x tp x pp = 1 x 1 x 1 x 1 x 1 does not make up 2 ranks",
    ),
    ([S, "dist.dp_shard=auto", "cluster.nodes=3"], "train.global_batch_size=64 is not a multiple"),
    (["cluster.nodes=2", "dist.dp_shard=auto"], "cluster=local is one machine"),
    # preparing data
    ([*PREPARE, OWN], "task=prepare_data and a command of your own"),
    (["task=prepare_data"], "prepare.input is empty"),
    ([*PREPARE, "prepare.output=null"], "prepare.output is not set"),
    ([*PREPARE, "prepare.output=out"], "prepare.output=out: a job runs in a folder of its own"),
    ([*PREPARE, "prepare.input=[a.jsonl]"], "prepare.input=a.jsonl: a job runs in a folder of its own"),
    ([*PREPARE, "prepare.tokenizer=a/tokenizer.json"], "prepare.tokenizer=a/tokenizer.json: a job runs in"),
    ([*PREPARE, "prepare.drop='('"], "no regular expression"),
    # environment
    (["env.RANK=1"], "RANK is set by llmops itself"),
    (["env.OMP_NUM_THREADS=1"], "set train.threads_per_rank instead"),
    (["env.LLMOPS_RUN_ID=1"], "LLMOPS_RUN_ID is set by llmops itself"),
    (["secrets=[MASTER_ADDR]"], "secrets: MASTER_ADDR is set by llmops itself"),
    (["secrets=[1a]"], "'1a' is not the name of an environment variable"),
    (["secrets=[TOKEN]", "env.TOKEN=x"], "env.TOKEN is also in secrets"),
    (["env.A-B=1"], "'A-B' is not the name of an environment variable"),
    # stopping and retrying
    (["stop.signal=USR1"], "stop.signal=USR1: no signal has this name"),
    (["stop.signal=SIGKILL"], "a program cannot handle it"),
    (["stop.local_grace_s=5"], "leaves less than checkpoint.save_seconds=20"),
    (["retry.backoff_s=90"], "more than retry.backoff_max_s=60"),
    (["stop.hang_s=inf"], "stop.hang_s=inf: must be a finite number"),
    # SLURM
    ([S, "cluster.partition="], "cluster.partition is empty"),
    ([S, "cluster.comment='a\nb'"], "line breaks and control characters"),
    ([S, f"cluster.comment={'x' * 1025}"], "SLURM takes 1024 at most"),
    ([S, "cluster.extra=['--licenses=a\r']"], "line breaks and control characters"),
    ([S, "cluster.time=soon"], "cluster.time=soon: expected minutes"),
    ([S, "cluster.time=0"], "above zero"),
    ([S, "cluster.time=1:50"], "warned 110 s before it ends"),
    ([S, "cluster.signal_s=10"], "leaves less than checkpoint.save_seconds=20"),
    ([S, "cluster.signal_s=70000"], "65535 seconds at most"),
    ([S, "cluster.mem=lots"], "cluster.mem=lots: expected a size"),
    ([S, "cluster.mem=1G", "cluster.mem_per_cpu=1G"], "set only one of them"),
    ([S, "cluster.gres=gpu:2", "cluster.gpus_per_node=2"], "both ask for GPUs"),
    ([S, "cluster.mail_type=END FAIL"], "expected names such as END,FAIL"),
    ([S, "cluster.extra=[licenses=foo]"], "'licenses=foo' is not an sbatch option"),
    ([S, "cluster.extra=[--signal=USR1@60]"], "use cluster.signal_s"),
    ([S, "cluster.extra=[--no-requeue]"], "llmops sets --no-requeue itself; remove it"),
    ([S, "cluster.extra=[-pgpu]"], "use cluster.partition"),
    ([S, "cluster.extra=[--nodes 3]"], "use cluster.nodes"),
    ([S, "cluster.container.runtime=pyxis"], "needs cluster.container.image"),
    ([S, "cluster.container.image=x.sqsh"], "cluster.container.runtime=none would ignore it"),
    (
        [S, "cluster.container.runtime=pyxis", "cluster.container.image=x", "cluster.container.mounts=[data]"],
        "'data' is not of the form /host/path:/container/path",
    ),
    # Kubernetes
    ([K, "cluster.image=null"], "cluster.image is not set"),
    ([K, "cluster.image=Lab/Train"], "not an image; expected"),
    ([K, "cluster.image=a b"], "not an image; expected"),
    ([K, "cluster.context="], "cluster.context is empty"),
    ([K, "cluster.namespace=Team"], "cluster.namespace='Team': not a namespace's name"),
    ([K, "cluster.queue=a_b"], "cluster.queue='a_b': no object can have this name"),
    ([K, "cluster.image_pull_secrets=[a/b]"], "cluster.image_pull_secrets='a/b'"),
    ([K, "cluster.work_dir=app"], "must be an absolute path in the image"),
    ([K, "cluster.memory=64GB"], "cluster.memory='64GB': not a Kubernetes quantity; did you mean 64Gi?"),
    ([K, "cluster.memory=lots"], "expected one such as 64Gi"),
    ([K, "cluster.memory=500m"], "m means thousandths of a byte; did you mean 500Mi?"),
    ([K, "cluster.cpus=0"], "must be more than zero"),
    ([K, "cluster.shm=-1"], "not a Kubernetes quantity"),
    ([K, "cluster.resources={cpu: '4'}"], "use cluster.cpus instead"),
    ([K, "cluster.gpus_per_node=1", "cluster.resources={nvidia.com/gpu: '4'}"], "use cluster.gpus_per_node instead"),
    ([K, "cluster.resources={rdma/hca: '1.5'}"], "expected a whole number"),
    ([K, "cluster.gpu_resource=a b"], "cluster.gpu_resource: 'a b' cannot be a key"),
    ([K, "cluster.labels={-a: b}"], "cluster.labels: '-a' cannot be a key"),
    ([K, "cluster.labels.a=b c"], "cluster.labels.a='b c': not a label's value"),
    ([K, "cluster.node_selector={A.B/c: a}"], "'A.B/c' cannot be a key"),
    ([K, "cluster.labels.llmops.run=x"], "cluster.labels.llmops.run: llmops sets it itself; remove it"),
    ([K, "cluster.labels.kueue.x-k8s.io/queue-name=x"], "use cluster.queue"),
    ([K, "cluster.annotations.scheduling.k8s.io/group-name=x"], "use cluster.gang"),
    ([K, "cluster.labels.batch.kubernetes.io/job-name=x"], "controllers set it themselves"),
    ([K, f"cluster.annotations.a={'x' * 262144}"], "Kubernetes takes 262144 at most"),
    ([K, "cluster.mounts=[{path: /a}]"], "cluster.mounts[0] (/a) has no source: set one of pvc, host_path"),
    ([K, "cluster.mounts=[{path: /a, pvc: p, memory: ''}]"], "has pvc and memory: set only one"),
    ([K, "cluster.mounts=[{path: a, pvc: p}]"], "cluster.mounts[0].path='a': expected an absolute path"),
    ([K, "cluster.mounts=[{path: /a/../b, pvc: p}]"], "without ':' or '..'"),
    ([K, "cluster.mounts=[{path: /llmops/x, pvc: p}]"], "/llmops of a pod is taken"),
    ([K, "cluster.mounts=[{path: /a, pvc: p},{path: /a, pvc: q}]"], "two of them have path '/a'"),
    ([K, "cluster.mounts=[{path: /a, pvc: p, name: tmp}]"], "not a volume's name"),
    ([K, "cluster.mounts=[{path: /a, host_path: b}]"], "expected an absolute path of the node"),
    ([K, "cluster.mounts=[{path: /a, pvc: p, sub_path: ../b}]"], "expected a path inside the volume"),
    ([K, "cluster.mounts=[{path: /a, memory: 1GB}]"], "cluster.mounts[0].memory='1GB'"),
    ([K, "cluster.mounts=[{path: /a, secret: A}]"], "cluster.mounts[0].secret='A': no object"),
    ([K, "env.HF_TOKEN=abc"], "env.HF_TOKEN looks like a secret"),
    ([K, "env.AWS_SECRET_ACCESS_KEY=abc"], "set cluster.secret_env.AWS_SECRET_ACCESS_KEY="),
    ([K, "env.PGPASSWORD=abc"], "env.PGPASSWORD looks like a secret"),
    ([K, "secrets=[HF]"], "secrets: HF would have to be in the workload in clear text"),
    ([K, "cluster.secret_env={A: {secret: s, key: 'a b'}}"], "cluster.secret_env.A.key='a b'"),
    ([K, "cluster.secret_env={A: {secret: S, key: a}}"], "cluster.secret_env.A.secret='S'"),
    ([K, "cluster.secret_env={A-B: {secret: s, key: a}}"], "'A-B' is not the name of an environment variable"),
    ([K, "env.A=1", "cluster.secret_env={A: {secret: s, key: a}}"], "env.A is also in cluster.secret_env"),
    ([K, "cluster.tolerations=[{keys: a}]"], "cluster.tolerations[0]: there is no keys; it takes effect, key"),
    ([K, "cluster.tolerations=[{operator: In}]"], "expected Exists or Equal"),
    ([K, "cluster.tolerations=[{operator: Exists, value: a}]"], "operator Exists takes no value"),
    ([K, "cluster.affinity={node: {}}"], "cluster.affinity: there is no node; it takes nodeAffinity"),
    ([K, "cluster.topology_spread=[{maxSkew: 1}]"], "cluster.topology_spread[0] has no topologyKey"),
    ([K, "cluster.security.run_as_user=0"], "which cluster.security.non_root=true refuses"),
    ([K, "cluster.security.privileged=true"], "needs cluster.security.no_privilege_escalation=false"),
    ([K, "cluster.security.add_capabilities=[CAP_IPC_LOCK]"], "is no capability; write IPC_LOCK"),
    ([K, "cluster.grace_s=5"], "leaves less than checkpoint.save_seconds=20"),
    ([K, "cluster.workload=trainjob", "cluster.ttl_s=5"], "a TrainJob cannot remove itself"),
    ([K, "cluster.patches={Jobs: {}}"], "cluster.patches.Jobs: there is no such object"),
]


@functools.cache
def base(backend: str) -> str:
    image = ["cluster.image=lab/train:1.0"] if backend == "k8s" else []
    return load_config([f"cluster={backend}", *image]).yaml_text


@pytest.fixture
def check() -> Check:
    """Check the default configuration of a backend with some keys changed, without composing each."""
    backends = {S: "slurm", K: "k8s"}

    def check(changes: list[str]) -> RunConfig:
        (backend,) = [backends[change] for change in changes if change in backends] or ["local"]
        return recompose(base(backend), [change for change in changes if change not in backends]).config

    return check


@pytest.mark.parametrize(("overrides", "expected"), CASES, ids=[" ".join(case[0])[:60] for case in CASES])
def test_refused(overrides: list[str], expected: str, check: Check) -> None:
    with pytest.raises(UserError) as caught:
        check(overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [OWN, "cluster.ranks_per_node=3", "model.n_heads=3"],  # the trainer's rules are the trainer's
        [OWN, "stop.local_grace_s=5"],
        [*PREPARE, "cluster.ranks_per_node=3", "model.n_heads=3", "stop.local_grace_s=5"],
        [S, "cluster.time=UNLIMITED"],
        [S, "cluster.time=2", "cluster.signal_s=60"],
        [S, "cluster.extra=[--licenses=foo,--hint=nomultithread,-k]"],
        [S, "cluster.gres=nvme:1", "cluster.gpus_per_node=2"],
        [
            S,
            "cluster.container.runtime=apptainer",
            "cluster.container.image=/x.sif",
            "cluster.container.mounts=[/a:/b:ro]",
        ],
        [S, "cluster.setup=['module load cuda\nexport X=1']"],
        ["env.TEXT='two\nlines'"],
        ["env.MY_TOKEN=x"],  # in a file that only its owner reads
        [K, "env.MY_TOKEN=", "env.TOKENIZERS_PARALLELISM=false", "env.KEYS=1"],
        [K, "secrets=[A]", "cluster.secret_env={A: {secret: s, key: a.b}}"],
        [K, "cluster.image=registry:5000/a/b-c_d:v1.0", "cluster.cpus=1.5", "cluster.memory=1e9", "cluster.shm=64Gi"],
        [
            K,
            "cluster.mounts=[{path: /dev/shm, memory: 8Gi},{path: /a b, pvc: p, sub_path: x/y},{path: /t, memory: ''}]",
        ],
        [
            K,
            "cluster.node_selector.nvidia.com/gpu.product=H100",
            "cluster.labels.team=a",
            "cluster.resources={rdma/hca: '1'}",
        ],
        [
            K,
            "cluster.security.run_as_user=0",
            "cluster.security.non_root=false",
            "cluster.security.add_capabilities=[IPC_LOCK]",
        ],
        [K, "cluster.patches={Job: {spec: {podReplacementPolicy: Failed}}}", OWN, "cluster.grace_s=5"],
        ["stop.signal=SIGUSR1", "stop.hang_s=0", "env.PYTHONPATH=/x"],
    ],
    ids=" ".join,
)
def test_allowed(overrides: list[str], check: Check) -> None:
    check(overrides)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("unlimited", None),
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-2", 93600),
        ("1-2:3", 93780),
        ("1-02:03:04", 93784),
    ],
)
def test_time_limit(text: str | None, seconds: int | None) -> None:
    assert time_limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0:00:00", "-5", "1:2:3:4", "1-", "2h", "1.5", " 5", "5\n"])
def test_time_limit_refused(text: str) -> None:
    with pytest.raises(ValueError):
        time_limit_seconds(text)


def test_sections_of_ones_own_keys_grow_by_overrides(check: Check) -> None:
    changes = [K, "cluster.labels.a.b/c=d", "cluster.labels={e: f}", "cluster.secret_env.A.secret=s"]
    cluster = check([*changes, "cluster.secret_env.A.key=k", "cluster.patches.Job.spec.x=[1]"]).cluster
    assert isinstance(cluster, K8sCluster)
    assert cluster.labels == {"a.b/c": "d", "e": "f"}
    assert cluster.secret_env == {"A": SecretKey(secret="s", key="k")}
    assert cluster.patches == {"Job": {"spec": {"x": [1]}}}
    composed = load_config(
        [K, "cluster.image=a", *changes[1:], "cluster.secret_env.A.key=k", "cluster.resources.a/b=1"]
    )
    assert isinstance(composed.config.cluster, K8sCluster)
    assert (composed.config.cluster.labels, composed.config.cluster.resources) == (cluster.labels, {"a/b": "1"})


def test_numbers_in_a_file_are_quantities(own: Callable[..., Path]) -> None:
    text = "defaults: [k8s]\nimage: a\ncpus: 1.5\nmemory: 1000\nresources: {rdma/hca: 1}\n"
    cluster = load_config(["cluster=site"], own(cluster__site=text)).config.cluster
    assert isinstance(cluster, K8sCluster)
    assert (cluster.cpus, cluster.memory, cluster.resources) == ("1.5", "1000", {"rdma/hca": "1"})


def test_pods_have_the_time_to_save(check: Check) -> None:
    cluster = check([K]).cluster
    assert isinstance(cluster, K8sCluster)
    assert pod_grace_seconds(cluster, 30.5) == 61
    assert pod_grace_seconds(msgspec.structs.replace(cluster, grace_s=5), 30.5) == 5


def test_warning_leaves_room_to_save(check: Check) -> None:
    assert warning_seconds(check([S, "checkpoint.save_seconds=30.5"])) == 121
    assert warning_seconds(check([S, "cluster.signal_s=45"])) == 45
