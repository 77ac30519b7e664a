"""Runs on this machine, from submission to the end, through everything that can happen to them."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time

import pytest

from tests.launcher.harness import LLMOPS, TINY, TREE


def supervisor(local, run_id):
    """Pid of the local supervisor."""
    (job_id,) = local.status(run_id)["job_ids"]
    return int(job_id.split(":")[1])


def test_a_run_finishes_and_says_so(local, undisturbed):
    run_id = local.submit(*TINY, "--name", "all is well")
    value = local.wait(run_id, "finished")
    assert value["name"] == "all is well"
    assert (value["step"], value["max_steps"], value["backend"]) == (60, 60, "local")
    (attempt,) = value["attempts"]
    assert (attempt["state"], attempt["reason"]) == ("finished", "finished")
    assert (attempt["first_step"], attempt["last_step"]) == (1, 60)
    assert local.losses(run_id) == undisturbed
    assert local.alive(run_id) == []


def test_preempted_by_sigterm_it_resumes_bit_by_bit(local, undisturbed):
    run_id = local.submit(*TINY)
    local.wait_step(run_id, 12)
    pid = supervisor(local, run_id)
    for _ in range(2):  # schedulers often send it twice, within milliseconds
        os.kill(pid, signal.SIGTERM)
    value = local.wait(run_id, "finished")
    assert [attempt["reason"] for attempt in value["attempts"]] == ["preempted", "finished"]
    assert local.losses(run_id) == undisturbed
    shares = local.shares(run_id)
    assert shares["lost"] == 0, "all that the first attempt did was saved"
    assert min(shares[name] for name in ("committed", "import", "load", "checkpoint", "queue")) > 0
    assert value["goodput"] == pytest.approx(shares["committed"])
    assert (value["last_commit"]["step"], value["restarts"]) == (60, {"preempted": 1})
    assert value["tokens_per_s"] > 0


@pytest.mark.parametrize("victim", ["rank 0", pytest.param("node agent", marks=pytest.mark.long)])
def test_kill_9_is_survived_bit_by_bit(local, undisturbed, victim):
    run_id = local.submit(*TINY)
    local.wait_step(run_id, 23)
    pid = local.agents(run_id)[0] if victim == "node agent" else local.ranks(run_id)[int(victim[-1])]
    os.kill(pid, signal.SIGKILL)
    value = local.wait(run_id, "finished")
    first, last = value["attempts"]
    assert last["reason"] == "finished"
    expected = ("lost", "node_failure") if victim == "node agent" else ("failed", "failed")
    assert (first["state"], first["reason"]) == expected
    assert last["first_step"] == 21  # from the commit at step 20
    assert local.losses(run_id) == undisturbed
    assert local.shares(run_id)["lost"] > 0


def test_a_killed_supervisor_leaves_nothing_and_can_be_resumed(local, undisturbed):
    run_id = local.submit(*TINY)
    local.wait_step(run_id, 12)
    os.kill(supervisor(local, run_id), signal.SIGKILL)
    local.wait_for(lambda: local.alive(run_id) == [], 20, "its ranks to be gone", run_id)
    assert local.status(run_id)["state"] == "failed"
    local.ok("resume", run_id)
    value = local.wait(run_id, "finished")
    assert value["attempts"][-1]["first_step"] == 11
    assert local.losses(run_id) == undisturbed


def test_cancel_leaves_no_process_and_no_resurrection(local):
    run_id = local.submit(command=("bash", "-c", "trap '' TERM; (setsid sleep 600 &) ; sleep 600"))
    local.wait_for(lambda: len(local.ranks(run_id)) == 1, 30, "the rank", run_id)
    assert "cancelled" in local.ok("cancel", run_id)
    assert local.alive(run_id) == []
    assert local.status(run_id)["state"] == "cancelled"
    assert "over already" in local.ok("cancel", run_id)


def test_graceful_cancel_saves_and_resume_goes_on(local, undisturbed):
    run_id = local.submit(*TINY)
    local.wait_step(run_id, 12)
    refused = local.call("resume", run_id)
    assert refused.returncode == 2
    assert "is running" in refused.stderr
    local.ok("cancel", "--graceful", run_id)
    value = local.wait(run_id, "cancelled")
    saved = value["attempts"][0]["last_step"]
    assert saved >= 12
    local.ok("resume", run_id)
    value = local.wait(run_id, "finished")
    assert value["attempts"][-1]["first_step"] == saved + 1
    assert local.losses(run_id) == undisturbed
    assert "has finished" in local.ok("resume", run_id)


def test_a_finished_run_can_be_trained_further(local):
    run_id = local.submit(*TINY[:1], *TINY[2:], "train.max_steps=20")
    local.wait(run_id, "finished")
    local.ok("resume", run_id, "train.max_steps=30")
    value = local.wait(run_id, "finished")
    assert value["attempts"][-1]["first_step"] == 21
    assert list(local.losses(run_id)) == list(range(1, 31))


def test_a_program_that_fails_at_once_is_given_up(local):
    run_id = local.submit("retry.backoff_s=0.1", command=("bash", "-c", "echo the reason is here >&2; exit 7"))
    value = local.wait(run_id, "failed")
    assert [attempt["state"] for attempt in value["attempts"]] == ["failed"] * 3
    assert "the reason is here" in value["error"]
    assert "retry.max_no_progress=3" in value["reason"]
    done = local.call("status", run_id)
    assert done.returncode == 1
    assert "the reason is here" in done.stdout
    assert "the reason is here" in local.ok("logs", run_id)


def test_a_program_that_cannot_be_started_says_why(local):
    run_id = local.submit("retry.backoff_s=0.1", command=("/nonexistent/program",))
    value = local.wait(run_id, "failed")
    assert "rank 0 cannot be started: /nonexistent/program is not there on this node" in value["error"]


def test_a_hung_rank_is_found_and_started_again(local, undisturbed):
    run_id = local.submit(*TINY, "stop.hang_s=25")
    local.wait_step(run_id, 23)
    os.kill(local.ranks(run_id)[1], signal.SIGSTOP)
    value = local.wait(run_id, "finished")
    assert value["attempts"][0]["reason"] == "hung"
    assert local.losses(run_id) == undisturbed


def test_the_code_is_the_snapshot_also_after_an_edit(local, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "say.py").write_text(
        "import os, time\nprint('before', flush=True)\n"
        "while not os.path.exists(os.environ['GO']):\n    time.sleep(0.05)\nimport more\n"
    )
    (project / "more.py").write_text("print('old code')\n")
    go = tmp_path / "go"
    run_id = local.submit(f"code.root={project}", f"env.GO={go}", command=("python3", "say.py"))
    local.wait_for(lambda: "before" in local.call("logs", run_id).stdout, 30, "the program", run_id)
    (project / "more.py").write_text("print('new code')\n")
    go.touch()
    local.wait(run_id, "finished")
    assert "old code" in local.ok("logs", run_id)


def test_secrets_stay_out_of_everything(local):
    value = "hunter2-very-secret"
    local.env["MY_TOKEN"] = value
    run_id = local.submit(
        "secrets=[MY_TOKEN]", command=("bash", "-c", 'echo "token ${#MY_TOKEN} $MY_TOKEN"; sleep 600')
    )
    local.wait_for(lambda: "token" in local.call("logs", run_id).stdout, 30, "the program", run_id)
    assert f"token {len(value)} [secret]" in local.ok("logs", run_id)
    holders = [path for path in local.root.rglob("*") if path.is_file() and value.encode() in path.read_bytes()]
    assert [path.name for path in holders] == ["secrets.json"]
    assert stat.S_IMODE(holders[0].stat().st_mode) == 0o600
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert value not in lines
    local.ok("cancel", run_id)
    del local.env["MY_TOKEN"]
    missing = local.call("submit", "secrets=[MY_TOKEN]", "--", "true")
    assert missing.returncode == 2
    assert "MY_TOKEN is not set" in missing.stderr


NAMES = [
    "with blanks",
    "qu'o\"te",
    "$(touch x)",
    "`touch x`",
    "a/b/../c",
    "ünïcode ☃",
    "--help",
    "a;b|c&d",
    "%j #x",
    "{a,b}",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_printable_name_is_data(local, name, tmp_path):
    local.call("submit", f"--name={name}", "--", "true")
    (folder,) = [path for path in local.root.iterdir() if path.name[:2] == "20"]
    assert json.loads((folder / "run.json").read_text())["name"] == name
    assert local.wait(folder.name, "finished")["name"] == name
    assert not (TREE / "x").exists()
    assert sorted(path.name for path in local.root.iterdir()) == sorted({"agent", "code", folder.name})


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "bell\a", "x" * 500])
def test_other_names_are_refused_before_anything_is_written(local, name):
    done = local.call("submit", f"--name={name}", "--", "true")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "name" in done.stderr
    assert not local.root.exists()


def test_kill_9_of_the_launcher_at_any_moment(local):
    """Either no job, or a job that ``status`` knows; never two."""
    whole = time.monotonic()
    local.ok("submit", "--name", "whole", "--", "sleep", "600")
    whole = time.monotonic() - whole
    moments = [whole * fraction for fraction in (0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)]
    for number, moment in enumerate(moments):
        process = subprocess.Popen(
            [*LLMOPS, "submit", "--name", f"moment {number}", "--", "sleep", "600"],
            env=local.env,
            cwd=TREE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moment)  # the moment itself is what is tested
        process.kill()
        process.wait()
    values: list[dict] = []

    def settled():
        """A process that was just forked has not become a supervisor yet: a moment later it has, and is known."""
        values[:] = json.loads(local.ok("status", "--json"))
        return all(
            len([line for line in local.alive(value["id"]) if " local --run " in line])
            == (1 if value["state"] in ("running", "pending") else 0)
            for value in values
        )

    local.wait_for(settled, 20, lambda: f"one supervisor for each live run: {values}", "none")
    running = [value["id"] for value in values if value["state"] in ("running", "pending")]
    assert "whole" in {value["name"] for value in values if value["id"] in running}
    local.ok("cancel", *running)
    assert [line for value in values for line in local.alive(value["id"])] == []
