"""What ``llmops init`` writes: text stays text, a file is never replaced unasked, and never half written."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llmops.cli.main import main
from llmops.errors import ClusterError, UserError
from llmops.sites import write
from llmops.sites.write import Draft, Line

NASTY = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [
        "${oc.env:HOME}",
        "\\${x}",
        "a: b # c",
        "1:30:00",
        "2024-01-01",
        "null",
        "yes",
        "",
        " ",
        "'\"",
        "a\nb",
        "\x85\u2028",
    ]
)


@given(NASTY)
@settings(max_examples=300)
def test_text_comes_back_as_it_was_whatever_it_is(value: str) -> None:
    text = write.text(Draft("slurm", "x", ["head"], [Line("key", value), Line("more", {"k": [value]}), Line("n", 3)]))
    loaded = OmegaConf.create(yaml.safe_load(text))
    assert loaded.n == 3
    if value == "???":  # OmegaConf's own mark of what is missing
        return
    assert loaded.key == value
    assert loaded.more.k[0] == value


@given(NASTY, NASTY)
@settings(max_examples=300)
def test_a_comment_never_becomes_a_value(comment: str, value: str) -> None:
    lines = [Line("key", "v", comment, [write.other("o", value, comment)]), Line(comment=comment), Line("last", 1)]
    text = write.text(Draft("slurm", "x", [comment], lines))
    assert yaml.safe_load(text) == {"defaults": ["slurm", "_self_"], "key": "v", "last": 1}


def test_a_file_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "conf" / "cluster" / "ours.yaml"
    write.save(path, "first\n", force=False)
    with pytest.raises(UserError, match="is there already; add --force"):
        write.save(path, "second\n", force=False)
    assert path.read_text() == "first\n"
    write.save(path, "third\n", force=True)
    assert path.read_text() == "third\n"
    assert [each.name for each in path.parent.iterdir()] == ["ours.yaml"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("ours.yaml", "lies in a folder called cluster"),
        ("conf/cluster/ours.yml", "only .yaml files are read"),
        ("conf/cluster/o urs.yaml", "use letters"),
        ("elsewhere/cluster/slurm.yaml", "ships cluster/slurm.yaml"),
    ],
)
def test_a_place_that_no_run_would_find_is_refused(
    output: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--backend", "slurm", "--output", output]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_what_makes_no_configuration_is_never_written() -> None:
    with pytest.raises(ClusterError, match="nothing was written"):
        write.check(Draft("slurm", "x", [], [Line("no_such_key", 1)]), "x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "local"], "choose slurm or k8s"),
        (["--backend", "slurm", "--image", "a/b"], "is for --backend k8s"),
        ([], "neither SLURM's commands nor a kubeconfig"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(["init", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize("told", ["slurm", "My Cluster (prod)", "arn:aws:eks:eu-1:42:cluster/x", "", "--", "ünï"])
def test_a_name_of_the_option_is_made_of_the_clusters(told: str) -> None:
    name = write.safe_name(told, "site")
    assert write.NAME.fullmatch(name)
    assert set(name) <= {*string.ascii_letters, *string.digits, "-", "_"}
    assert name not in ("slurm", "k8s", "local")
