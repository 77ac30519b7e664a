"""Every refusal is one line that names the key, the value and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]
Own = Callable[..., Path]
S = "cluster=slurm"
K = "cluster=k8s"

CASES = [
    # an unknown key, group or option
    (["recipe=tinny"], "override recipe=tinny: group recipe has no tinny.yaml; did you mean tiny? it has none, tiny"),
    (["model=7"], "did you mean 7b?"),
    (["cluster=lsf"], "it has k8s, local, slurm"),
    (["modle=tiny"], "there is no key modle; did you mean model?"),
    (["train.lrr=1"], "override train.lrr=1: there is no key train.lrr; did you mean train.lr?"),
    (["lr=3"], "did you mean train.lr?"),
    (["train.zzzzzz=3"], "train has max_steps, max_tokens"),
    (["+zzzzzz=3"], "there is no key zzzzzz; a run has name, runs_url"),
    (["++train.max_step=3"], "did you mean train.max_steps?"),
    (["cluster.partition=gpu"], "belongs to cluster=slurm, this run has cluster=local"),
    ([S, "cluster.partitoin=gpu"], "did you mean cluster.partition?"),
    (["recipe/cluster=x"], "recipe/cluster is no group"),
    (["+nope/nope=x"], "there is no key nope/nope"),
    (["+recipe=tiny"], "write it without +"),
    (["recipe=null"], "a run needs this group"),
    (["~cluster"], "a run needs this group"),
    (["cluster=[local]"], "group cluster has no [local].yaml"),
    # a wrong type or value
    (["train.lr=abc"], "override train.lr=abc does not fit: expected a number"),
    (["train.lr="], "expected a number"),
    (["train.lr=-1"], "expected a number > 0"),
    (["train.max_steps=1.5"], "expected a whole number"),
    (["train.max_steps=0"], "expected a whole number >= 1"),
    (["train.deterministic=3"], "expected true or false"),
    (["dist.pp_schedule=gpipe"], "expected 1f1b or interleaved"),
    (["train.dtype=float16"], "expected float32 or bfloat16"),
    (["code=1"], "expected a section of keys"),
    (["code.exclude=x"], "expected a list"),
    (["command=[python,'1',2,[3]]"], "command[2]=2 does not fit: expected text"),
    (["env=[a]"], "override env=[a] does not fit"),
    (["env={A:1}"], "env.A=1 does not fit: expected text"),
    (["cluster.backend=lsf"], "there is no backend lsf; choose local or slurm or k8s"),
    # values inside sections whose keys are the user's
    (
        [K, "cluster.node_selector={a: 1}"],
        "override cluster.node_selector={a: 1}: cluster.node_selector.a=1 does not fit",
    ),
    ([K, "cluster.mounts=[{path: /r, pvcc: x}]"], "there is no key cluster.mounts[0].pvcc; did you mean"),
    ([K, "cluster.mounts=[{pvc: x}]"], "cluster.mounts[0].path has no value"),
    ([K, "cluster.secret_env={A: {secret: b}}"], "cluster.secret_env.A.key has no value"),
    ([K, "cluster.secret_env.A={secret: b, kye: c}"], "there is no key cluster.secret_env.A.kye; did you mean"),
    ([K, "cluster.patches={Job: 3}"], "cluster.patches.Job=3 does not fit: expected a section of keys"),
    ([K, "cluster.security.nonroot=false"], "did you mean cluster.security.non_root?"),
    ([K, "cluster.partition=x"], "belongs to cluster=slurm, this run has cluster=k8s"),
    ([K, "cluster.workload=pod"], "expected auto or job or jobset or pytorchjob or trainjob"),
    (["train.seed=???"], "train.seed has no value"),
    (["~train.lr"], "train.lr has no value"),
    (["~eval.batches", "~train"], "a run needs this group"),
    # a malformed override
    (["foo"], "'foo' is not of the form key=value"),
    (["=3"], "'' is not a key"),
    (["a b=3"], "'a b' is not a key"),
    (["train..lr=3"], "'train..lr' is not a key"),
    (["train.lr=("], "the value '(' cannot be read"),
    (["train.lr=1,2"], "a run takes one value per key"),
    (["train.lr=range(1,3)"], "a run takes one value per key"),
    (["hydra.run.dir=x"], "hydra.* has no effect here"),
    (["model@x=7b"], "write it without @"),
    (["name=\udc80"], "only UTF-8 text without NUL"),
    # interpolations
    (["train.seed=${train.sed}"], "Interpolation key 'train.sed' not found"),
    (["train.seed=${nope:1}"], "Unsupported interpolation type nope"),
    (["name=${oc.env:HOME}"], "name=${oc.env:HOME}: values of the environment are not written into a run"),
    (["+env.X=${oc.env:HOME,none}"], "secrets=[NAME]"),
    (["name=${oc.select:a,${oc.env:HOME}}"], "not written into a run"),
]


@pytest.mark.parametrize(
    ("overrides", "expected"), CASES, ids=[" ".join(case[0]).encode("ascii", "replace").decode() for case in CASES]
)
def test_override(overrides: list[str], expected: str, refused: Refused) -> None:
    assert expected in refused(*overrides)


def test_missing_config_dir(refused: Refused, tmp_path: Path) -> None:
    assert f"--config-dir {tmp_path}/nope: there is no such folder" in refused(config_dir=tmp_path / "nope")
    (tmp_path / "empty").mkdir()
    assert "holds no .yaml file" in refused(config_dir=tmp_path / "empty")


def test_config_dir_adds_options(own: Own) -> None:
    from llmops.config.compose import load_config
    from llmops.config.schema import SlurmCluster

    folder = own(cluster__site="defaults: [slurm, _self_]\npartition: gpu\ntime: 90\nmem: 64000\n")
    cluster = load_config(["cluster=site", "cluster.account=a"], folder).config.cluster
    assert isinstance(cluster, SlurmCluster)
    assert (cluster.partition, cluster.time, cluster.mem, cluster.account) == ("gpu", "90", "64000", "a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "# @package _global_\ndefaults: [local@cluster]\nenv: {on: x}\n",
            "YAML reads a name in env as True, not as text: quote it",
        ),
        ("defaults: [slurm, _self_]\npartition: 12\n", "site.yaml:2: cluster.partition=12 does not fit: expected text"),
        ("defaults: [slurm, _self_]\npartitoin: x\n", "site.yaml:2: there is no key cluster.partitoin; did you mean"),
        (
            "defaults: [slrm, _self_]\n",
            "group cluster has no slrm.yaml; did you mean slurm?",
        ),
        ("defaults: [local, _self_]\npartition: x\n", "site.yaml:2: cluster.partition belongs to cluster=slurm"),
        (
            "backend: slurm\ntime: 2:00:00\n",
            'site.yaml:2: YAML reads 2:00:00 as a number in base 60; quote it: "2:00:00"',
        ),
        ("backend: slurm\npartition: [a\n", "site.yaml:3: "),
        ("backend: slurm\nbackend: local\n", "site.yaml:2: found duplicate key backend"),
        ("\tbackend: slurm\n", "site.yaml:1: "),
        ("- a\n", "site.yaml: holds no keys"),
        ("backend: nope\n", "there is no backend nope"),
        ("defaults: [slurm, _self_]\ncomment: ${oc.env:USER}\n", "values of the environment are not written"),
    ],
)
def test_own_file(text: str, expected: str, own: Own, refused: Refused) -> None:
    assert expected in refused("cluster=site", config_dir=own(cluster__site=text))


def test_own_file_that_would_be_ignored(own: Own, refused: Refused) -> None:
    assert "would ignore this one; give it another name" in refused(config_dir=own(model__tiny="dim: 3\n"))


def test_own_file_with_the_wrong_suffix(own: Own, refused: Refused) -> None:
    folder = own(model__mine="dim: 3\n")
    (folder / "model" / "other.yml").write_text("dim: 3\n")
    assert "rename it to other.yaml" in refused(config_dir=folder)


def test_own_file_that_is_not_text(own: Own, refused: Refused) -> None:
    folder = own(model__mine="dim: 3\n")
    (folder / "model" / "mine.yaml").write_bytes(b"name: \xff\n")
    assert "mine.yaml: not UTF-8 at byte 6" in refused(config_dir=folder)
