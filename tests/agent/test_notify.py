"""Notifications: what is told, when, how it leaves, and that it never holds up or gives away anything."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from email import message_from_string
from email.policy import default
from pathlib import Path
from typing import Any

import pytest

from llmops import agent_zip, api
from llmops.agent import messengers, notify
from llmops.agent.messengers import NotSent
from llmops.agent.policy.common import Decision, Outcome
from llmops.agent.rundir import RunDir, open_rundir
from llmops.errors import UserError
from tests.agent.receivers import Hook, MailServer, certificate, wait_for
from tests.conftest import MadeRun
from tests.launcher.harness import Launcher

SECRET = "T0KEN-SECRET"


@pytest.fixture
def hook() -> Iterator[Hook]:
    """A webhook that takes everything."""
    with contextlib.closing(Hook()) as made:
        yield made


def config(**changes: Any) -> dict[str, Any]:
    email = {"to": [], "sender": None, "host": "localhost", "port": 25, "tls": "none", "user": None, "password": None}
    return {
        "events": ["finished", "failed", "crash_loop", "preempted"],
        "webhook": None,
        "email": email,
        "command": [],
        "preemptions": 3,
        "window_h": 24.0,
        "every_minutes": 10.0,
        **changes,
    }


# --- how it leaves


def test_a_webhook_gets_its_text_escaped_as_slack_reads_it(hook):
    messengers.webhook(hook.url, "a <!channel> & b\nsecond", time.monotonic() + 20)
    assert hook.posts == [{"text": "a &lt;!channel&gt; &amp; b\nsecond"}]
    assert hook.requests == [(f"/services/{SECRET}", "application/json")]


@pytest.mark.parametrize(("codes", "tries"), [((500, 429, 200), 3), ((404, 200), 1), ((503, 503, 503, 200), 3)])
def test_a_webhook_is_tried_again_only_where_the_server_asks_so(monkeypatch, codes, tries):
    monkeypatch.setattr(messengers, "PAUSE_S", 0.05)
    with contextlib.closing(Hook(*codes)) as hook:
        works = codes[tries - 1] == 200
        with contextlib.nullcontext() if works else pytest.raises(NotSent, match=f"^webhook: HTTP {codes[tries - 1]}$"):
            messengers.webhook(hook.url, "text", time.monotonic() + 20)
        assert len(hook.posts) == tries


def test_a_webhook_that_wants_too_much_patience_gets_none():
    with contextlib.closing(Hook(429, 200, headers={"Retry-After": "3600"})) as hook:
        with pytest.raises(NotSent, match="HTTP 429"):
            messengers.webhook(hook.url, "text", time.monotonic() + 5)
        assert len(hook.posts) == 1


def test_a_webhook_that_redirects_is_not_followed(hook):
    with (
        contextlib.closing(Hook(302, headers={"Location": hook.url})) as elsewhere,
        pytest.raises(NotSent, match="HTTP 302"),
    ):
        messengers.webhook(elsewhere.url, "text", time.monotonic() + 5)
    assert hook.requests == []


def test_what_goes_wrong_with_a_webhook_is_said_without_its_url(monkeypatch, tmp_path, dead_port):
    monkeypatch.setattr(messengers, "ANSWER_S", 0.3)
    with contextlib.closing(Hook(None)) as silent, contextlib.closing(Hook(tls=certificate(tmp_path))) as foreign:
        for url, why in (
            (silent.url, "no answer within 0.3 s"),
            (foreign.url, "the server's certificate cannot be verified"),
            (f"http://127.0.0.1:{dead_port}/{SECRET}", "Connection refused"),
            (f"http://nowhere.invalid/{SECRET}", "its host is not known"),
            (f"http://127.0.0.1:port/{SECRET}", "its address is not valid"),
            (f"http://127.0.0.1:1/{SECRET} and\nmore", "its address is not valid"),
            (f"file:///{SECRET}", "its URL begins with neither https:// nor http://"),
        ):
            with pytest.raises(NotSent) as caught:
                messengers.webhook(url, "text", time.monotonic() + 5)
            assert str(caught.value) == f"webhook: {why}"
            assert caught.value.__cause__ is None


def test_a_mail_is_whole():
    with contextlib.closing(MailServer()) as server:
        way = {
            **config()["email"],
            "host": "127.0.0.1",
            "port": server.port,
            "to": ["ada@example.org", "b@example.org"],
        }
        messengers.mail(way, None, "llmops: a run é ended", "two\nlines")
        ((sender, received, text),) = server.mails
    assert "llmops@" in sender
    assert len(received) == 2
    parsed = message_from_string(text, policy=default)
    assert parsed["Subject"] == "llmops: a run é ended"
    assert parsed["To"] == "ada@example.org, b@example.org"
    assert parsed["Date"]
    assert parsed["Message-ID"]
    assert parsed.get_content().split() == ["two", "lines"]


def test_what_goes_wrong_with_a_mail_is_said_without_its_password(dead_port):
    to = {**config()["email"], "host": "127.0.0.1", "to": ["a@example.org", "b@example.org"], "user": "u"}
    with contextlib.closing(MailServer(("b@example.org",), "right")) as some, pytest.raises(NotSent, match="1 of 2"):
        messengers.mail({**to, "port": some.port}, "pass", "s", "t")
    with contextlib.closing(MailServer((), "wrong")) as server, pytest.raises(NotSent) as caught:
        messengers.mail({**to, "port": server.port}, SECRET, "s", "t")
    assert str(caught.value) == "email: SMTPAuthenticationError 535"
    with pytest.raises(NotSent, match=r"^email: Connection refused$"):
        messengers.mail({**to, "port": dead_port}, SECRET, "s", "t")
    with contextlib.closing(MailServer()) as plain, pytest.raises(NotSent, match="SMTPNotSupportedError"):
        messengers.mail({**to, "port": plain.port, "tls": "starttls"}, SECRET, "s", "t")


def test_a_command_gets_the_event_and_what_it_prints_is_cut(tmp_path, monkeypatch):
    script = 'cat > $0; for i in 1 2 3 4 5 6 7; do printf "$i $LLMOPS_EVENT \\033[31mred\\033[0m\\n"; done'
    said = messengers.command(["sh", "-c", script, str(tmp_path / "got")], {"a": 1}, {"LLMOPS_EVENT": "failed"})
    assert said == [f"{number} failed red" for number in (3, 4, 5, 6, 7)]
    assert json.loads((tmp_path / "got").read_text()) == {"a": 1}
    with pytest.raises(NotSent, match=r"^command: sh returned 3: because$"):
        messengers.command(["sh", "-c", "echo because; exit 3"], {}, {})
    with pytest.raises(NotSent, match="cannot be started: No such file"):
        messengers.command([str(tmp_path / "absent")], {}, {})
    monkeypatch.setattr(messengers, "COMMAND_S", 0.3)
    with pytest.raises(NotSent, match="killed after"):
        messengers.command(["sh", "-c", f"sleep 77 & echo $! > {tmp_path}/pid; wait"], {}, {})
    left = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}")
    wait_for(lambda: not left.exists() or "Z" in (left / "stat").read_text(), "what it had started to end")


# --- what is told


def order(run: MadeRun, reason: str, action: str, outcome: Outcome | None = None, **changes: Any) -> dict[str, Any]:
    """The order that a supervisor gives after the newest attempt."""
    rundir = RunDir(str(run.store.local_path))
    spec = {"run_id": "20260131-x", "name": "tiny", "backend": "slurm", "python": sys.executable, "study": None}
    ended = outcome or Outcome("failed")
    return {
        "run": rundir.root,
        "submission": 0,
        "attempt": notify.attempts.numbers(rundir)[-1],
        "reason": reason,
        "action": action,
        "detail": "",
        "outcome": {
            "error": ended.error or "",
            "failed_rank": ended.failed_rank,
            "failed_host": ended.failed_host,
            "last_step": ended.last_step,
            "exit_code": ended.exit_codes.get(str(ended.failed_rank)),
        },
        "spec": spec,
        "config": config(),
        "secrets": {},
        **changes,
    }


def told(order: dict[str, Any]) -> str | None:
    found = notify.event_of(order, RunDir(order["run"]))
    return None if found is None else found[0]


def test_what_is_told_of_which_end(make_run):
    run = make_run()
    for number in range(3):
        run.start(number)
        run.end(number, "failed", "retry")
    assert told(order(run, "finished", "exit")) == "finished"
    assert told(order(run, "failed", "exit")) == "failed"
    assert told(order(run, "hung", "exit")) == "failed"
    assert told(order(run, "failed", "again")) == "crash_loop"
    assert told(order(run, "preempted", "requeue")) is None
    assert told(order(run, "preempted", "exit", detail="the scheduler refused to start it again")) == "failed"
    assert told(order(run, "failed", "exit", config=config(events=["crash_loop"]))) == "crash_loop"
    assert told(order(run, "failed", "exit", config=config(events=["finished"]))) is None
    of_a_study = order(run, "finished", "exit")
    of_a_study["spec"]["study"] = {"url": "x"}
    assert told(of_a_study) is None


def test_two_failures_are_no_crash_loop_and_progress_ends_one(make_run):
    run = make_run()
    for number in range(2):
        run.start(number)
        run.end(number, "failed", "retry")
    assert told(order(run, "failed", "again")) is None
    run.put("checkpoints/step_00000010/0002-0000/manifest.json", {})
    run.start(2)
    run.end(2, "failed", "retry")
    assert told(order(run, "failed", "again")) is None


def test_interruptions_count_within_their_window(make_run):
    run, now = make_run(), time.time()
    for number, (reason, hours) in enumerate([("preempted", 30), ("preempted", 3), ("failed", 2), ("timeout", 1)]):
        run.start(number, time=now - hours * 3600 - 60)
        run.end(number, reason, "requeue", time=now - hours * 3600)
    assert told(order(run, "timeout", "requeue")) is None, "two within 24 hours"
    assert told(order(run, "timeout", "requeue", config=config(window_h=48))) == "preempted"
    run.start(4, time=now)  # died with its node: nobody wrote its end
    assert told(order(run, "preempted", "kick")) == "preempted"


def test_the_words(make_run):
    run = make_run(max_steps=5000)
    for number in range(3):
        run.start(number)
        run.end(number, "failed", "retry")
    error = "Traceback\n  File x\n\x1b[31mValueError: bad\x1b[0m <b> \u202e\n\n"
    ended = Outcome("failed", {"3": 1}, last_step=1200, failed_rank=3, failed_host="n2", error=error)
    _, event = notify.event_of(order(run, "failed", "exit", ended), RunDir(str(run.store.local_path)))
    lines = notify.text_of(event).splitlines()
    assert lines[0] == (
        "llmops: tiny (20260131-x) failed on slurm after 3 attempts at step 1,200 of 5,000: rank 3 on n2, exit code 1"
    )
    assert lines[1] == "last error: ValueError: bad <b>"
    assert "UTC" in lines[2]
    assert lines[3] == "look: llmops logs --errors 20260131-x"
    killed = Outcome("failed", {"3": -9}, failed_rank=3)
    _, event = notify.event_of(order(run, "failed", "again", killed), RunDir(str(run.store.local_path)))
    assert notify.headline(event).endswith("keeps failing on slurm after 3 attempts: rank 3, killed by signal 9")
    assert "; it goes on" in notify.text_of(event)
    hostile = {**event, "name": "a\nBcc: all@example.org\x1b]0;x\x07"}
    assert "\n" not in notify.headline(hostile)


# --- the process


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """This process is a supervisor's, as far as what starts the notifying process can tell."""
    path = tmp_path / "agent.pyz"
    path.write_bytes(agent_zip.build()[1])
    monkeypatch.setattr(sys, "argv", [str(path)])


def spec(**changes: Any) -> dict[str, Any]:
    plain = {"run_id": "20260131-x", "name": "tiny", "backend": "local", "python": sys.executable, "study": None}
    return {**plain, "options": {}, "notify": config(webhook="env:HOOK", **changes)}


def failed() -> tuple[Outcome, Decision]:
    return Outcome("failed", {"0": 1}, failed_rank=0), Decision("exit", "failed")


def test_the_same_is_told_once_in_a_while(agent, make_run, hook, monkeypatch, capfd):
    monkeypatch.setenv("HOOK", hook.url)
    run = make_run()
    run.start(0)
    run.end(0, "failed", "retry")
    for every, posts in ((10.0, 1), (10.0, 1), (0.0, 2)):
        notifier = notify.Notifier(RunDir(str(run.store.local_path)), 0, spec(every_minutes=every))
        notifier.tell(0, *failed())
        notifier.finish()
        assert len(hook.posts) == posts
    assert "failed was told less than 10 minutes ago" in capfd.readouterr().out


def test_trials_of_a_study_share_one_limit(agent, make_run, hook, monkeypatch, tmp_path):
    monkeypatch.setenv("HOOK", hook.url)
    for number in range(2):
        run = make_run(f"trial{number}")
        run.start(0)
        run.end(0, "failed")
        of_a_study = {**spec(), "study": {"url": str(tmp_path / "study"), "trial": number, "submission": 0}}
        notifier = notify.Notifier(RunDir(str(run.store.local_path)), 0, of_a_study)
        notifier.tell(0, *failed())
        notifier.finish()
    assert len(hook.posts) == 1


def test_a_message_that_did_not_leave_before_the_job_was_started_again_is_tried_anew(
    agent, make_run, dead_port, hook, monkeypatch
):
    run = make_run()
    run.start(0, time=time.time())
    run.end(0, "preempted", "requeue", time=time.time())
    for url, posts in ((f"http://127.0.0.1:{dead_port}/", 0), (hook.url, 1), (hook.url, 1)):
        monkeypatch.setenv("HOOK", url)
        notifier = notify.Notifier(RunDir(str(run.store.local_path)), 0, spec(preemptions=1))
        notifier.tell(0, Outcome("stopped"), Decision("requeue", "preempted"))
        notifier.finish()
        assert len(hook.posts) == posts


def test_a_limit_holds_in_an_object_store(agent, s3_url, hook, monkeypatch):
    monkeypatch.setenv("HOOK", hook.url)
    rundir = open_rundir(f"{s3_url}/20260131-x")
    try:
        rundir.create("attempts/0000/start.json", {"submission": 0, "resume_step": 0})
        rundir.create("attempts/0000/end.json", {"reason": "failed", "time": time.time()})
        notifier = notify.Notifier(rundir, 0, spec())
        for _ in range(2):
            notifier.tell(0, *failed())
            for child in notifier._children:
                child.wait(30)
        assert len(hook.posts) == 1
        assert len(rundir.list("notified")) == 1
    finally:
        rundir.close()


def test_nothing_is_told_of_a_cancelled_run_nor_started_for_nobody(agent, make_run, hook, monkeypatch):
    monkeypatch.setenv("HOOK", hook.url)
    run = make_run()
    nobody = {**spec(), "notify": config()}
    for described, decision in ((spec(), Decision("exit", "cancelled")), (nobody, Decision("exit", "failed"))):
        notifier = notify.Notifier(RunDir(str(run.store.local_path)), 0, described)
        notifier.tell(0, Outcome("failed"), decision)
        assert notifier._children == []


def test_a_secret_that_is_missing_is_a_line_in_the_log(agent, make_run, monkeypatch, capsys):
    monkeypatch.delenv("HOOK", raising=False)
    notifier = notify.Notifier(RunDir(str(make_run().store.local_path)), 0, spec())
    notifier.tell(0, *failed())
    assert "nobody is told how attempt 0 ended: HOOK is not in the environment" in capsys.readouterr().out


# --- real runs


@pytest.fixture
def launcher(tmp_path, hook) -> Launcher:
    return Launcher(tmp_path / "runs", "local", HOOK=hook.url)


def test_a_run_that_finishes_and_one_that_fails_are_told(launcher, hook, tmp_path):
    first = launcher.submit("notify.webhook=env:HOOK", "--name", "good", command=("true",))
    launcher.wait(first, "finished")
    wait_for(lambda: hook.posts, "the message")
    assert hook.posts[0]["text"].startswith(f"llmops: good ({first}) finished on local after 1 attempt")
    written = tmp_path / "event"
    second = launcher.submit(
        "notify.webhook=env:HOOK",
        "retry.max_failures=1",
        "retry.backoff_s=0",
        f'notify.command=[sh,-c,"cat > {written}"]',
        "--name",
        "bad",
        command=("bash", "-c", "echo 'ValueError: no' >&2; exit 3"),
    )
    launcher.wait(second, "failed")
    wait_for(lambda: len(hook.posts) > 1, "the message")
    text = hook.posts[1]["text"]
    assert f"bad ({second}) failed on local after 2 attempts: rank 0 on " in text
    assert "exit code 3; 2 attempts failed (retry.max_failures=1)" in text
    assert "last error: ValueError: no" in text
    wait_for(written.exists, "the command")
    assert json.loads(written.read_text())["event"] == "failed"
    assert len(hook.posts) == 2, "one message of each run"


def test_a_webhook_that_hangs_holds_nothing_up_and_its_url_is_nowhere(tmp_path):
    with contextlib.closing(Hook(None)) as silent:
        launcher = Launcher(tmp_path / "runs", "local", HOOK=silent.url)
        # The program itself looks for what it should not have.
        command = ("bash", "-c", "env | grep -c HOOK; exit 0")
        run_id = launcher.submit("notify.webhook=env:HOOK", "--name", "hung", command=command)
        wait_for(lambda: silent.posts, "the message")
        lines = b"".join(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path))
        assert SECRET.encode() not in lines
        assert SECRET not in "".join(_environments())
        folder = launcher.root / run_id
        holder = f"{json.loads((folder / 'job/0000/job.json').read_text())['job_id']}"
        supervisor = Path(f"/proc/{holder.split(':')[1]}")
        ended = json.loads((folder / "attempts/0000/end.json").read_text())["time"]
        wait_for(lambda: not supervisor.exists() or " Z " in (supervisor / "stat").read_text(), "the end of the job")
        assert time.time() - ended < 6
        assert launcher.status(run_id)["state"] == "finished"
    for path in launcher.root.rglob("*"):
        if path.is_file() and path.name != "secrets.json":
            assert SECRET.encode() not in path.read_bytes(), path
    assert (folder / "job/0000/secrets.json").stat().st_mode & 0o777 == 0o600
    assert "0" in launcher.ok("logs", run_id).split()


def _readable(path: Path) -> bool:
    return path.exists() and path.parent.name != str(os.getpid())


def _environments() -> Iterator[str]:
    """Of all processes of runs."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace")
            if "LLMOPS_TAG" in text or "LLMOPS_RUN_ID" in text:
                yield text


# --- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["notify.webhook=https://hooks.example.org/T0KEN-SECRET"], "notify.webhook: give env:NAME"),
        (["notify.webhook=env:1x"], "notify.webhook: give env:NAME"),
        (["notify.webhook=env:ABSENT"], "notify.webhook=env:ABSENT: ABSENT is not set"),
        (["notify.webhook=env:NOT_A_URL"], "the value of NOT_A_URL is not a URL"),
        (["notify.webhook=env:HOOK", "env.HOOK=x"], "env.HOOK is written to the run"),
        (["notify.email.to=[ada]"], "notify.email.to='ada': not an address"),
        (['notify.email.to=["a@b\\nBcc:c@d"]'], "notify.email.to="),
        (["notify.email.to=[a@b.org]", "notify.email.sender=me"], "notify.email.sender='me'"),
        (["notify.email.sender=a@b.org"], "notify.email.to names nobody"),
        (["notify.email.to=[a@b.org]", "notify.email.user=u"], "notify.email.password is not set"),
        (["notify.email.to=[a@b.org]", "notify.email.tls=tls"], "port 25 begins in clear"),
        (["notify.email.to=[a@b.org]", "notify.email.port=465"], "port 465 speaks TLS at once"),
        (["notify.email.to=[a@b.org]", "notify.email.port=70000"], "notify.email.port"),
        (
            [
                "notify.email.to=[a@b.org]",
                "notify.email.user=u",
                "notify.email.password=env:PASSWORD",
                "notify.email.host=mail.example.org",
            ],
            "would send the password in clear",
        ),
        (['notify.command=[""]'], "notify.command: its first word"),
        (["notify.events=[finishd]"], "notify.events"),
        (
            ["cluster=k8s", "cluster.image=x", "notify.webhook=env:HOOK"],
            "set cluster.secret_env.HOOK={secret: NAME, key: KEY}",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_launch(overrides, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HOOK", "https://hooks.example.org/T0KEN-SECRET")
    monkeypatch.setenv("NOT_A_URL", "T0KEN-SECRET")
    monkeypatch.setenv("PASSWORD", "T0KEN-SECRET")
    monkeypatch.delenv("ABSENT", raising=False)
    with pytest.raises(UserError) as caught:
        api.prepare(overrides, command=["true"], runs_url=str(tmp_path))
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
