"""What was probably meant is said, wherever something is misspelt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmops.backends.slurm_limits import check_limits
from llmops.cli.main import main
from llmops.config.schema import SlurmCluster
from llmops.errors import UserError
from llmops.suggest import close, hint

SUBMIT = ("submit", "--dry-run")
WRONG = [
    (["sumbit"], "there is no verb 'sumbit'; did you mean submit?"),
    (["ckpt", "vrify"], "there is no action 'vrify'; did you mean verify?"),
    (["submit", "--folow"], "unrecognized arguments: --folow; did you mean --follow?"),
    (["submit", "--nmae=x"], "did you mean --name?"),
    (["completion", "bsh"], "SHELL bsh: choose one of bash, zsh, fish; did you mean bash?"),
    (["goodput", "--by", "weeks"], "--by weeks: choose one of run, study, user, backend, week; did you mean week?"),
    (["status", "--state", "runing"], "did you mean running?"),
    (["submit", "--backend", "slrum"], "did you mean slurm?"),
    (["schema", "modle"], "did you mean model?"),
    ([*SUBMIT, "modle=tiny"], "there is no key modle; did you mean model?"),
    ([*SUBMIT, "train.lrr=1"], "did you mean train.lr?"),
    ([*SUBMIT, "model=7B"], "group model has no 7B.yaml; did you mean 7b?"),
    ([*SUBMIT, "model=Llama-3.2-1B"], "did you mean llama3_2_1b?"),
    ([*SUBMIT, "train.dtype=bf16"], "expected float32 or bfloat16; did you mean bfloat16?"),
    ([*SUBMIT, "train.optimizer=AdamW"], "did you mean adamw?"),
    ([*SUBMIT, "train.compile=ture"], "expected true or false; did you mean true?"),
    ([*SUBMIT, "notify.events=[finish]"], "did you mean finished?"),
    ([*SUBMIT, "dist.dp_shard=atuo"], "did you mean auto?"),
    ([*SUBMIT, "cluster.backend=slrm"], "did you mean slurm?"),
    (
        ["sweep", "--dry-run", "train.dtype=float32,bf16"],
        "dtype=bf16 does not fit: expected float32 or bfloat16; did you",
    ),
    (["logs", "tow words"], "did you mean two words?"),
    (["status", "BASE"], "did you mean base?"),
    (["clone", "base", "train.lrr=1"], "there is no key train.lrr; did you mean train.lr?"),
    (["sweep", "best", "lr gird"], "did you mean lr grid?"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_it_is_said(
    arguments: list[str], said: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMOPS_RUNS_URL", str(runs))
    try:
        code = main(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert re.fullmatch(r"llmops: error: [^\n]+\n", error)
    assert said in error


def test_a_partition_is_suggested() -> None:
    sinfo = "gpu*|up|4|8|64000|infinite|1-infinite|(null)\n"
    with pytest.raises(UserError, match=r"did you mean gpu\?"):
        check_limits(SlurmCluster(partition="GPUs"), sinfo)


def test_nothing_is_suggested_for_what_looks_like_nothing() -> None:
    assert close("zzz", ["train", "model"]) == []
    assert hint("zzz", ["train", "model"]) == ""
    assert close("1B", ["1b", "13b"], n=2)[0] == "1b"
    assert close("--", ["--follow", "__"]) == []
