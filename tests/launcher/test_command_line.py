"""The command line itself: bad input, exit codes, what goes to which stream, and what is never imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmops.backends.local import LocalBackend
from llmops.cli.main import VERBS, main
from tests.launcher.harness import LLMOPS, TREE, Launcher

# Rank 1 has written before rank 0 fails the first attempt; the second attempt finishes.
TWICE = """
for i in 1 2 3; do echo "line $i of attempt $LLMOPS_ATTEMPT rank $RANK"; done
[ "$LLMOPS_ATTEMPT" = 1 ] && exit 0
[ "$RANK" = 1 ] && touch "$LLMOPS_CONTROL_DIR/ready" && exec sleep 60
until [ -e "$LLMOPS_CONTROL_DIR/ready" ]; do sleep 0.05; done
exit 7
"""
QUICK = ("code.enabled=false", "retry.backoff_s=0.1", "retry.max_no_progress=1")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Runs that are over: one that failed, then one of two ranks that was started twice and finished."""
    launcher = Launcher(tmp_path_factory.mktemp("over") / "runs", "local")
    failed = launcher.submit(*QUICK, "--name", "fäils", command=("bash", "-c", "echo why >&2; exit 3"))
    launcher.wait(failed, "failed")
    ranks = ("cluster.ranks_per_node=2", "retry.max_no_progress=2")
    done = launcher.call("submit", *QUICK, *ranks, "--name", "twice", "--follow", "--", "bash", "-c", TWICE)
    assert done.returncode == 0, done.stderr
    launcher.followed = done.stdout
    launcher.failed, launcher.twice = failed, done.stdout.split()[1]
    return launcher


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs one command in this process: exit code, stdout, stderr."""

    def call(*arguments, runs=None, cwd=TREE):
        monkeypatch.chdir(cwd)
        if runs is not None:
            monkeypatch.setenv("LLMOPS_RUNS_URL", str(runs))
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return call


def one_line(stderr):
    """The message, when it is one line and nothing else was written."""
    assert re.fullmatch(r"llmops: error: [^\n]+\n", stderr), stderr
    return stderr


BAD = [
    (["fly"], "there is no verb 'fly'"),
    (["sumbit"], "did you mean submit?"),
    (["--runs-url", "/x", "status"], "there is no verb '/x'"),
    (["status", "--bogus"], "unrecognized arguments: --bogus"),
    (["submit", "--two\nlines"], "--two lines"),
    (["submit", "--"], "nothing follows --"),
    (["status", "--"], "nothing follows --"),
    (["status", "--", "x"], "status takes no command after --"),
    (["submit", "--backend", "cloud"], "--backend cloud: choose one of local, slurm"),
    (["submit", "--config-dir", "/nonexistent"], "there is no such folder"),
    (["submit", "--json", "--follow", "--", "true"], "not allowed with"),
    (["submit", "--dry-run", "--json", "--", "true"], "not allowed with"),
    (["submit", "--runs-url", "", "--", "true"], "--runs-url is empty"),
    (["submit", "--runs-url", "ftp://host/x", "--", "true"], "no exclusive create"),
    (["submit", "--runs-url", "~no-such-user/x", "--", "true"], "no home directory"),
    (["submit", "--runs-url", "file://host/x", "--", "true"], "three slashes"),
    (["submit", "no-equals-sign"], "not of the form key=value"),
    (["submit", "=x"], "is not a key"),
    (["submit", "a\nb"], "not of the form key=value"),
    (["submit", "nosuch=1"], "there is no key nosuch"),
    (["submit", "train.lr=much"], "train.lr=much"),
    (["submit", "recipe=nosuch"], "recipe"),
    (["submit", "a=\udcff"], "UTF-8"),
    (["submit", "secrets=[NOT_SET_ANYWHERE]", "--", "true"], "NOT_SET_ANYWHERE is not set"),
    (["submit", "env.A=${oc.env:HOME}", "--", "true"], "secrets"),
    (["submit", "code.root=/nonexistent", "--", "true"], "there is no such folder"),
    (["submit", "--", "tr\nue"], "printable"),
    (["render", "--follow", "--", "true"], "unrecognized arguments: --follow"),
    (["status", "nobody"], "there is no run 'nobody'"),
    (["status", "two\nlines"], "there is no run"),
    (["status", "--interval", "soon"], "--interval"),
    (["status", "--watch", "--interval", "nan"], "--interval nan"),
    (["status", "--watch", "--interval", "inf"], "--interval inf"),
    (["status", "--watch", "--json"], "not allowed with"),
    (["logs"], "there are no runs"),
    (["logs", "nobody"], "there is no run 'nobody'"),
    (["logs", "--rank", "first"], "give a rank's number, or all"),
    (["logs", "--rank", "²"], "give a rank's number, or all"),
    (["logs", "--tail", "-1"], "0 or more"),
    (["logs", "--tail", "few"], "--tail"),
    (["logs", "--attempt", "one"], "--attempt"),
    (["logs", "--rank", "3-1"], "several as 0,3,8-15"),
    (["logs", "--since", "yesterday"], "--since yesterday: give a span"),
    (["logs", "--since", "25:00"], "--since 25:00"),
    (["logs", "--grep", "("], "--grep (: not a regular expression"),
    (["logs", "--grep", "x{99999999999}"], "not a regular expression"),
    (["logs", "--errors", "--tail", "3", "-f"], "leave --follow and --tail out"),
    (["logs", "--pods", "--since", "1h"], "--pods shows whole pods: leave --since out"),
    (["resume"], "required: RUN;"),
    (["resume", "nobody"], "there is no run 'nobody'"),
    (["cancel"], "required: RUN;"),
    (["cancel", "nobody"], "there is no run 'nobody'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(row[0]).encode("unicode_escape") for row in BAD])
def test_bad_input_is_one_line_and_writes_nothing(cli, tmp_path, arguments, message):
    code, out, err = cli(*arguments, runs=tmp_path / "runs")
    assert (code, out) == (2, "")
    assert message in one_line(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["/proc/x", "file", "file/below", "dangling", "loop/x", "n" * 300])
def test_a_store_that_cannot_be_is_one_line(cli, tmp_path, where):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for verb in (["submit", "--", "true"], ["submit", "code.enabled=false", "--", "true"]):
        code, out, err = cli(*verb, runs=tmp_path / where)
        assert (code, out) == (2, "")
        assert str(tmp_path / where) in one_line(err)


def test_a_folder_that_was_deleted_is_one_line(cli, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m llmops submit --runs-url {tmp_path} -- true"
    done = subprocess.run(
        ["bash", "-c", script], text=True, capture_output=True, env={**os.environ, "PYTHONPATH": TREE}
    )
    assert done.returncode == 2
    assert "no longer exists" in one_line(done.stderr)


# The superuser may do everything: without its capabilities it is as anybody else.
AS_ANYBODY = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []


def test_a_store_without_permission_is_one_line(tmp_path):
    launcher = Launcher(tmp_path / "runs", "local")
    launcher.root.mkdir()

    def call(*arguments):
        return subprocess.run(
            [*AS_ANYBODY, *LLMOPS, *arguments], env=launcher.env, text=True, capture_output=True, cwd=TREE
        )

    launcher.root.chmod(0o500)
    done = call("submit", "--", "true")
    assert done.returncode == 2
    assert "permission denied" in one_line(done.stderr)
    assert "no runs" in call("status").stdout
    launcher.root.chmod(0)
    for verb in (["status"], ["logs"], ["cancel", "x"], ["submit", "--", "true"]):
        done = call(*verb)
        assert done.returncode == 2
        assert "permission denied" in one_line(done.stderr)
    launcher.root.chmod(0o700)


def test_a_run_that_only_its_owner_may_read_hides_no_other(store, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(store.root, root)
    (root / store.failed).chmod(0)
    env = {**store.env, "LLMOPS_RUNS_URL": str(root)}

    def call(*arguments):
        return subprocess.run([*AS_ANYBODY, *LLMOPS, *arguments], env=env, text=True, capture_output=True, cwd=TREE)

    done = call("status", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    states = {value["id"]: (value["state"], value["reason"]) for value in json.loads(done.stdout)}
    assert states[store.twice] == ("finished", "")
    assert states[store.failed][0] == "unknown"
    assert "permission denied" in states[store.failed][1]
    assert call("logs", "twice", "--tail", "1").returncode == 0
    for verb in ("logs", "cancel", "resume"):
        done = call(verb, store.failed)
        assert done.returncode == 2
        assert "permission denied" in one_line(done.stderr)
    (root / store.failed).chmod(0o700)


def test_exit_codes(cli, store):
    root = store.root
    assert cli("status", store.twice, runs=root)[0] == 0
    assert cli("status", runs=root)[0] == 0, "nobody asked for the run that failed"
    assert cli("status", store.failed, runs=root)[0] == 1
    assert cli("status", "--json", store.failed, runs=root)[0] == 1
    assert cli("logs", store.failed, runs=root)[0] == 0
    assert cli("logs", "-f", store.twice, runs=root)[0] == 0
    assert cli("logs", "-f", store.failed, runs=root)[0] == 1
    assert cli("cancel", store.failed, runs=root)[:2] == (0, f"{store.failed} is over already: failed\n")
    assert cli("resume", store.twice, runs=root)[0] == 0


KEYS = {
    *("id", "name", "backend", "created", "url", "job_ids", "state", "reason", "step", "max_steps", "loss", "error"),
    "attempts",
}
ATTEMPT_KEYS = {"number", "state", "reason", "hosts", "first_step", "last_step", "started", "ended"}


def test_json_is_alone_on_stdout_and_has_the_documented_keys(cli, store):
    assert set(re.findall(r"^\| (`.*?`) \|", (TREE / "docs/cli.md").read_text(), re.MULTILINE))
    code, out, err = cli("status", "--json", runs=store.root)
    assert (code, err) == (0, "")
    failed, twice = json.loads(out)
    assert [each["id"] for each in (failed, twice)] == [store.failed, store.twice]
    for each in (failed, twice):
        assert set(each) >= KEYS
        assert all(set(attempt) >= ATTEMPT_KEYS for attempt in each["attempts"])
    assert (failed["name"], failed["state"], failed["error"]) == ("fäils", "failed", "why")
    assert [attempt["state"] for attempt in twice["attempts"]] == ["failed", "finished"]
    assert json.loads(cli("status", "--json", "twice", runs=store.root)[1]) == [twice]
    assert cli("status", "--json", runs=store.root.parent / "empty")[1] == "[]\n"


def test_runs_by_name_id_and_prefix(cli, store):
    for ref in (store.twice, "twice", "tw", store.twice[:-1]):
        assert cli("logs", ref, "--tail", 0, runs=store.root)[0] == 0, ref
    code, _, err = cli("logs", "20", runs=store.root)
    assert code == 2
    assert store.twice in one_line(err)
    assert store.failed in err
    # All are looked up before the first is touched.
    assert cli("cancel", store.twice, "nobody", runs=store.root)[:2] == (2, "")


def test_logs_of_ranks_and_attempts(cli, store):
    def lines(*arguments):
        return cli("logs", *arguments, runs=store.root)[1].splitlines()

    whole = lines()
    assert lines("twice") == whole, "the newest run"
    assert len(whole) == 12
    assert {"[0/0] line 1 of attempt 0 rank 0", "[0/1] line 3 of attempt 0 rank 1"} <= set(whole[:6])
    assert [line for line in whole if "rank 1" in line] == lines("--rank", "1")
    assert lines("--attempt", "1") == lines("--attempt", "-1") == [line for line in whole if line.startswith("[1/")]
    assert lines("--attempt", "1", "--rank", "0") == [f"line {i} of attempt 1 rank 0" for i in (1, 2, 3)]
    assert lines("--tail", "1") == [f"[1/{rank}] line 3 of attempt 1 rank {rank}" for rank in (0, 1)]
    assert len(lines("--tail", "4")) == 8, "the newest attempt has three of each rank"
    assert lines("--tail", "0") == []
    assert sorted(lines("-f")) == sorted(whole)
    assert sorted(store.followed.splitlines()[3:]) == sorted(whole), "--follow went on over the restart"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attempt", "2"], "has attempts 0 to 1"),
        (["--attempt", "-3"], "has attempts 0 to 1"),
        (["--rank", "2"], "has output of ranks 0 to 1"),
        (["--rank", "2,7-999999999"], "has output of ranks 0 to 1"),
        (["--node", "n*", "--node", "gpu1"], "--node n* gpu1"),
    ],
)
def test_logs_that_cannot_be(cli, store, arguments, message):
    code, _, err = cli("logs", "twice", *arguments, runs=store.root)
    assert code == 2
    assert message in one_line(err)


def test_watch_in_a_pipe_tells_changes(local):
    run_id = local.submit(*QUICK, command=("sleep", "2"))
    done = local.call("status", "--watch", "--interval", "0.1", run_id)
    assert done.returncode == 0
    states = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(f"{run_id} ")]
    assert states[-1] == "finished"
    assert len(states) == len(set(states)) >= 2


def test_render_is_what_submit_dry_run_prints(cli, tmp_path):
    for arguments in (["--", "echo", "it's"], ["recipe=tiny"], ["--name", "x y", "--backend", "local", "--", "true"]):
        texts = []
        for verb in (["render"], ["submit", "--dry-run"]):
            code, out, err = cli(*verb, *arguments, runs=tmp_path / "runs")
            assert (code, err) == (0, "")
            assert f"--run {tmp_path}/runs/" in out
            texts.append(re.sub(r"\d{8}-\d{6}-([a-z0-9-]+)-[a-z2-7]{4}", r"\1", out))
        assert texts[0] == texts[1]
    assert list(tmp_path.iterdir()) == []


def test_a_command_is_taken_as_it_is(local):
    # Everything after the first -- is the program's, also what looks like ours.
    run_id = local.submit(*QUICK, "env.A=1", command=("printf", "%s\n", "--", "--json", "a b", "k=v", "*", ""))
    assert local.wait(run_id, "finished")["state"] == "finished"
    assert local.ok("logs", run_id, "--attempt", "0").splitlines() == ["--", "--json", "a b", "k=v", "*", ""]


def test_a_folder_of_ones_own_groups(cli, tmp_path):
    (tmp_path / "conf/cluster").mkdir(parents=True)
    (tmp_path / "conf/model").mkdir()
    (tmp_path / "conf/cluster/ours.yaml").write_text("defaults: [local]\npython: /opt/our/python\n")
    (tmp_path / "conf/model/small.yaml").write_text("defaults: [tiny]\nn_layers: 1\n")
    where = ["--config-dir", tmp_path / "conf"]
    code, out, err = cli("render", *where, "cluster=ours", "model=small", runs=tmp_path / "runs")
    assert (code, err) == (0, "")
    assert out.startswith("/opt/our/python ")
    code, _, err = cli("render", *where, "cluster=theirs", runs=tmp_path / "runs")
    assert code == 2
    assert "ours" in one_line(err)
    (tmp_path / "conf/cluster/broken.yaml").write_text("python: [\n")
    code, _, err = cli("render", *where, "cluster=broken", runs=tmp_path / "runs")
    assert code == 2
    assert "broken" in one_line(err)


DAMAGED = ["run.json", "config.yaml", *(f"job/0000/{name}.json" for name in ("submission", "job", "spec"))]
DAMAGED += ["attempts/0000/start.json", "attempts/0000/end.json"]


@pytest.mark.parametrize("path", DAMAGED)
def test_a_half_written_run_is_never_a_traceback(cli, store, tmp_path, monkeypatch, path):
    """And never hides the other runs."""
    monkeypatch.setattr(LocalBackend, "submit", lambda self, submission: f"{socket.gethostname()}:4194305:1")
    whole = (store.root / store.failed / path).read_bytes()
    lengths = (0, 1, len(whole) // 2, len(whole) - 2)
    contents = [whole[:length] for length in lengths] + [b"null", b"[]", b"{}", b"\xff\xfe\0", None]
    for number, content in enumerate(contents):
        root = tmp_path / str(number)
        shutil.copytree(store.root, root)
        target = root / store.failed / path
        target.unlink()
        if content is not None:
            target.write_bytes(content)
        code, out, err = cli("status", "--json", runs=root)
        assert (code, err) == (0, "")
        assert [each["id"] for each in json.loads(out)] == [store.failed, store.twice]
        for verb in ("status", "logs", "cancel", "resume"):
            code, _, err = cli(verb, store.failed, runs=root)
            assert code in (0, 1, 2)
            assert err == "" if code == 0 or not err else one_line(err)


def test_a_run_whose_job_may_live_is_not_resumed_beside_it(local):
    run_id = local.submit(*QUICK, command=("sleep", "600"))
    local.wait(run_id, "running")
    for name in ("submission.json", "job.json"):
        path = local.root / run_id / "job/0000" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:10])
        done = local.call("resume", run_id)
        assert done.returncode == 2
        assert f"job/0000/{name}" in one_line(done.stderr)
        assert "it is not known whether its job still lives" in done.stderr
        path.write_bytes(whole)
    local.ok("cancel", run_id)


def test_foreign_things_in_the_store(cli, store, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(store.root, root)
    (root / "notes.txt").write_text("mine")
    (root / "lost+found").mkdir()
    (root / "20260101-000000-a-file-aaaa").touch()
    (root / "20260101-000000-empty-aaaa").mkdir()
    code, out, err = cli("status", "--json", runs=root)
    assert (code, err) == (0, "")
    states = {each["id"]: each["state"] for each in json.loads(out)}
    assert states[store.twice] == "finished"
    assert states.get("20260101-000000-empty-aaaa") == "unknown"
    assert not {"notes.txt", "lost+found"} & set(states)
    for verb in ("status", "logs", "cancel", "resume"):
        for name in ("20260101-000000-empty-aaaa", "20260101-000000-a-file-aaaa"):
            code, _, err = cli(verb, name, runs=root)
            assert code in (0, 2)
            assert err == "" if code == 0 else one_line(err)


def test_a_resumed_run_keeps_its_code_and_its_folder(cli, store, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalBackend, "submit", lambda self, submission: f"{socket.gethostname()}:4194305:1")
    root = tmp_path / "runs"
    (tmp_path / "project").mkdir()
    (tmp_path / "project/code.py").touch()
    cli("submit", "--name", "snapshot", "--", "true", runs=root, cwd=tmp_path / "project")
    cli("submit", "code.enabled=false", "--name", "here", "--", "true", runs=root, cwd=tmp_path / "project")
    (snapshot,), (here,) = root.glob("*-snapshot-*"), root.glob("*-here-*")
    # As a launcher that died just before it would have sent the first one.
    (snapshot / "job/0000/job.json").unlink()
    before = json.loads((snapshot / "job/0000/spec.json").read_text())
    (snapshot / "job/0000/spec.json").unlink()
    for run in (snapshot, here):
        assert cli("resume", run.name, cwd=tmp_path)[::2] == (0, "")
    again = json.loads((snapshot / "job/0001/spec.json").read_text())
    assert again["code_archive"] == before["code_archive"]
    assert Path(again["code_archive"]).exists()
    assert json.loads((here / "job/0001/spec.json").read_text())["options"]["work_dir"] == str(tmp_path / "project")


def shell(store, command, **env):
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; llmops() {{ {sys.executable} -m llmops "$@"; }}; {command}'],
        env={**store.env, **env},
        capture_output=True,
        cwd=TREE,
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("llmops status --json | head -1", 0),
        ("llmops logs | true", 0),
        ("llmops --help | true", 0),
        ("llmops status >&-", 0),
        ("llmops logs >&-", 0),
        ("llmops status <&- >&- 2>&-", 0),
        ("llmops status nobody 2>&-", 2),
    ],
)
def test_closed_streams(store, command, code):
    done = shell(store, command)
    assert (done.returncode, done.stderr) == (code, b"")


def test_a_full_disk_is_one_line(store):
    done = shell(store, "llmops status > /dev/full")
    assert done.returncode == 1
    assert "No space left" in one_line(done.stderr.decode())


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_terminal_without_unicode(store):
    done = shell(store, f"llmops status && llmops status {store.failed}", **ASCII)
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"f?ils" in done.stdout
    for verb in VERBS:
        done = shell(store, f"llmops {verb} --help", **ASCII)
        assert (done.returncode, done.stderr) == (0, b"")
    done = shell(store, "llmops status n\xf6body", **ASCII)
    assert done.returncode == 2
    one_line(done.stderr.decode())


def test_ctrl_c_leaves_the_run_alone(local):
    command = [*LLMOPS, "submit", *QUICK, "--name", "goes on", "--follow", "--", "bash", "-c", "echo up; sleep 600"]
    process = subprocess.Popen(
        command, env=local.env, cwd=TREE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert any("up" in line for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 130
    assert local.status("goes on")["state"] == "running"
    local.ok("cancel", "goes on")


HEAVY = ("hydra", "omegaconf", "msgspec", "rich", "jinja2", "fsspec", "yaml", "plotext", "pathspec")
IMPORTED = """
import json, os, sys
from llmops.cli.main import main
try:
    code = main(json.loads(os.environ["ARGUMENTS"]))
except SystemExit as left:
    code = left.code
print(json.dumps([code, sorted({name.split(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


def imported(root, *arguments):
    env = {**os.environ, "LLMOPS_RUNS_URL": str(root), "ARGUMENTS": json.dumps(arguments)}
    done = subprocess.run([sys.executable, "-c", IMPORTED], env=env, cwd=TREE, text=True, capture_output=True)
    code, names = json.loads(done.stderr.splitlines()[-1])
    return code, set(names)


def test_torch_is_never_imported(store):
    calls = [["status"], ["status", store.twice], ["status", "--watch"], ["logs"], ["logs", "-f"]]
    calls += [["cancel", store.twice], ["resume", store.twice], ["render", "recipe=tiny"]]
    calls += [["submit", "recipe=tiny", "cluster.python=/nonexistent/python"]]
    for call in calls:
        code, names = imported(store.root, *call)
        assert code == (2 if call[0] == "submit" else 0), call
        assert not names & {"torch", "numpy", "llm.train"}, call


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=str)
def test_help_imports_little(tmp_path, arguments):
    code, names = imported(tmp_path, *arguments)
    assert code == 0
    assert not names & {"torch"}
    if len(arguments) < 2:
        assert not names & set(HEAVY)
