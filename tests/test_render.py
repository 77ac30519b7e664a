"""The sbatch script: every option a SLURM user expects, quoted by construction, and containers."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops import api
from llmops.backends.slurm import SlurmBackend
from llmops.errors import UserError
from llmops.launch import Origin, dry_run, job_spec
from llmops.render import render_template, sbatch_options, sbatch_value


@pytest.fixture
def render(tmp_path, monkeypatch):
    """The script for the given overrides, without a cluster to ask."""
    monkeypatch.setattr(SlurmBackend, "check", lambda *_: None)
    monkeypatch.setenv("LLMOPS_CACHE_DIR", str(tmp_path / "cache"))

    def rendered(*overrides, **options):
        script = dry_run(api.prepare(overrides, backend="slurm", runs_url=str(tmp_path / "my runs"), **options))
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return script

    return rendered


OPTIONS = [
    ("cluster.partition=gpu", '--partition="gpu"'),
    ("cluster.account=lab", '--account="lab"'),
    ("cluster.qos=high", '--qos="high"'),
    ("cluster.nodes=3", '--nodes="3"'),
    ("cluster.gpus_per_node=8", '--gpus-per-node="8"'),
    ("cluster.gres=gpu:a100:4", '--gres="gpu:a100:4"'),
    ("cluster.mem=64G", '--mem="64G"'),
    ("cluster.mem_per_cpu=4G", '--mem-per-cpu="4G"'),
    ("cluster.time=1-12:00:00", '--time="1-12:00:00"'),
    ("cluster.constraint=a100&nvlink", '--constraint="a100&nvlink"'),
    ("cluster.exclude=n[1-3],n7", '--exclude="n[1-3],n7"'),
    ("cluster.nodelist=n4", '--nodelist="n4"'),
    ("cluster.reservation=mine", '--reservation="mine"'),
    ("cluster.exclusive=true", "--exclusive"),
    ("cluster.mail_user=me@example.org", '--mail-user="me@example.org"'),
    ("cluster.mail_type=END,FAIL", '--mail-type="END,FAIL"'),
    ('cluster.comment=it\'s "mine" #1', '--comment="it\'s \\"mine\\" #1"'),
    ("cluster.dependency=afterok:17", '--dependency="afterok:17"'),
    ("cluster.extra=[--licenses=foo:2]", "--licenses=foo:2"),
]


@pytest.mark.parametrize(("override", "line"), OPTIONS)
def test_every_option_has_its_line(render, override, line):
    assert f"#SBATCH {line}" in render(override, command=["true"]).splitlines()


def test_what_is_always_there(render):
    lines = render("recipe=tiny").splitlines()
    for line in ("--requeue", '--open-mode="append"', '--ntasks-per-node="1"', '--signal="B:USR1@110"'):
        assert f"#SBATCH {line}" in lines
    assert "trap '' TERM USR1 USR2" in lines
    assert [line for line in lines if line.startswith("exec ")] == [lines[-1]]


def test_setup_lines_come_before_the_program(render):
    script = render('cluster.setup=["module load cuda/12.8","export NCCL_DEBUG=INFO"]')
    assert script.index("module load cuda/12.8\n") < script.index("exec ")


CONTAINERS = [
    (
        "pyxis",
        ["--container-image=/img.sqsh", "--container-mounts={runs}:{runs},/data:/data", "--container-writable"],
        [],
    ),
    (
        "apptainer",
        [],
        ["apptainer", "exec", "--bind", "{runs}", "--bind", "/data:/data", "--container-writable", "/img.sqsh"],
    ),
]


@pytest.mark.parametrize(("runtime", "srun", "wrap"), CONTAINERS)
def test_containers_see_the_run_store_and_bring_their_own_python(render, tmp_path, runtime, srun, wrap):
    image = ["cluster.container.image=/img.sqsh", "cluster.container.mounts=[/data:/data]"]
    overrides = [f"cluster.container.runtime={runtime}", *image, "cluster.container.args=[--container-writable]"]
    script = render(*overrides)
    assert f"exec {sys.executable} " in script
    prepared = api.prepare(overrides, backend="slurm", runs_url=str(tmp_path / "runs"))
    spec = job_spec(prepared, 0, "tag", "config.yaml", Origin())
    runs = str(tmp_path / "runs")
    assert spec.options["srun_args"] == ["--cpus-per-task=1", *(word.format(runs=runs) for word in srun)]
    assert spec.options["wrap"] == [word.format(runs=runs) for word in wrap]
    assert spec.python == "python3"
    assert spec.command[0] == "python3"


def test_a_runs_folder_with_blanks_is_one_word(render, tmp_path):
    words = shlex.split(render("recipe=tiny").splitlines()[-1])
    assert words[words.index("--run") + 1].startswith(f"{tmp_path}/my runs/")


def test_a_template_of_ones_own(render, tmp_path):
    mine = tmp_path / "mine.j2"
    mine.write_text("#!/bin/bash\n#SBATCH --job-name={{ spec.tag | sbatch }}\n# ours\nexec {{ agent | shell }}\n")
    assert "# ours" in render(f"cluster.template={mine}")
    mine.write_text("{{ nosuch }}")
    with pytest.raises(UserError, match="nosuch"):
        render(f"cluster.template={mine}")
    mine.write_text("{% if %}")
    with pytest.raises(UserError, match=r"mine\.j2:1"):
        render(f"cluster.template={mine}")
    with pytest.raises(UserError, match=r"cluster\.template"):
        render("cluster.template=/nonexistent.j2")


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\0b"])
def test_line_breaks_cannot_be_quoted(text):
    with pytest.raises(UserError, match="line break"):
        sbatch_value(text)


@given(st.text(st.characters(blacklist_characters="\n\r\0", blacklist_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_quoting_can_be_undone(text):
    """sbatch takes a backslash as an escape of the next character inside double quotes, and nothing else is special."""
    (option,) = sbatch_options({"comment": text})
    inside = option.removeprefix('--comment="')[:-1]
    found, escaped = [], False
    for character in inside:
        if escaped or character != "\\":
            assert escaped or character != '"'
            found.append(character)
            escaped = False
        else:
            escaped = True
    assert "".join(found) == text


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])))
@settings(max_examples=50, deadline=None)
def test_shell_words_arrive_as_they_were(text):
    with tempfile.NamedTemporaryFile("w", suffix=".j2") as file:
        file.write("printf %s {{ word | shell }}")
        file.flush()
        script = render_template("unused", file.name, {"word": text})
    done = subprocess.run(["bash", "-c", script], capture_output=True)
    assert done.stdout.decode() == text
