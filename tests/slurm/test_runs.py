"""Runs on a real SLURM, through everything that SLURM can do to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llmops.config.compose import load_config
from llmops.render import sbatch_options
from tests.launcher.harness import LLMOPS, TINY, TREE, Launcher
from tests.slurm import cluster


@pytest.fixture
def launcher(slurm, tmp_path):
    """A run store that all four nodes reach: they are this machine."""
    yield Launcher(tmp_path / "runs", "slurm")
    cluster.cancel_all()


def squeue(*job_ids):
    done = cluster.run(["squeue", "-h", "-t", "all", "-j", ",".join(job_ids), "-o", "%i %T %r"], check=False)
    return done.stdout


def check_resumed(launcher, run_id, undisturbed, reasons, timeout=300):
    value = launcher.wait(run_id, "finished", timeout=timeout)
    assert [attempt["reason"] for attempt in value["attempts"]] == [*reasons, "finished"]
    assert launcher.losses(run_id) == undisturbed
    launcher.wait_for(lambda: launcher.alive(run_id) == [], 60, "all processes to be gone", run_id)
    return value


def test_two_nodes_one_rank_each(launcher, undisturbed):
    run_id = launcher.submit(*TINY, "--name", "two nodes")
    value = launcher.wait(run_id, "finished")
    assert value["attempts"][0]["hosts"] == ["n1", "n2"]
    assert launcher.losses(run_id) == undisturbed
    output = launcher.ok("logs", run_id, "--rank", "all")
    assert "rank0" in output or "/0" in output
    logs = sorted(
        path.relative_to(launcher.root / run_id).as_posix() for path in launcher.root.glob(f"{run_id}/logs/*/*/*")
    )
    assert logs == ["logs/0000/n1/rank0.000000.log", "logs/0000/n2/rank1.000000.log"]


@pytest.mark.signals
@pytest.mark.parametrize("partition", ["low", "lowgrace"])
def test_preempted_by_a_more_important_job(launcher, undisturbed, partition):
    run_id = launcher.submit(*TINY, f"cluster.partition={partition}")
    launcher.wait_step(run_id, 12)
    cluster.preempt()
    value = check_resumed(launcher, run_id, undisturbed, ["preempted"])
    first, second = value["attempts"]
    assert second["first_step"] == first["last_step"] + 1, "the stop saved the very step that it came in"
    assert len(value["job_ids"]) == 1
    shares = launcher.shares(run_id)
    assert shares["lost"] == 0
    assert shares["queue"] > 0, "the wait for the nodes to come back"
    assert shares["committed"] > 0


@pytest.mark.long
def test_requeued_by_an_administrator(launcher, undisturbed):
    run_id = launcher.submit(*TINY)
    launcher.wait_step(run_id, 12)
    cluster.requeue(launcher.status(run_id)["job_ids"][0])
    check_resumed(launcher, run_id, undisturbed, ["preempted"])


def test_the_time_limit_is_survived(launcher, undisturbed):
    # slurmctld warns up to half a minute early: the first attempt is held until then, later ones have as long.
    run_id = launcher.submit(*TINY, "cluster.partition=short", "cluster.time=2", "cluster.signal_s=60")
    launcher.wait_step(run_id, 12)
    ranks = launcher.ranks(run_id).values()
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    output = launcher.root / run_id / "job/0000"
    stops = lambda: any("stop requested" in path.read_text() for path in output.glob("slurm-*.out"))  # noqa: E731
    launcher.wait_for(stops, 100, "the warning", run_id)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    value = launcher.wait(run_id, "finished", timeout=400)
    reasons = [attempt["reason"] for attempt in value["attempts"]]
    assert reasons[-1] == "finished"
    assert set(reasons[:-1]) == {"timeout"}
    assert launcher.losses(run_id) == undisturbed


@pytest.mark.signals
@pytest.mark.parametrize("victim", [pytest.param("rank", marks=pytest.mark.long), "agent"])
def test_kill_9(launcher, undisturbed, victim):
    run_id = launcher.submit(*TINY)
    launcher.wait_step(run_id, 23)
    pid = launcher.ranks(run_id)[1] if victim == "rank" else launcher.agents(run_id)[-1]
    os.kill(pid, signal.SIGKILL)
    value = check_resumed(launcher, run_id, undisturbed, ["failed" if victim == "rank" else "node_failure"])
    assert value["attempts"][1]["first_step"] == 21


@pytest.mark.signals
def test_signals_to_everybody_twice_are_one_stop(launcher, undisturbed):
    run_id = launcher.submit(*TINY)
    launcher.wait_step(run_id, 12)
    job_id = launcher.status(run_id)["job_ids"][0]
    for name in ("TERM", "USR1", "TERM"):
        cluster.run(["scancel", "--full", f"--signal={name}", job_id])
        cluster.run(["scancel", f"--signal={name}", job_id])
    check_resumed(launcher, run_id, undisturbed, ["preempted"])


def test_a_successor_where_requeue_is_refused(launcher, undisturbed):
    run_id = launcher.submit(*TINY)
    launcher.wait_step(run_id, 12)
    # What JobRequeue=0 and an enforcing job_submit plugin come to.
    cluster.run(["scontrol", "update", f"jobid={launcher.status(run_id)['job_ids'][0]}", "requeue=0"])
    cluster.preempt()
    value = check_resumed(launcher, run_id, undisturbed, ["preempted"])
    assert len(value["job_ids"]) == 2


def test_preempted_where_preemption_cancels(launcher, undisturbed):
    run_id = launcher.submit(*TINY, "cluster.partition=cancel")
    launcher.wait_step(run_id, 12)
    cluster.preempt()
    check_resumed(launcher, run_id, undisturbed, ["preempted"])


@pytest.mark.signals
@pytest.mark.parametrize("how", ["cancel", "graceful", "scancel"])
def test_a_cancelled_run_stays_cancelled(launcher, how):
    run_id = launcher.submit(*TINY, "train.max_steps=4000", "checkpoint.every_steps=4000")
    launcher.wait_step(run_id, 5)
    job_id = launcher.status(run_id)["job_ids"][0]
    if how == "scancel":
        cluster.run(["scancel", job_id])
    else:
        launcher.ok("cancel", run_id, *(["--graceful"] if how == "graceful" else []))
    launcher.wait(run_id, "cancelled", timeout=60)
    launcher.wait_for(lambda: launcher.alive(run_id) == [], 60, "all processes to be gone", run_id)
    launcher.wait_for(
        lambda: not any(word in squeue(job_id) for word in ("PENDING", "RUNNING", "COMPLETING")),
        30,
        "the job's end",
        run_id,
    )
    ended = launcher.attempts(run_id)
    assert ended == [("cancelled", "end")]
    commits = list(launcher.root.glob(f"{run_id}/checkpoints/*/*/manifest.json"))
    assert bool(commits) == (how != "cancel"), "plain cancel does not wait for a save, the others do"


def test_cancel_of_a_pending_run(launcher):
    run_id = launcher.submit(*TINY, 'cluster.extra=["--begin=now+1hour"]')
    assert launcher.status(run_id)["state"] == "pending"
    assert "cancelled" in launcher.ok("cancel", run_id, "--graceful")


@pytest.mark.long
def test_resume_of_a_cancelled_run(launcher, undisturbed):
    run_id = launcher.submit(*TINY)
    launcher.wait_step(run_id, 12)
    refused = launcher.call("resume", run_id)
    assert (refused.returncode, "is running" in refused.stderr) == (2, True)
    launcher.ok("cancel", "--graceful", run_id)
    launcher.wait(run_id, "cancelled", timeout=60)
    launcher.ok("resume", run_id)
    check_resumed(launcher, run_id, undisturbed, ["cancelled"])


def test_a_program_that_fails_at_once_is_given_up(launcher):
    run_id = launcher.submit(
        "retry.backoff_s=0.1", "cluster.nodes=2", command=("bash", "-c", "echo why it failed; exit 9")
    )
    value = launcher.wait(run_id, "failed")
    assert len(value["attempts"]) == 3
    assert "why it failed" in value["error"]
    assert "why it failed" in launcher.call("status", run_id).stdout
    assert "Restarts=0" in cluster.run(["scontrol", "-o", "show", "job", value["job_ids"][0]]).stdout


def test_secrets_are_not_in_what_slurm_shows(launcher):
    value = "hunter2-very-secret"
    launcher.env["MY_TOKEN"] = value
    run_id = launcher.submit("secrets=[MY_TOKEN]", command=("bash", "-c", "echo length ${#MY_TOKEN}; sleep 600"))
    launcher.wait_for(lambda: f"length {len(value)}" in launcher.call("logs", run_id).stdout, 30, "the program", run_id)
    job_id = launcher.status(run_id)["job_ids"][0]
    shown = cluster.run(["scontrol", "show", "job", job_id]).stdout
    shown += cluster.run(["scontrol", "write", "batch_script", job_id, "-"]).stdout
    shown += cluster.run(["sacct", "-j", job_id, "-P", "-o", "ALL"]).stdout
    shown += cluster.run(["ps", "-eo", "args"]).stdout
    assert value not in shown
    launcher.ok("cancel", run_id)


BAD = [
    (["cluster.partition=lo"], "cluster.partition=lo: there is no such partition; did you mean low?"),
    (["cluster.nodes=9"], "cluster.nodes=9: partition low gives a job at most 4 nodes"),
    (["cluster.cpus_per_rank=64"], "a node of partition low has 2 CPUs"),
    (["cluster.partition=short", "cluster.time=1:00:00"], "cluster.time=1:00:00 is more than partition short allows"),
    (["cluster.mem=900G"], "cluster.mem=900G"),
    (["cluster.gpus_per_node=8"], "has 0 GPUs"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[" ".join(row[0]) for row in BAD])
def test_what_would_pend_for_ever_is_refused(launcher, overrides, message):
    done = launcher.call("submit", "--backend", "slurm", *overrides, "--", "true")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not launcher.root.exists()
    assert cluster.run(["squeue", "-h"]).stdout == ""


def test_what_only_sbatch_knows_is_passed_on(launcher):
    done = launcher.call("submit", "--backend", "slurm", "cluster.constraint=nosuch", "--name", "refused", "--", "true")
    assert done.returncode == 2
    assert "slurm refused the job" in done.stderr
    assert "feature" in done.stderr.lower()
    assert launcher.status("refused")["state"] == "failed"
    assert cluster.run(["squeue", "-h"]).stdout == ""


NAMES = ["with blanks", "qu'o\"te", "$(touch x)", "a/b", "ünïcode ☃", "%j %x #y \\"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_data(launcher, name, tmp_path):
    out = launcher.ok("submit", "--backend", "slurm", f"--name={name}", f"cluster.comment={name}", "--", "true")
    run_id = out.split()[1]
    assert launcher.wait(run_id, "finished")["name"] == name
    assert list(tmp_path.rglob("x")) == []


def test_a_stopped_controller_gives_one_line_and_no_second_job(launcher):
    pid = int((cluster.STATE_DIR / "run" / "slurmctld.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        done = launcher.call("submit", "--backend", "slurm", "--name", "stopped", "--", "sleep", "1")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "does not answer" in done.stderr
    cluster.wait_for(lambda: cluster.run(["squeue", "-h"], check=False).returncode == 0, 30, "the controller")
    assert cluster.run(["squeue", "-h"]).stdout == ""


@pytest.fixture
def node_back():
    """Bring a node back that a test took down."""
    yield
    cluster.run(["scontrol", "update", "nodename=n1,n2", "state=resume"], check=False)
    cluster.dev_cluster("reset")


@pytest.mark.parametrize("node", ["n1", pytest.param("n2", marks=pytest.mark.long)])
def test_a_node_that_goes_down(launcher, undisturbed, node, node_back):
    run_id = launcher.submit(*TINY)
    launcher.wait_step(run_id, 12)
    cluster.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"])
    value = launcher.wait(run_id, "finished", timeout=300)
    assert len(value["attempts"]) == 2
    # The node itself is healthy here and may be used again at once; that SLURM took the job off it is what counts.
    assert value["attempts"][0]["reason"] in ("node_failure", "preempted")
    assert launcher.losses(run_id) == undisturbed


@pytest.mark.signals
def test_a_killed_batch_supervisor_leaves_nothing_and_can_be_resumed(launcher, undisturbed):
    run_id = launcher.submit(*TINY)
    launcher.wait_step(run_id, 12)
    (batch,) = [line for line in launcher.alive(run_id) if " slurm --run " in line]
    os.kill(int(batch.split()[0]), signal.SIGKILL)
    value = launcher.wait(run_id, "failed", timeout=60)
    launcher.wait_for(lambda: launcher.alive(run_id) == [], 40, "all processes to be gone", run_id)
    assert value["attempts"][0]["state"] == "lost"
    launcher.ok("resume", run_id)
    value = launcher.wait(run_id, "finished")
    assert launcher.losses(run_id) == undisturbed


@pytest.fixture
def stopped_controller(slurm, tmp_path):
    """slurmctld stopped after the launcher has looked at the partitions: sinfo answers with what it said before."""
    said = cluster.run(["sinfo", "-h", "-a", "-e", "-o", "%P|%a|%D|%c|%m|%l|%s|%G"]).stdout
    (tmp_path / "bin").mkdir()
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.write_text(f"#!/bin/sh\ncase \"$*\" in *NodeHost*) hostname;; *) cat <<'E'\n{said}E\n;; esac\n")
    sinfo.chmod(0o755)
    pid = int((cluster.STATE_DIR / "run" / "slurmctld.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    yield {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}, lambda: os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGCONT)
    cluster.wait_for(lambda: cluster.run(["squeue", "-h"], check=False).returncode == 0, 60, "the controller")


def test_a_submission_without_an_answer_is_found_and_never_doubled(slurm, tmp_path, stopped_controller):
    env, wake = stopped_controller
    launcher = Launcher(tmp_path / "runs", "slurm", **env)
    done = launcher.call("submit", "--backend", "slurm", "--name", "slow", "--", "sleep", "600")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "it is not known whether it took the job" in done.stderr
    wake()
    # The controller takes the job as soon as it wakes; status finds it by its tag, and resume does not send it again.
    value = launcher.wait("slow", "running", timeout=60)
    assert len(value["job_ids"]) == 1
    assert launcher.call("resume", "slow").returncode == 2
    assert len(cluster.run(["squeue", "-h"]).stdout.splitlines()) == 1
    launcher.ok("cancel", "slow")


def test_a_job_that_was_accepted_twice_runs_once(launcher):
    run_id = launcher.submit(command=("sleep", "600"))
    launcher.wait(run_id, "running")
    launcher.wait_for(lambda: len(launcher.ranks(run_id)) == 1, 30, "the rank", run_id)
    script = launcher.root / run_id / "job" / "0000" / "sbatch.sh"
    second = cluster.run(["sbatch", "--parsable", str(script)]).stdout.strip()
    launcher.wait_for(lambda: not any(word in squeue(second) for word in ("PEND", "RUN")), 30, "the double", run_id)
    output = (script.parent / f"slurm-{second}.out").read_text()
    assert "is a duplicate" in output
    assert len(launcher.status(run_id)["attempts"]) == 1
    launcher.ok("cancel", run_id)


def test_kill_9_of_the_launcher_at_any_moment(launcher):
    """Either no job, or a job that ``status`` knows; never two."""
    submit = [*LLMOPS, "submit", "--backend", "slurm", 'cluster.extra=["--hold"]']
    whole = time.monotonic()
    launcher.ok(*submit[len(LLMOPS) :], "--name", "whole", "--", "true")
    whole = time.monotonic() - whole
    for number, fraction in enumerate((0.4, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)):
        process = subprocess.Popen(
            [*submit, "--name", f"moment {number}", "--", "true"],
            env=launcher.env,
            cwd=TREE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(whole * fraction)  # the moment itself is what is tested
        process.kill()
        process.wait()
    # A killed sbatch may have been on its way: the controller takes a moment.
    values: list[dict] = []
    names: list[str] = []

    def settled():
        values[:] = json.loads(launcher.ok("status", "--json"))
        names[:] = cluster.run(["squeue", "-h", "-o", "%j"]).stdout.split()
        return all(
            len([name for name in names if name.startswith(value["id"] + ".")]) == (value["state"] == "pending")
            for value in values
        )

    launcher.wait_for(settled, 20, lambda: f"one job for each live run: {values} {names}", "none")
    assert len(names) == sum(value["state"] == "pending" for value in values)
    assert "whole" in {value["name"] for value in values if value["state"] == "pending"}


TEXTS = [
    "plain",
    "two  blanks",
    'a"b',
    "it's",
    "back\\slash",
    "$(id) `id` $HOME",
    "a#b # c",
    "ünïcode ☃",
    "%j %%",
    "\ttab",
]


def test_sbatch_lines_arrive_as_they_were(slurm, tmp_path):
    for text in TEXTS:
        script = tmp_path / "job.sh"
        options = sbatch_options({"comment": text, "hold": True, "output": "/dev/null"})
        script.write_text("#!/bin/bash\n" + "".join(f"#SBATCH {option}\n" for option in options) + "true\n")
        job_id = cluster.run(["sbatch", "--parsable", str(script)]).stdout.strip()
        assert cluster.run(["squeue", "-h", "-j", job_id, "-o", "%k"]).stdout == text + "\n"
        cluster.run(["scancel", job_id])


def test_the_trainer_alone_under_plain_srun(slurm, tmp_path):
    """Without our supervisor, submitit's reading of SLURM's environment says which rank this is."""
    config = tmp_path / "config.yaml"
    overrides = ["recipe=tiny", "train.max_steps=4", "train.warmup_steps=2", "eval.batches=1", "eval.sample_prompts=[]"]
    config.write_text(load_config(["cluster=slurm", *overrides]).yaml_text)
    command = [sys.executable, "-m", "llm.train", "--config", str(config), "--run-url", str(tmp_path / "run")]
    # On this cluster the nodes' names resolve to nothing: they are all one machine.
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    done = cluster.run(["srun", "-N2", "-n2", "--ntasks-per-node=1", *command], timeout=120, cwd=TREE, env=env)
    lines = (tmp_path / "run" / "metrics" / "0000" / "000000.jsonl").read_text().splitlines()
    assert [value["step"] for value in map(json.loads, lines) if value["kind"] == "step"] == [1, 2, 3, 4], done.stdout
    assert sorted(path.name for path in tmp_path.glob("run/checkpoints/*/*/*.safetensors")) == [
        "rank00000-000.safetensors",
        "rank00001-000.safetensors",
    ]
