"""Our backends as TorchX schedulers, by TorchX's own command line and by its runner."""

from __future__ import annotations

import tomllib

import pytest
from torchx import specs
from torchx.runner import get_runner
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES, get_scheduler_factories
from torchx.specs.finder import ComponentValidationException

from llmops import launch
from llmops.torchx_schedulers.app import prepare
from tests.launcher.harness import TREE
from tests.torchx.commands import COUNTER, Torchx

TWO_ROLES = """
import torchx.specs as specs

def two() -> specs.AppDef:
    '''Two roles.'''
    return specs.AppDef(name="two", roles=[specs.Role(name=n, image="", entrypoint="true") for n in ("a", "b")])
"""


@pytest.fixture
def torchx(tmp_path):
    (tmp_path / "work").mkdir()
    return Torchx(tmp_path / "runs", tmp_path / "work")


def role(**changes) -> specs.Role:
    known = {"name": "trainer", "image": "lab/train:1", "entrypoint": "python", "args": ["t.py"], "num_replicas": 2}
    return specs.Role(**{**known, "resource": specs.Resource(cpu=4, gpu=1, memMB=8000), **changes})


def app(*roles) -> specs.AppDef:
    return specs.AppDef(name="net", roles=list(roles or [role()]))


def prepared(changed: specs.Role, **cfg) -> launch.Prepared:
    return prepare("k8s", app(changed), {"runs_url": "s3://bucket/runs", **cfg})


def test_all_schedulers_of_torchx_are_still_there():
    entries = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["entry-points"]["torchx.schedulers"]
    own = {"llmops_slurm", "llmops_k8s", "llmops_local"}
    assert {name: value.partition(":")[0] for name, value in entries.items() if name not in own} == dict(
        DEFAULT_SCHEDULER_MODULES
    )
    assert own <= set(get_scheduler_factories())


def test_ddp_on_this_machine(torchx, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    (torchx.folder / "count.py").write_text(COUNTER)
    component = ("dist.ddp", "-j", "1x2", "--script", "count.py", "--env", "WHERE=${app_id}/${replica_id}")
    handle = torchx.ok("run", "-s", "llmops_local", "--wait", *component, "--", str(state), "3").split()[0]
    run_id = handle.rpartition("/")[2]
    assert torchx.state(handle) == "SUCCEEDED"
    shown = torchx.ok("log", handle)
    assert f"rank 1 of 2 starts at 0 in {run_id}/0" in shown
    assert "rank 0 done at 3" in shown
    assert handle in torchx.ok("list", "-s", "llmops_local")
    assert f"'TORCHX_JOB_ID': '{handle}'" in torchx.ok("describe", handle)
    elsewhere = torchx.call("status", handle.replace("llmops_local", "llmops_slurm"))
    assert elsewhere.returncode == 1
    assert "does not exist" in elsewhere.stderr


def test_a_failure_is_shown_and_not_tried_again(torchx):
    (torchx.folder / "fail.sh").write_text("echo broken\nexit 3\n")
    done = torchx.call("run", "-s", "llmops_local", "--wait", "utils.sh", "sh", "fail.sh")
    assert done.returncode == 1
    handle = done.stdout.split()[0]
    status = torchx.ok("status", handle)
    assert "State: FAILED" in status
    assert "Num Restarts: 0" in status
    assert "exitcode: 3" in status
    assert "broken" in status


def test_what_cannot_run_is_refused_in_one_line(torchx, tmp_path):
    (torchx.folder / "two.py").write_text(TWO_ROLES)
    for component, said in (
        ("dist.nope", "Component `dist.nope` not found"),
        ("two.py:two", "two has 2 roles (a, b): a run has one"),
    ):
        done = torchx.call("run", "-s", "llmops_local", component)
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("component", "said"),
    [
        (("dist.ddp", "-j", "1:2x1", "--script", "x.py"), "min_replicas=1 of 2"),
        (("dist.ddp", "-j", "2x1", "--script", "x.py"), "cluster.nodes=2"),
        (("dist.ddp", "--script", "x.py", "--mounts", "type=bind,src=/a,dst=/b"), "BindMount of /b"),
        (("utils.echo", "--image", "alpine"), "image=alpine"),
        (("dist.ddp", "--script", "x.py", "--env", "RANK=3"), "env: RANK is set by llmops itself"),
    ],
)
def test_what_a_run_has_no_place_for(tmp_path, component, said):
    name, *arguments = component
    with get_runner() as runner, pytest.raises(ComponentValidationException) as caught:
        runner.dryrun_component(name, arguments, "llmops_local", {"runs_url": str(tmp_path / "runs")})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_option_is_refused_where_torchx_lets_it_through(tmp_path):
    with (
        get_runner() as runner,
        pytest.raises(ComponentValidationException, match="llmops_local has no option partition"),
    ):
        runner.dryrun(app(), "llmops_local", {"partition": "low", "runs_url": str(tmp_path)})


def test_a_role_becomes_pods():
    mounts = [specs.BindMount("/data", "/in", read_only=True), specs.VolumeMount("claim", "/out")]
    cluster = prepared(role(mounts=mounts, max_retries=2), queue="team", labels={"a/b": "c"}).config.cluster
    assert (cluster.nodes, cluster.ranks_per_node, cluster.gpus_per_node) == (2, 1, 1)
    assert (cluster.cpus, cluster.memory, cluster.image) == ("4", "8000Mi", "lab/train:1")
    assert [(mount.path, mount.host_path, mount.pvc, mount.read_only) for mount in cluster.mounts] == [
        ("/in", "/data", None, True),
        ("/out", None, "claim", False),
    ]
    assert (cluster.queue, cluster.labels) == ("team", {"a/b": "c"})


def test_ddp_as_pods(torchx):
    where = ("-s", "llmops_k8s", "-cfg", "workload=jobset,namespace=lab,runs_url=s3://bucket/runs")
    shown = torchx.ok("run", "--dryrun", *where, "dist.ddp", "-j", "2x1", "--script", "x.py", "--image", "lab/train:1")
    manifest = shown.partition("=== SCHEDULER REQUEST ===")[2]
    assert "kind: JobSet" in manifest
    assert "parallelism: 2" in manifest


def test_retries_are_those_of_the_role():
    for retries in (0, 2):
        retry = prepared(role(max_retries=retries)).config.retry
        assert (retry.max_failures, retry.max_no_progress) == (retries, retries + 1)
    with pytest.raises(Exception, match="retry_policy=REPLICA"):
        prepared(role(max_retries=1, retry_policy=specs.RetryPolicy.REPLICA))


def test_macros_are_filled_in_whatever_the_program_is():
    changed = role(
        args=["--id", "${app_id}", "--me", "it's ${replica_id}", "--host", "${rank0_env}", "$x", "$${y}"],
        env={"ME": "n${replica_id}", "ID": "${app_id}", "OMP_NUM_THREADS": "3"},
    )
    found = prepared(changed)
    shell, flag, line = found.config.command
    assert (shell, flag) == ("/bin/sh", "-c")
    assert line.startswith('export ME=n"$NODE_RANK"; exec python --id ')
    assert f"--id {found.run_id} --me 'it'\"'\"'s '\"$NODE_RANK\" --host MASTER_ADDR '$x' '${{y}}'" in line
    assert found.config.env["ID"] == found.run_id
    assert found.config.train.threads_per_rank == 3
    plain = prepared(role())
    assert plain.config.command == ["python", "t.py"]


def test_torchrun_is_deaf_to_signals_for_the_whole_job():
    found = prepared(role(entrypoint="bash", args=["-c", "torchrun --nnodes 2 t.py"])).config
    assert found.command == [
        "/bin/sh",
        "-c",
        "trap '' TERM USR1 USR2; exec bash -c 'torchrun --nnodes 2 t.py'",
        "torchrun",
    ]
    assert found.env["PET_SIGNALS_TO_HANDLE"] == "SIGINT,SIGHUP,SIGQUIT"


def test_devices_have_no_place():
    efa = specs.Resource(cpu=1, gpu=0, memMB=100, devices={"vpc.amazonaws.com/efa": 1})
    with pytest.raises(Exception, match=r"devices \(vpc.amazonaws.com/efa\)"):
        prepared(role(resource=efa))


def test_other_keys_and_a_configuration_of_ones_own(tmp_path):
    (tmp_path / "own" / "cluster").mkdir(parents=True)
    (tmp_path / "own/cluster/site.yaml").write_text("defaults: [k8s]\npriority_class: low\n")
    found = prepared(role(), config_dir=str(tmp_path / "own"), cluster="site", set={"stop.hang_s": "60"})
    assert found.config.cluster.priority_class == "low"
    assert found.config.stop.hang_s == 60
    with pytest.raises(Exception, match="is for another backend than local"):
        prepare("local", app(role(image="", num_replicas=1)), {"cluster": "slurm"})
