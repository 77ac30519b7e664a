"""Rules that span several keys."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from llmops.config.compose import load_config
from llmops.config.recompose import recompose
from llmops.config.schema import RunConfig, time_limit_seconds, warning_seconds
from llmops.errors import UserError

Check = Callable[[list[str]], RunConfig]
S = "cluster=slurm"
OWN = "command=[python,train.py]"

CASES = [
    (["name=''"], "name='': must be 1 to 100 printable"),
    (["name='a\nb'"], "printable"),
    (["runs_url=''"], "runs_url is empty"),
    (["command=['']"], "its first word, the program, is empty"),
    # the trainer's own rules, with the number of ranks
    (["model.n_heads=3"], "model.n_heads=3 does not divide model.dim=128"),
    (["cluster.ranks_per_node=2"], "dist.mode=single runs on one rank, not 2"),
    ([S, "dist.mode=fsdp", "cluster.nodes=3"], "train.global_batch_size=64 is not a multiple"),
    (["cluster.nodes=2", "dist.mode=fsdp"], "cluster=local is one machine"),
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
]


@functools.cache
def base(backend: str) -> str:
    return load_config([f"cluster={backend}"]).yaml_text


@pytest.fixture
def check() -> Check:
    """Check the default configuration of a backend with some keys changed, without composing each."""
    return lambda changes: recompose(base("slurm" if S in changes else "local"), [c for c in changes if c != S]).config


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


def test_warning_leaves_room_to_save(check: Check) -> None:
    assert warning_seconds(check([S, "checkpoint.save_seconds=30.5"])) == 121
    assert warning_seconds(check([S, "cluster.signal_s=45"])) == 45
