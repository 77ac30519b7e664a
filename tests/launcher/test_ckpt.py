"""``llmops ckpt``: what it shows, what it finds, and that it removes nothing which anybody needs."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from llm.checkpoint import retention
from llm.checkpoint.format import MANIFEST, Commit
from llm.checkpoint.leases import LeaseRecord, lease
from llm.checkpoint.lineage import commits, folders
from llm.checkpoint.tags import add_tag
from llm.utils.storage import open_storage
from llmops.agent.local import start_ticks
from llmops.cli.ckpt import ACTIONS
from llmops.cli.main import main
from llmops.monitor.checkpoints import size
from tests.checkpoint.maker import make_commit, split_rows
from tests.conftest import RunMaker
from tests.launcher.harness import LLMOPS, TREE

TENSORS = {
    "layers.10.weight": np.arange(4096, dtype=np.float32).reshape(64, 64),
    "layers.2.weight": np.arange(64, dtype=np.int64),
    "scale": np.array(2.5),
}
ALIVE = f"{socket.gethostname()}:{os.getpid()}:{start_ticks(os.getpid())}"
GONE = f"{socket.gethostname()}:4194305:1"


class Made:
    """A run with checkpoints: attempt 0 commits 10, 20, 30 and goes on to 40; attempt 1 forks at 30, to 40 and 50.

    Attempt 1 also has a folder for step 60 that was never committed.
    """

    def __init__(self, runs, name="demo", job_id=GONE):
        self.runs = runs
        self.made = RunMaker(str(runs))(name, backend="local")
        self.made.submission(backend="local", job_id=job_id)
        self.url = self.made.store.url
        self.storage = open_storage(self.url)
        self.chain = []
        self.made.start(0, job_id=job_id)
        for step in (10, 20, 30):
            self.commit(step, 0)
        self.zombie = self.commit(40, 0)
        self.chain.pop()
        self.made.end(0, "preempted", "requeue")
        self.made.start(1, resume=self.chain[-1].path, job_id=job_id)
        for step in (40, 50):
            self.commit(step, 1)
        self.debris = Commit(attempt=1, generation=0, step=60)
        self.storage.write(f"{self.debris.path}/rank00000-000.safetensors", b"x" * 1000)

    def commit(self, step, attempt, **state):
        parent = self.chain[-1].path if self.chain else None
        values = {"step": step, "loss": 100.0 / step, "data": {"position": step * 8}, **state}
        commit = make_commit(
            self.storage, step, split_rows(TENSORS, 2 + attempt), attempt=attempt, parent=parent, state=values
        )
        self.chain.append(commit)
        return commit

    def lease(self, commit, expires=600.0, name="x"):
        record = LeaseRecord(commit=commit.path, expires=time.time() + expires, by="gpu7:4711")
        self.storage.create(f"leases/{name}.json", msgspec.json.encode(record))


@pytest.fixture
def run(tmp_path):
    """The run, over: its job is gone."""
    return Made(tmp_path / "runs")


@pytest.fixture
def live(tmp_path):
    """The same run while attempt 1 is at work: its job is this process."""
    return Made(tmp_path / "runs", job_id=ALIVE)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs ``llmops ckpt`` in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setenv("LLMOPS_RUNS_URL", str(tmp_path / "runs"))
        capsys.readouterr()
        try:
            code = main(["ckpt", *map(str, arguments)])
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return run


def one_line(stderr):
    assert re.fullmatch(r"llmops: error: [^\n]+\n", stderr), stderr
    return stderr


def names(storage):
    return [each.path.removeprefix("checkpoints/") for each in folders(storage)]


# Listing


def test_ls_tells_what_counts_and_what_does_not(run, call):
    add_tag(run.storage, run.chain[1], "good")
    add_tag(run.storage, run.chain[1], "before-the-spike")
    run.lease(run.chain[3])
    code, out, err = call("ls", "demo")
    assert (code, err) == (0, "")
    header, *rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert header == ["STEP", "COMMIT", "LINEAGE", "AGE", "SIZE", "RANKS", "LAYOUT", "SAVE", "LOSS", "PARENT", "NOTES"]
    assert [row[:3] for row in rows] == [
        ["10", "0000-0000", "● yes"],
        ["20", "0000-0000", "● yes"],
        ["30", "0000-0000", "● yes"],
        ["40", "0000-0000", "○ no"],
        ["40", "0001-0000", "● yes"],
        ["50", "0001-0000", "● latest"],
        ["60", "0001-0000", "· -"],
    ]
    assert rows[1][5:] == ["2", "dp=2", "0.5s", "5", "step_00000010/0000-0000", "before-the-spike, good"]
    assert rows[4][-1] == "being read by gpu7:4711"
    assert rows[6][3:6] == ["-", "1 kB", "-"]
    assert rows[6][-1] == "never committed"


KEYS = {
    *("path", "step", "attempt", "generation", "state", "problem", "latest", "lineage", "tags", "readers", "bytes"),
    *("time", "seconds", "world_size", "mesh", "parent", "code", "metrics"),
}


def test_json_is_alone_on_stdout_and_has_the_documented_keys(run, call):
    documented = (TREE / "docs/checkpoints.md").read_text().split("## `ls --json`")[1].split("##")[0]
    assert set(re.findall(r"`([a-z_]+)`", documented)) >= KEYS
    code, out, err = call("ls", "demo", "--json")
    assert (code, err) == (0, "")
    listed = json.loads(out)
    assert all(set(each) == KEYS for each in listed)
    assert [each["state"] for each in listed] == ["committed"] * 6 + ["debris"]
    assert [each["latest"] for each in listed].index(True) == 5
    assert listed[4]["parent"] == run.chain[2].path
    assert listed[5]["metrics"]["loss"] == 2.0
    page = json.loads(call("show", "demo@20", "--json")[1])
    assert set(page) == {*KEYS, "url", "state", "parts", "tensors"}
    assert page["tensors"]["layers.10.weight"] == {
        "dtype": "F32", "shape": [64, 64], "placement": "", "pieces": 2, "values": 4096, "bytes": 16384,
    }  # fmt: skip


def test_a_live_attempts_folder_is_no_debris(live, call):
    assert [each["state"] for each in json.loads(call("ls", "demo", "--json")[1])][-1] == "unfinished"
    assert "may be at work" in call("ls", "demo")[1]


def test_ls_of_commits_that_cannot_be_read(run, call):
    run.storage.replace(f"{run.chain[0].path}/{MANIFEST}", b'{"format":1}')
    run.storage.replace(f"{run.chain[-1].path}/{MANIFEST}", b'{"format":2')
    listed = json.loads(call("ls", "demo", "--json")[1])
    assert [each["state"] for each in listed] == ["unreadable", *["committed"] * 4, "unreadable", "debris"]
    assert "has format 1" in listed[0]["problem"]
    assert [each["lineage"] for each in listed] == [True, True, True, False, True, True, False]
    assert listed[5]["latest"]
    out = call("ls", "demo")[1]
    assert "manifest.json is damaged" in out
    assert "manifest.json has format 1" in out
    code, _, err = call("show", "demo")
    assert code == 1
    assert "is damaged" in one_line(err)


def test_a_run_without_checkpoints(tmp_path, call):
    RunMaker(str(tmp_path / "runs"))("empty")
    assert call("ls", "empty") == (0, "no checkpoints\n", "")
    assert call("ls", "empty", "--json") == (0, "[]\n", "")
    for action in (["show", "empty"], ["verify", "empty"], ["verify", "--all", "empty"], ["rm", "empty@1"]):
        code, out, err = call(*action)
        assert (code, out) == (2, "")
        assert "has no committed checkpoints" in one_line(err)
    assert call("gc", "empty") == (0, "nothing to remove\n", "")


def test_what_was_kept_before_a_gap_is_on_the_lineage(run, call):
    retention.remove(run.storage, run.chain[2])
    listed = json.loads(call("ls", "demo", "--json")[1])
    assert [(each["step"], each["lineage"]) for each in listed][:4] == [(10, True), (20, True), (40, False), (40, True)]
    assert "10" not in call("gc", "demo")[1].replace("1000", ""), "only the fork's leftovers would go"


# Naming


def test_every_way_to_name_a_checkpoint(run, call):
    add_tag(run.storage, run.chain[1], "good")
    inside = f"{run.url}/{run.chain[1].path}"
    prefix = Path(run.url).name[:20]
    for ref in (
        "demo@20", "dem@20", f"{prefix}@20", f"{run.url}@20", f"file://{run.url}@20", "demo@good", f"{run.url}@good",
        "demo@step_00000020/0000-0000", "demo@20/0000-0000", "demo@checkpoints/step_00000020/0000-0000",
        inside, f"{inside}/", f"file://{inside}",
    ):  # fmt: skip
        code, out, err = call("show", ref, "--json")
        assert (code, err) == (0, ""), ref
        assert json.loads(out)["path"] == run.chain[1].path, ref
    for ref in ("demo", "demo@latest", "demo@50", run.url, f"{run.url}/"):
        assert json.loads(call("show", ref, "--json")[1])["step"] == 50, ref
    # Of two commits of one step the one that counts; the other by its full name.
    assert json.loads(call("show", "demo@40", "--json")[1])["attempt"] == 1
    assert json.loads(call("show", "demo@40/0000-0000", "--json")[1])["attempt"] == 0


def test_a_path_with_an_at_and_one_relative_to_here(run, call, tmp_path, monkeypatch):
    moved = tmp_path / "me@home"
    Path(run.url).rename(moved)
    assert json.loads(call("show", moved, "--json")[1])["step"] == 50
    assert json.loads(call("show", f"{moved}@20", "--json")[1])["step"] == 20
    monkeypatch.chdir(moved)
    assert json.loads(call("show", ".@20", "--json")[1])["step"] == 20
    assert call("ls", ".")[0] == 0


BAD = [
    (["ls"], "required: RUN|URL"),
    ([], "required: ACTION"),
    (["shw"], "there is no action 'shw'; did you mean show?"),
    (["ls", "nobody"], "there is no run 'nobody'"),
    (["ls", "demo@10"], "ls lists all of a run"),
    (["ls", "/nonexistent"], "is no run directory"),
    (["ls", "{tmp}"], "is no run directory"),
    (["ls", "ftp://host/run"], "no exclusive create"),
    (["ls", "s3://"], "bucket is missing"),
    (["ls", "@10"], "write RUN@STEP"),
    (["ls", "~no-such-user/x"], "no home directory"),
    (["ls", "x" * 300 + "/y"], "File name too long"),
    (["ls", "\udcff/x"], "is no run directory"),
    (["ls", "{tmp}/runs/notes.txt"], "is no run directory"),
    (["show", "demo@"], "write RUN@STEP"),
    (["show", "demo@35"], "no checkpoint of step 35; the nearest: 30, 40, 50"),
    (["show", "demo@" + "9" * 5000], "has no tag 999"),
    (["show", "demo@nope"], "has no tag nope; it has none"),
    (["show", "demo@60"], "no checkpoint of step 60"),
    (["show", "demo@40/0007-0000"], "the nearest: step_00000040/0000-0000, step_00000040/0001-0000, step_000000"),
    (["show", "demo", "--all", "--json"], "not allowed with"),
    (["verify", "demo@10", "--all"], "name none after the @"),
    (["diff", "demo@10"], "required"),
    (["diff", "demo@10", "@11"], "no checkpoint of step 11"),
    (["gc", "demo@10"], "gc is for a whole run"),
    (["gc", "demo", "--keep-last", "0"], "--keep-last is 0: give 1 or more"),
    (["gc", "demo", "--keep-every", "-5"], "--keep-every is -5: give 1 or more"),
    (["gc", "demo", "--keep-best", "loss"], "--keep-best is 'loss': write METRIC:min"),
    (["gc", "demo", "--keep-last", "few"], "invalid int value"),
    (["rm", "demo"], "say which checkpoint, as in demo@STEP"),
    (["rm", "demo@10"], "nothing was removed; --yes removes without asking"),
    (["rm", "demo@50", "--yes"], "is the newest commit, which the run resumes from; --force"),
    (["rm", "demo@10", "demo@11", "--yes"], "no checkpoint of step 11"),
    (["tag", "demo@10"], "required: NAME"),
    (["tag", "demo@10", "a/b"], "cannot be a tag"),
    (["tag", "demo@10", "100"], "cannot be a tag"),
    (["tag", "--delete", "demo", "nope"], "there is no tag nope"),
    (["tag", "--delete", "demo@10", "nope"], "leave out what follows the @"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=[" ".join(row[0])[:40].encode("unicode_escape") for row in BAD]
)
def test_bad_input_is_one_line_and_changes_nothing(run, call, tmp_path, arguments, message):
    (tmp_path / "runs/notes.txt").touch()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    code, _, err = call(*(text.format(tmp=tmp_path) for text in arguments))
    assert code == 2
    assert message in one_line(err)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_step_off_the_lineage_that_means_several(run, call):
    make_commit(run.storage, 45, split_rows(TENSORS, 1), attempt=0, generation=1, parent=run.zombie.path)
    assert json.loads(call("show", "demo@45", "--json")[1])["generation"] == 1
    make_commit(run.storage, 45, split_rows(TENSORS, 1), attempt=0, generation=2, parent=run.zombie.path)
    code, _, err = call("show", "demo@45")
    assert code == 2
    assert "step 45 means 2 checkpoints: step_00000045/0000-0001, step_00000045/0000-0002" in one_line(err)


# Checking


def test_verify(run, call):
    code, out, err = call("verify", "demo")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"step_00000050/0001-0000  ok  [\d.]+ kB, 3 tensors, [\d.]+ .?B/s\n", out)
    assert call("verify", "demo@20")[0] == 0
    assert run.storage.list("leases") == []
    path = run.storage.path(f"{run.chain[1].path}/rank00000-000.safetensors")
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    assert call("verify", "demo")[0] == 0
    code, out, err = call("verify", "demo@20")
    assert (code, err) == (1, "")
    assert "DAMAGED" in out
    assert re.search(
        r"^  rank00000-000\.safetensors: tensor layers\.10\.weight has a block damaged, from byte \d+", out, re.M
    )
    code, out, _ = call("verify", "--all", "demo")
    assert code == 1
    assert [line.split()[1] for line in out.splitlines() if line.startswith("step_")] == ["ok", "DAMAGED", *["ok"] * 4]


def test_verify_of_what_it_cannot_read(run, call):
    run.storage.replace(f"{run.chain[0].path}/{MANIFEST}", b'{"format":1}')
    code, out, err = call("verify", "--all", "demo")
    assert (code, err) == (1, "")
    assert "NOT VERIFIED" in out
    assert "has format 1" in out
    assert out.count(" ok ") == 5
    code, _, err = call("verify", "demo@10")
    assert code == 2
    assert "has format 1" in one_line(err)
    run.storage.replace(f"{run.chain[0].path}/{MANIFEST}", b'{"format":')
    code, out, err = call("verify", "demo@10")
    assert (code, err) == (1, "")
    assert "  manifest.json: is damaged" in out


# The superuser may do everything: without its capabilities it is as anybody else.
AS_ANYBODY = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []


def test_a_run_of_somebody_else_is_read_and_not_changed(run, tmp_path):
    def shell(*arguments):
        return subprocess.run(
            [*AS_ANYBODY, *LLMOPS, "ckpt", *arguments],
            env={**os.environ, "LLMOPS_RUNS_URL": str(tmp_path / "runs")},
            text=True,
            capture_output=True,
            cwd=TREE,
        )

    root = Path(run.url)
    places = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for path in places:
        path.chmod(0o500)
    try:
        assert shell("verify", "demo").returncode == 0
        for arguments in (["tag", "demo", "mine"], ["rm", "demo@10", "--yes"], ["gc", "demo", "--yes"]):
            done = shell(*arguments)
            assert done.returncode == 1
            assert "ermission denied" in one_line(done.stderr)
        (root / "checkpoints").chmod(0)
        for arguments in (["ls", "demo"], ["ls", run.url], ["verify", run.url], ["gc", "demo", "--yes"]):
            done = shell(*arguments)
            assert done.returncode == 1
            assert "ermission denied" in one_line(done.stderr)
    finally:
        for path in places:
            path.chmod(0o700)
    assert len(commits(run.storage)) == 6


def test_diff(run, call):
    code, out, err = call("diff", "demo@30", "@50")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "world_size: 2 -> 3",
        'mesh: {"dp": 2} -> {"dp": 3}',
        "state.data.position: 240 -> 400",
        "state.loss: 3.3333333333333335 -> 2.0",
        "state.step: 30 -> 50",
        "3 tensors have the same type and shape; --values compares what is in them",
    ]
    assert call("diff", "--values", "demo@30", "@50")[1].splitlines()[-1] == "3 of 3 tensors have the same values"
    changed = {**TENSORS, "scale": np.array(2.0), "new": np.zeros(3, np.float16)}
    changed["layers.2.weight"] = changed["layers.2.weight"].astype(np.int32)
    make_commit(run.storage, 70, split_rows(changed, 1), attempt=1, parent=run.chain[-1].path)
    lines = call("diff", "--values", "demo@50", f"{run.url}@70")[1].splitlines()
    assert lines[-4:] == [
        "tensor layers.2.weight: I64 [64] -> I32 [64]",
        "tensor new: added: F16 [3]",
        "tensor scale: other values",
        "1 of 2 tensors have the same values",
    ]


# Removing


def test_gc_shows_and_removes_only_when_told(run, call):
    run.lease(run.chain[0], expires=-1000.0, name="old")
    before = names(run.storage)
    code, out, err = call("gc", "demo", "--keep-last", "2")
    assert (code, err) == (0, "")
    assert names(run.storage) == before
    assert [line.split()[0] for line in out.splitlines()[1:6]] == [
        "step_00000010/0000-0000",
        "step_00000020/0000-0000",
        "step_00000030/0000-0000",
        "step_00000040/0000-0000",
        "step_00000060/0001-0000",
    ]
    assert "no rule keeps it" in out
    assert "is not on the lineage" in out
    assert "was never committed" in out
    assert "and 1 expired lease" in out
    assert re.search(r"^5 checkpoints, [\d.]+ kB, would go, 2 stay; --yes removes$", out, re.M)
    code, out, _ = call("gc", "demo", "--keep-last", "2", "--yes")
    assert code == 0
    assert out.count("removed step_") == 5
    assert names(run.storage) == ["step_00000040/0001-0000", "step_00000050/0001-0000"]
    assert run.storage.list("leases") == []
    assert call("gc", "demo", "--keep-last", "2") == (0, "nothing to remove\n", "")
    assert call("verify", "--all", "demo")[0] == 0


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ([], [10, 20, 30, 40, 50]),
        (["--keep-last", "1"], [50]),
        (["--keep-every", "20"], [20, 40, 50]),
        (["--keep-best", "loss:max"], [10, 50]),
        (["--keep-last", "2", "--keep-best", "data.position:min", "--keep-every", "30"], [10, 30, 40, 50]),
    ],
)
def test_gc_rules(run, call, rules, left):
    assert call("gc", "demo", *rules, "--yes")[0] == 0
    assert [each.step for each in folders(run.storage)] == left


def test_gc_leaves_what_is_tagged_read_or_cannot_be_read(run, call):
    add_tag(run.storage, run.chain[0], "good")
    add_tag(run.storage, run.zombie, "off-the-lineage")
    run.storage.replace(f"{run.chain[2].path}/{MANIFEST}", b'{"format":1}')
    with lease(run.storage, run.chain[1]):
        assert call("gc", "demo", "--keep-last", "1", "--yes")[0] == 0
    assert names(run.storage)[:4] == [
        "step_00000010/0000-0000",
        "step_00000020/0000-0000",
        "step_00000030/0000-0000",
        "step_00000040/0000-0000",
    ]
    assert len(names(run.storage)) == 5


def test_gc_leaves_the_files_of_an_attempt_that_may_be_at_work(live, call):
    assert call("gc", "demo", "--keep-last", "1", "--yes")[0] == 0
    assert names(live.storage) == ["step_00000040/0001-0000", "step_00000050/0001-0000", "step_00000060/0001-0000"]
    live.made.end(1, "failed")
    assert call("gc", "demo", "--keep-last", "1", "--yes")[0] == 0
    assert names(live.storage) == ["step_00000050/0001-0000"]


def test_gc_leaves_what_a_new_attempt_has_resumed_from(run, call):
    """The newest commit was damaged, say: attempt 2 went back behind it and has committed nothing yet."""
    run.made.start(2, resume=run.chain[1].path, job_id=GONE)
    assert call("gc", "demo", "--keep-last", "1", "--yes")[0] == 0
    assert names(run.storage) == ["step_00000020/0000-0000", "step_00000050/0001-0000"]


def test_gc_of_a_folder_that_nobody_keeps_records_of(run, call, tmp_path):
    """Copied, or written without the launcher: the newest attempt may be at work."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (Path(run.url) / "checkpoints").rename(bare / "checkpoints")
    assert call("gc", bare, "--keep-last", "1", "--yes")[0] == 0
    assert names(open_storage(str(bare))) == [
        "step_00000040/0001-0000",
        "step_00000050/0001-0000",
        "step_00000060/0001-0000",
    ]


def test_gc_stops_at_a_tag_that_cannot_be_read(run, call):
    run.storage.write("tags/bad.json", b"{")
    code, out, err = call("gc", "demo", "--keep-last", "1", "--yes")
    assert (code, out) == (2, "")
    assert "tags/bad.json cannot be read" in one_line(err)
    assert "tags/bad.json cannot be read" in call("ls", "demo")[1]
    assert call("tag", "--delete", "demo", "bad") == (0, "bad is no tag any more\n", "")
    assert call("gc", "demo", "--keep-last", "1", "--yes")[0] == 0


def test_rm(run, call):
    code, out, err = call("rm", "demo@10", "demo@40/0000-0000", "demo@10", "--yes")
    assert (code, err) == (0, "")
    assert out.count("removed step_") == 2
    assert [each.step for each in commits(run.storage)] == [20, 30, 40, 50]
    assert call("rm", "demo@60", "--yes")[0] == 0
    assert names(run.storage)[-1] == "step_00000050/0001-0000"


def test_rm_refuses_what_is_in_use_unless_forced(live, call):
    add_tag(live.storage, live.chain[0], "good")
    live.lease(live.chain[1])
    refused = {
        "demo@10": "is tagged good",
        "demo@20": "is being read by gpu7:4711",
        "demo@40": "belongs to attempt 1, which may be at work",
        "demo@50": "is the newest commit",
        "demo@60": "belongs to attempt 1",
    }
    for ref, reason in refused.items():
        code, out, err = call("rm", "demo@30", ref, "--yes")
        assert (code, out) == (2, "")
        assert reason in one_line(err)
    assert len(folders(live.storage)) == 7
    code, out, _ = call("rm", *refused, "--yes", "--force")
    assert code == 0
    assert "is tagged good" in out
    assert names(live.storage) == ["step_00000030/0000-0000", "step_00000040/0000-0000"]
    assert live.storage.list("tags") == []


def test_tags(run, call):
    assert call("tag", "demo@20", "good") == (0, "good is step_00000020/0000-0000\n", "")
    assert call("tag", "demo", "newest") == (0, "newest is step_00000050/0001-0000\n", "")
    assert call("tag", "demo@good", "also") == (0, "also is step_00000020/0000-0000\n", "")
    code, _, err = call("tag", "demo@30", "good")
    assert code == 2
    assert "good is checkpoints/step_00000020/0000-0000: delete that tag first" in one_line(err)
    assert json.loads(call("ls", "demo", "--json")[1])[1]["tags"] == ["also", "good"]
    assert call("tag", "--delete", "demo", "good")[0] == 0
    assert call("tag", "demo@30", "good")[0] == 0
    call("rm", "demo@30", "--yes", "--force")
    call("tag", "demo@20", "lost")
    run.storage.remove_folder(run.chain[1].path)
    assert "tag lost: its checkpoint checkpoints/step_00000020/0000-0000 is gone" in call("ls", "demo")[1]
    code, _, err = call("show", "demo@lost")
    assert code == 2
    assert "is gone" in one_line(err)


# On a terminal


def terminal(run, *arguments, width=80, answer=None):
    """What ``llmops ckpt`` prints on a terminal, escape sequences left out, and its exit code."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ.update(LLMOPS_RUNS_URL=str(run.runs), TERM="xterm", COLUMNS=str(width), PYTHONPATH=str(TREE))
        os.execv(sys.executable, [sys.executable, "-m", "llmops", "ckpt", *arguments])
    termios.tcsetwinsize(master, (50, width))
    shown = b""
    deadline = time.monotonic() + 60
    while True:
        ready, _, _ = select.select([master], [], [], deadline - time.monotonic())
        assert ready, f"no end within 60 s: {shown.decode()}"
        try:
            data = os.read(master, 65536)
        except OSError:  # its last process has closed the terminal
            break
        if not data:
            break
        shown += data
        if answer is not None and b"[y/N]" in shown:
            os.write(master, answer.encode() + b"\n")
            answer = None
    os.close(master)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n"), code


@pytest.mark.parametrize("width", [80, 200])
def test_tables_fit_the_terminal(run, width):
    add_tag(run.storage, run.chain[1], "a-tag-that-is-quite-long-for-a-table")
    for arguments in (["ls", "demo"], ["show", "demo@20"], ["gc", "demo", "--keep-last", "1"]):
        text, code = terminal(run, *arguments, width=width, answer="n")
        assert code == 0
        assert all(len(line.rstrip()) <= width for line in text.splitlines()), text
        assert "…" not in text, "nothing is cut"
    text, _ = terminal(run, "ls", "demo", width=width)
    assert "".join(text.split()).count("a-tag-that-is-quite-long-for-a-table") == 1
    assert ("PARENT" in text) == (width == 200)


def test_gc_and_rm_ask_at_a_terminal(run):
    for action in (["gc", "demo"], ["rm", "demo@10"]):
        for answer in ("n", "", "yessir"):
            text, code = terminal(run, *action, answer=answer)
            assert "remove? [y/N]" in text
            assert code == (0 if action[0] == "gc" else 2)
    assert len(folders(run.storage)) == 7
    text, code = terminal(run, "gc", "demo", answer="y")
    assert (text.count("removed step_"), code) == (2, 0)
    text, code = terminal(run, "rm", "demo@10", answer="YES")
    assert (text.count("removed step_"), code) == (1, 0)
    assert [each.step for each in folders(run.storage)] == [20, 30, 40, 50]


def test_verify_shows_its_progress(run):
    text, code = terminal(run, "verify", "--all", "demo", width=100)
    assert code == 0
    assert "verifying" in text
    assert text.count("  ok  ") == 6


EVIL = "\x1b]0;owned\x07\x1b[2J\u202eevil\n"


def test_what_others_wrote_never_reaches_the_terminal_as_it_is(run, call):
    held = [{EVIL: (np.zeros(2, np.float32), [2], [0])}]
    commit = make_commit(
        run.storage, 70, held, attempt=1, parent=run.chain[-1].path, state={EVIL: EVIL, "metrics": {EVIL: 1.0}}
    )
    record = LeaseRecord(commit=commit.path, expires=time.time() + 600, by=EVIL)
    run.storage.create("leases/evil.json", msgspec.json.encode(record))
    file = f"{commit.path}/rank00000-000.safetensors"
    run.storage.write(f"{commit.path}/\x1b[2Jextra", b"")
    for damaged in (False, True):
        if damaged:
            data = bytearray(run.storage.read(file))
            data[-1] ^= 1
            run.storage.replace(file, bytes(data))
        for arguments in (
            ["ls", "demo"], ["show", "demo"], ["show", "--all", "demo"], ["verify", "demo"], ["diff", "demo@50", "@70"],
            ["diff", "--values", "demo@50", "@70"], ["rm", "demo@70"], ["rm", "demo@70", "--force"], ["gc", "demo"],
            ["show", f"demo@{EVIL}"],
        ):  # fmt: skip
            _, out, err = call(*arguments)
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out + err), arguments
            assert "evil\n\n" not in out


def test_sizes():
    assert [size(count) for count in (0, 999, 1000, 1234, 999_499, 999_500, 10**9, 12_345_678_901, 10**15, 10**19)] == [
        "0 B", "999 B", "1 kB", "1.23 kB", "999 kB", "1 MB", "1 GB", "12.3 GB", "1 PB", "1e+04 PB",
    ]  # fmt: skip


# Elsewhere


def test_on_a_real_s3_server(s3_url, call):
    run = Made(s3_url)
    run.storage.write("checkpoints/notes.txt", b"not ours")
    assert call("ls", run.url)[0] == 0
    assert call("tag", f"{run.url}@20", "good")[0] == 0
    assert json.loads(call("show", f"{run.url}@good", "--json")[1])["step"] == 20
    code, out, err = call("verify", "--all", run.url)
    assert (code, err) == (0, "")
    assert out.count(" ok ") == 6
    assert call("diff", "--values", f"{run.url}@20", "@50")[1].splitlines()[-1] == "3 of 3 tensors have the same values"
    assert call("gc", run.url, "--keep-last", "1", "--yes")[0] == 0
    assert [each.step for each in commits(run.storage)] == [20, 50]
    listed = json.loads(call("ls", run.url, "--json", "--runs-url", s3_url)[1])
    assert [(each["step"], each["tags"]) for each in listed] == [(20, ["good"]), (50, [])]
    assert json.loads(call("ls", "demo", "--json", "--runs-url", s3_url)[1]) == listed
    assert call("rm", f"{run.url}@20", "--force", "--yes")[0] == 0
    assert [each["step"] for each in json.loads(call("ls", run.url, "--json")[1])] == [50]


@pytest.mark.parametrize(
    ("env", "code", "message"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:{port}"}, 1, "did not answer as it should"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 1, "s3://runs/x"),
    ],
)
def test_a_store_that_cannot_be_read_is_one_line(s3_server, dead_port, env, code, message):
    env = {name: value.format(port=dead_port) for name, value in env.items()}
    done = subprocess.run(
        [*LLMOPS, "ckpt", "ls", "s3://runs/x"], env={**os.environ, **env}, text=True, capture_output=True, cwd=TREE
    )
    assert done.returncode == code
    assert message in one_line(done.stderr)


IMPORTED = """
import json, sys
from llmops.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as left:
    code = left.code
print(json.dumps([code, sorted({name.split(".")[0] for name in sys.modules})]), file=sys.stderr)
"""
HEAVY = {"torch", "numpy", "hydra", "omegaconf", "safetensors", "s3fs", "aiobotocore"}


def imported(run, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, "ckpt", *arguments],
        env={**os.environ, "LLMOPS_RUNS_URL": str(run.runs)},
        cwd=TREE,
        text=True,
        capture_output=True,
    )
    code, found = json.loads(done.stderr.splitlines()[-1])
    return code, set(found)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "demo"], ["show", "demo"], ["verify", "--all", "demo"], ["diff", "--values", "demo@10", "@20"],
        ["gc", "demo", "--keep-last", "1"], ["rm", "demo@10", "--yes"], ["tag", "demo", "x"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_torch_is_never_imported(run, arguments):
    code, found = imported(run, *arguments)
    assert code == 0
    assert not found & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], *([action, "--help"] for action in ACTIONS)], ids=" ".join)
def test_help_starts_at_once(run, arguments):
    code, found = imported(run, *arguments)
    assert code == 0
    assert not found & {*HEAVY, "msgspec", "rich", "fsspec", "yaml", "crc32c"}
