"""SLURM as it answered once, replayed at the process boundary with single settings changed to those of other sites.

``data/slurm-22.05.8.json`` has exit code, output and errors of each command, from the development cluster.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmops.cli.main import main
from llmops.config.compose import load_config
from llmops.config.schema import SlurmCluster
from llmops.sites import machine, slurm, slurm_config

RECORDED: dict[str, list[Any]] = json.loads((Path(__file__).parent / "data" / "slurm-22.05.8.json").read_text())
CONFIG, PARTITIONS, NODES = "scontrol show config", "scontrol -o show partition", "scontrol -o show node"
SUBMIT = "sbatch --test-only --wrap=true"
ASSOC = "sacctmgr -nP show assoc user=llmops cluster=llmops format=account,partition,qos,defaultqos,maxwall"
DEFAULT = "sacctmgr -nP show user llmops format=defaultaccount"
QOS = "sacctmgr -nP show qos format=name,maxwall,gracetime,preemptmode,preempt"
SACCT = "sacct -n -X -P -S now -o jobid"
DEAD = "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)"
REPLAY = """#!{python} -SE
import json, sys
answers = json.load(open({file!r}))
code, out, err = answers.get(" ".join([{name!r}, *sys.argv[1:]]), [64, "", "nobody recorded this"])
sys.stdout.write(out); sys.stderr.write(err); sys.exit(code)
"""

Replay = Callable[..., None]


@pytest.fixture
def replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replay:
    """Puts SLURM's commands on PATH, which answer as recorded, but for ``changes``: an answer, or texts to replace."""

    def make(changes: dict[str, Any] | None = None) -> None:
        answers = {command: list(answer) for command, answer in RECORDED.items()}
        # The controller dates its answer now.
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        answers[CONFIG][1] = re.sub(r"as of \S+", f"as of {now}", answers[CONFIG][1])
        for command, change in (changes or {}).items():
            if isinstance(change, dict):
                for old, new in change.items():
                    assert old in answers[command][1], (command, old)
                    answers[command][1] = answers[command][1].replace(old, new)
            else:
                answers[command] = change
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (tmp_path / "answers.json").write_text(json.dumps(answers))
        for name in ("sbatch", "squeue", "srun", "scancel", "scontrol", "sinfo", "sacct", "sacctmgr"):
            file = folder / name
            file.write_text(REPLAY.format(python=sys.executable, file=str(tmp_path / "answers.json"), name=name))
            file.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    monkeypatch.setenv("LOGNAME", "llmops")
    monkeypatch.setattr(machine, "gpus", lambda timeout: [])
    return make


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the checks of SLURM by name."""
    capsys.readouterr()
    code = main(["doctor", "--backend", "slurm", "--runs-url", "s3://bucket/runs", "--json", *arguments])
    found = json.loads(capsys.readouterr().out)
    return code, {check["name"]: check for check in found["checks"] if check["section"] == "slurm"}


@pytest.fixture(autouse=True)
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmops.sites import doctor as module

    monkeypatch.setattr(module, "_stores", lambda *arguments: [])


def test_the_development_cluster_as_it_was(replay: Replay, capsys: pytest.CaptureFixture[str]) -> None:
    replay()
    code, checks = doctor(capsys)
    assert code == 0
    assert {name for name, check in checks.items() if check["result"] != "ok"} == {"ProctrackType"}
    assert checks["time to save"]["found"].startswith("KILL comes 30 s after TERM (KillWait), so 25 s to save")
    assert checks["preemption: low, short"]["found"].endswith("25 s to save; requeued (PreemptMode=REQUEUE)")
    assert "55 s to save" in checks["preemption: lowgrace"]["found"]
    assert "llmops queues a successor" in checks["preemption: cancel"]["found"]
    assert "never make way" in checks["preemption: high"]["found"]
    assert (
        checks["requeue delay"]["found"] == "a requeued job is held for 121 s (cred_expire=120); llmops cuts it to 5 s"
    )
    assert checks["MaxArraySize"]["found"] == "a sweep may have 1,000 trials in one array"
    assert checks["partitions"]["found"] == "low (default), lowgrace, cancel, short, high"
    assert checks["accounts"]["found"] == "llmops"
    assert "a job would be taken, to start at" in checks["test submission"]["found"]
    assert "same time" in checks["clock"]["found"]


SITES = {
    "a short KillWait": (
        {CONFIG: {"KillWait                = 30 sec": "KillWait                = 10 sec"}},
        "time to save",
        "warn",
        "so 5 s to save",
        "ask for KillWait=25; until then set checkpoint.save_seconds=5 or less",
    ),
    "suspended jobs": (
        {PARTITIONS: {"PreemptMode=CANCEL": "PreemptMode=GANG,SUSPEND"}},
        "preemption: cancel",
        "warn",
        "its jobs are suspended",
        "PreemptMode=REQUEUE",
    ),
    "no preemption": (
        {CONFIG: {"preempt/partition_prio": "preempt/none"}},
        "preemption",
        "ok",
        "no job makes way",
        "",
    ),
    "preemption by QOS": (
        {
            CONFIG: {"preempt/partition_prio": "preempt/qos"},
            QOS: [0, "normal||00:00:00|cluster|\\nspare|1-00:00:00|00:02:00|requeue|\\n".replace("\\n", "\n"), ""],
        },
        "preemption: QOS spare",
        "ok",
        "120 s later (GraceTime) to all, KILL 30 s after that; 145 s to save; requeued",
        "",
    ),
    "the user's signal, as 22.05 has it": (
        {CONFIG: {"SlurmctldParameters     = (null)": "SlurmctldParameters     = idle_on,preempt_send_user_signal"}},
        "send_user_signal",
        "ok",
        "told at once",
        "",
    ),
    "the user's signal, as 23.02 has it": (
        {CONFIG: {"PreemptMode             =": "PreemptParameters = send_user_signal\nPreemptMode             ="}},
        "send_user_signal",
        "ok",
        "told at once",
        "",
    ),
    "control groups": (
        {CONFIG: {"proctrack/linuxproc": "proctrack/cgroup"}},
        "ProctrackType",
        "ok",
        "no process of a job can outlive it",
        "",
    ),
    "process groups": (
        {CONFIG: {"proctrack/linuxproc": "proctrack/pgid"}},
        "ProctrackType",
        "warn",
        "outlive their job",
        "proctrack/cgroup",
    ),
    "no requeue by default": (
        {CONFIG: {"JobRequeue              = 1": "JobRequeue              = 0"}},
        "JobRequeue",
        "ok",
        "0: llmops asks for each of its jobs",
        "",
    ),
    "short credentials": (
        {CONFIG: {"munge/socket\nAuthType": "munge/socket,cred_expire=4\nAuthType"}},
        "requeue delay",
        "ok",
        "held for 5 s (cred_expire=4)",
        "",
    ),
    "a requeue delay": (
        {CONFIG: {"SchedulerParameters     = ": "SchedulerParameters     = requeue_delay=30,"}},
        "requeue delay",
        "ok",
        "held for 30 s (requeue_delay=30); llmops cuts it to 5 s",
        "",
    ),
    "part limits": (
        {CONFIG: {"EnforcePartLimits       = NO": "EnforcePartLimits       = ALL"}},
        "EnforcePartLimits",
        "ok",
        "ALL: sbatch refuses",
        "",
    ),
    "no accounting": (
        {CONFIG: {"accounting_storage/slurmdbd": "accounting_storage/none"}},
        "accounting",
        "warn",
        "SLURM forgets a job 300 s after its end",
        "slurmdbd",
    ),
    "the accounting is down": (
        {SACCT: [1, "", "sacct: error: Problem talking to the database: Connection refused\n"]},
        "accounting",
        "fail",
        "Connection refused",
        "running jobs go on",
    ),
    "no account": (
        {
            CONFIG: {"AccountingStorageEnforce = none": "AccountingStorageEnforce = associations,limits"},
            ASSOC: [0, "", ""],
            DEFAULT: [0, "", ""],
        },
        "accounts",
        "fail",
        "llmops has none",
        "sacctmgr add user llmops",
    ),
    "no default partition": (
        {PARTITIONS: {"Default=YES": "Default=NO"}},
        "partitions",
        "warn",
        "none is the default",
        "set cluster.partition, as low",
    ),
    "all partitions are down": (
        {PARTITIONS: {"State=UP": "State=DOWN"}},
        "partitions",
        "fail",
        "none is up",
        "wait",
    ),
    "an old release": (
        {CONFIG: {"22.05.8": "19.05.5"}},
        "version",
        "warn",
        "older than 20.11",
        "newer SLURM",
    ),
    "a refused submission": (
        {SUBMIT: [1, "", "sbatch: error: Invalid account or account/partition combination specified\n"]},
        "test submission",
        "fail",
        "Invalid account",
        "set cluster.partition, cluster.account or cluster.qos",
    ),
    "a controller that is dead": (
        {CONFIG: [1, "", DEAD]},
        "controller",
        "fail",
        "Unable to contact slurm controller",
        "is the daemon up",
    ),
}  # fmt: skip


@pytest.mark.parametrize("site", SITES)
def test_a_site_that_is_otherwise(replay: Replay, capsys: pytest.CaptureFixture[str], site: str) -> None:
    changes, name, result, found, remedy = SITES[site]
    replay(changes)
    code, checks = doctor(capsys)
    assert checks[name]["result"] == result
    assert found in checks[name]["found"]
    assert remedy in checks[name]["remedy"]
    assert bool(checks[name]["remedy"]) == (result != "ok")
    assert code == (1 if result == "fail" else 0)


def test_many_partitions_of_one_kind_are_one_check(replay: Replay, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, errors = RECORDED[PARTITIONS]
    many = "".join(text.splitlines(keepends=True)[0].replace("=low ", f"=p{number} ") for number in range(100))
    replay({PARTITIONS: [code, many, errors]})
    _, checks = doctor(capsys)
    check = checks["preemption: p0 and 99 more"]
    assert check["found"].endswith(", p98, p99")


@pytest.mark.parametrize(
    ("state", "usable"),
    [
        *(("IDLE", True), ("MIXED", True), ("ALLOCATED", True), ("IDLE+CLOUD+POWERED_DOWN", True)),
        *(("DOWN*", False), ("IDLE+DRAIN", False), ("MIXED+DRAIN", False), ("FUTURE", False)),
    ],
)
def test_which_nodes_count(state: str, usable: bool) -> None:
    text = RECORDED[NODES][1].replace("State=IDLE", f"State={state}")
    assert {node.usable for node in slurm.parse_nodes(text)} == {usable}


def test_the_time_to_save_is_held_against_the_configuration(replay: Replay, capsys: pytest.CaptureFixture[str]) -> None:
    replay()
    _, checks = doctor(capsys, "checkpoint.save_seconds=40")
    told = {name: check["result"] for name, check in checks.items() if "save" in check["found"]}
    assert told["time to save"] == told["preemption: low, short"] == told["preemption: cancel"] == "warn"
    assert told["preemption: lowgrace"] == "ok"
    assert "KillWait=45" in checks["time to save"]["remedy"]


def test_a_controller_whose_clock_is_wrong(replay: Replay, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, errors = RECORDED[CONFIG]
    replay({CONFIG: [code, re.sub(r"as of \S+", "as of 2026-01-31T12:00:00", text), errors]})
    code, checks = doctor(capsys)
    assert (code, checks["clock"]["result"]) == (1, "fail")


# --- init ------------------------------------------------------------------------------------------------------------

GPUS = {
    CONFIG: {
        "ClusterName             = llmops": "ClusterName             = Big Site",
        "MaxArraySize            = 1001": "MaxArraySize            = 30001",
    },
    NODES: {
        "CPUEfctv=2 CPUTot=2": "CPUEfctv=62 CPUTot=64",
        "ActiveFeatures=(null) Gres=(null)": "ActiveFeatures=h100,ib Gres=gpu:h100:4(S:0-1),nvme:1",
        "RealMemory=4000": "RealMemory=512000",
        "Partitions=low,lowgrace,cancel,short,high": "Partitions=gpu",
    },
    PARTITIONS: {
        "PartitionName=lowgrace": "PartitionName=gpu",
        "DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=30": "DefaultTime=01:00:00 GraceTime=30",
        "MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-4] "
        "PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE "
        "PreemptMode=REQUEUE State=UP TotalCPUs=8 TotalNodes=4": "MaxNodes=2 MaxTime=2-00:00:00 State=UP",
    },
    # Two accounts, of which the default one is told by the other command; a QOS with a limit of its own.
    ASSOC.replace("llmops format", "Big Site format"): [0, "other||normal|normal|\nteam||long,normal|long|\n", ""],
    DEFAULT: [0, "team\n", ""],
    QOS: [0, "normal||00:00:00|cluster|\nlong|1-12:00:00|00:00:00|cluster|\n", ""],
}  # fmt: skip


def written(tmp_path: Path, *arguments: str) -> tuple[str, SlurmCluster, list[str]]:
    """The text, what a run would get of it, and all that init printed."""
    path = tmp_path / "conf" / "cluster" / "ours.yaml"
    assert main(["init", "--output", str(path), *arguments]) == 0
    cluster = load_config(["cluster=ours", "recipe=tiny", "train.micro_batch_size=1"], tmp_path / "conf").config.cluster
    assert isinstance(cluster, SlurmCluster)
    return path.read_text(), cluster, path.read_text().splitlines()


@pytest.fixture(autouse=True)
def no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


def test_init_takes_the_partition_with_the_gpus(
    replay: Replay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay(GPUS)
    text, cluster, lines = written(tmp_path)
    assert (cluster.partition, cluster.account, cluster.qos) == ("gpu", "team", None)
    assert (cluster.nodes, cluster.ranks_per_node, cluster.gpus_per_node, cluster.cpus_per_rank) == (1, 4, 4, 15)
    assert cluster.time == "1-12:00:00"  # of the account's default QOS, shorter than the partition's
    assert (
        'partition: "gpu"  # 4 nodes of 62 CPUs, 500 GiB, 4 x h100, at most 2-00:00:00, at most 2 nodes a job' in lines
    )
    assert '# gres: "gpu:h100:4"  # instead of gpus_per_node, for this type alone' in lines
    assert '# partition: "cancel"  # no nodes, no time limit' in lines
    assert '# account: "other"' in lines
    assert '# qos: "long"  # at most 1-12:00:00' in lines
    assert "features of these nodes are h100, ib" in text
    assert "a stopped run has 55 s to save" in text
    assert "30,000 trials" in text
    out = capsys.readouterr().out
    assert f"llmops submit --config-dir {tmp_path}/conf cluster=ours recipe=tiny train.micro_batch_size=1" in out


def test_init_without_accounting_and_gpus(replay: Replay, tmp_path: Path) -> None:
    refused = [1, "", "sacctmgr: error: Sending PersistInit msg: Connection refused\n"]
    replay({ASSOC: refused})
    text, cluster, _ = written(tmp_path, "--backend", "slurm")
    assert (cluster.partition, cluster.account, cluster.ranks_per_node, cluster.time) == ("low", None, 1, None)
    assert "the accounting does not tell" in text
    assert "no GPUs here" in text
    assert "job gets all of a node's" in text


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({"AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES": "AllowAccounts=vip Default=YES"}, "lowgrace"),
        ({"Default=YES QoS=N/A": "Default=YES DenyAccounts=llmops QoS=N/A"}, "lowgrace"),
        ({"Default=YES": "Default=NO"}, "low"),
        ({"PreemptMode=REQUEUE State=UP TotalCPUs": "PreemptMode=REQUEUE State=DOWN TotalCPUs"}, "cancel"),
    ],
)
def test_init_chooses_what_the_user_may_use(
    replay: Replay, tmp_path: Path, changes: dict[str, str], chosen: str
) -> None:
    replay({PARTITIONS: changes})
    assert written(tmp_path)[1].partition == chosen


def test_init_where_nothing_may_be_used_or_nobody_answers(
    replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    replay({PARTITIONS: {"State=UP": "State=DOWN"}})
    assert main(["init"]) == 2
    replay({CONFIG: [1, "", DEAD]})
    assert main(["init"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "no partition is up that llmops may use (there are: low, lowgrace" in first
    assert "Unable to contact slurm controller" in second
    assert not (tmp_path / "conf").exists()


def test_init_writes_by_the_clusters_name_once(
    replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    replay(GPUS)
    assert main(["init"]) == 0
    path = tmp_path / "conf" / "cluster" / "Big-Site.yaml"
    first = path.read_text()
    assert "# Use: llmops submit --config-dir conf cluster=Big-Site recipe=tiny" in first
    assert main(["init"]) == 2
    assert "is there already; add --force" in capsys.readouterr().err
    path.write_text("mine")
    assert main(["init", "--force"]) == 0
    assert path.read_text() == first


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu:8", {"": 8}),
        ("gpu:h100:8(S:0-1)", {"h100": 8}),
        ("gpu:a100:4(S:0-1),gpu:a100_3g.20gb:2,nvme:1", {"a100": 4, "a100_3g.20gb": 2}),
        ("nvme:1,gpu:2(IDX:0-1)", {"": 2}),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: dict[str, int]) -> None:
    assert slurm.parse_gpus(gres) == gpus


def test_a_limit_is_written_as_sbatch_reads_it() -> None:
    for limit in (1, 59, 600, 3600, 86399, 86400, 10 * 86400 + 3661):
        assert slurm.seconds(slurm_config._limit(limit)) == limit
