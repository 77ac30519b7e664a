"""What the server answers, and whom."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.dashboard.conftest import WAIT_S, Served, until
from tests.dashboard.team import interrupted, live, over, sweep
from tests.launcher.harness import LLMOPS, TREE, Launcher


class Stream:
    """The server-sent events of a dashboard."""

    def __init__(self, served: Served, **headers: str) -> None:
        parts = urlsplit(served.url)
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
        self.connection.request("GET", "/api/events", headers=headers)
        self.answer = self.connection.getresponse()

    def next(self, name: str) -> dict[str, Any]:
        """The next event of that name."""
        deadline = time.monotonic() + WAIT_S
        while True:
            line = self.answer.readline().decode().strip()
            assert time.monotonic() < deadline, f"waited {WAIT_S} s for an event {name}"
            if line == f"event: {name}":
                value = json.loads(self.answer.readline().decode().removeprefix("data: "))
                assert isinstance(value, dict)
                return value


@pytest.fixture
def stream() -> Iterator[Any]:
    opened: list[Stream] = []

    def start(served: Served) -> Stream:
        opened.append(Stream(served))
        return opened[-1]

    yield start
    for each in opened:
        each.connection.close()


def test_runs_and_one_of_them(serve, make_run, alive):
    now = time.time()
    ids = [interrupted(make_run, alive, "main", now).load().id, over(make_run, "old", now - 86400).load().id]
    study = sweep(make_run.runs_url, now)
    served = serve(make_run.runs_url)
    status, found, headers = served.ask("api/runs")
    assert status == 200
    assert {row["id"]: row["state"] for row in found["runs"]} == dict(
        zip([*ids, study], ["running", "finished", "finished"], strict=True)
    )
    assert found["trouble"] == ""
    assert 0 <= found["now"] - found["taken"] < 30
    assert headers["cache-control"] == "no-store"
    run = served.ask(f"api/run/{ids[0]}")[1]
    assert [each["reason"] for each in run["attempts"]] == ["preempted", "failed", "hung", ""]
    assert {"queue", "train", "lost", "hang"} <= {each["kind"] for each in run["timeline"]}
    curves = served.ask(f"api/series?ids={ids[0]},{ids[1]}")[1]["runs"]
    assert [each["id"] for each in curves] == ids
    assert all(0 < len(each["series"]["loss"]) <= 500 for each in curves)
    assert len(served.ask(f"api/study/{study}")[1]["trials"]) == 30
    weeks = served.ask("api/goodput")[1]
    assert weeks["groups"][-1]["node_hours"] > 0
    assert sum(weeks["groups"][-1]["shares"].values()) == pytest.approx(1)


def test_logs_are_those_asked_for(serve, make_run):
    run = over(make_run, "printer", time.time() - 3600, last=50)
    run.log(0, 1, "first\n\x1b[31mred\x1b[0m \x1b]0;title\x07<b>bold</b>\n", part=1)
    served = serve(make_run.runs_url)
    run_id = run.load().id
    found = served.ask(f"api/logs/{run_id}?rank=1&tail=2")[1]
    assert [(line["attempt"], line["source"], line["text"]) for line in found["lines"]] == [
        (0, "1", "first"),
        (0, "1", "red <b>bold</b>"),
    ]
    assert served.ask(f"api/logs/{run_id}?rank=1&tail=2&after={found['mark']}")[1] == {"mark": found["mark"]}
    assert {line["source"] for line in served.ask(f"api/logs/{run_id}?tail=3")[1]["lines"]} == {"0", "1"}
    assert served.ask(f"api/logs/{run_id}?rank=supervisor")[1]["lines"] == []


def test_a_mistake_is_an_answer(serve, make_run):
    over(make_run, "one", time.time() - 3600, last=3)
    served = serve(make_run.runs_url)
    for path, status, said in (
        ("api/run/nothing", 404, "nothing"),
        ("api/logs/nothing?tail=5", 404, "nothing"),
        ("api/logs/nothing?tail=many", 400, "tail"),
        ("api/logs/nothing?tail=99999", 400, "tail"),
        ("api/series?ids=", 400, "ids"),
        ("api/series?ids=" + ",".join("abcdefghijklmnop"), 400, "ids"),
        ("api/nothing", 404, "no such page"),
        ("static/../access.py", 404, "no such page"),
    ):
        got, found, _ = served.ask(path)
        assert got == status, path
        assert said in found["error"]


def test_events_tell_what_has_changed_and_nothing_else(serve, make_run, alive, stream):
    now = time.time()
    quiet = over(make_run, "quiet", now - 86400, last=20)
    run = live(make_run, alive, "going", now, 30)
    served = serve(make_run.runs_url)
    events = stream(served)
    first = events.next("runs")
    assert first["reset"] is True
    assert {row["id"] for row in first["runs"]} == {quiet.load().id, run.load().id}
    run.end(0, "finished", time=now, last_step=30)
    while (later := events.next("runs"))["runs"] == [] or later["runs"][0]["state"] == "running":
        assert later["removed"] == []
    assert [(row["id"], row["state"]) for row in later["runs"]] == [(run.load().id, "finished")]
    assert later["reset"] is False
    for path in sorted(Path(quiet.store.url).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Path(quiet.store.url).rmdir()
    while not (later := events.next("runs"))["removed"]:
        pass
    assert later["removed"] == [quiet.store.url.rsplit("/", 1)[1]]


def test_it_ends_at_once_while_pages_are_open(serve, make_run, alive, stream):
    live(make_run, alive, "one", time.time(), 20)
    served = serve(make_run.runs_url)
    for _ in range(5):
        stream(served).next("runs")
    begun = time.monotonic()
    assert served.end() == 0
    assert time.monotonic() - begun < 4


def test_only_its_own_machine_without_a_token(serve, make_run):
    served = serve(make_run.runs_url)
    port = urlsplit(served.url).port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "localhost:9000"):
        assert served.ask("api/runs", host=host)[0] == 200, host
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[::1",
        "10.0.0.1",
    ):
        status, found, _ = served.ask("api/runs", host=host)
        assert status == 403, host
        assert "own machine" in found["error"]
        assert served.ask("", host=host)[0] == 403


def test_the_headers_that_keep_the_page_apart(serve, make_run):
    served = serve(make_run.runs_url)
    for path in ("", "static/app.js", "api/runs", "api/nothing"):
        headers = served.ask(path)[2]
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers
    assert served.ask("static/app.js")[2]["content-type"].startswith("text/javascript")
    tag = served.ask("static/app.js")[2]["etag"]
    assert served.ask("static/app.js", if_none_match=tag)[0] == 304


def test_off_loopback_the_token_is_needed(serve, make_run):
    served = serve(make_run.runs_url, "--host", "0.0.0.0", quiet=False)
    token = served.token
    assert token is not None
    assert len(token) >= 32
    served.printed = f"http://127.0.0.1:{urlsplit(served.url).port}/"
    assert served.ask("")[0] == 200, "the page itself holds nothing that is secret"
    for given in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {token}x"},
        {"authorization": "Bearer"},
    ):
        for path in ("api/runs", "api/events", "api/about", "api/goodput"):
            status, found, headers = served.ask(path, **given)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert "token" in found["error"]
    assert served.ask(f"api/runs?token={token}")[0] == 401, "an address ends up in logs"
    assert served.ask("api/runs", authorization=f"Bearer {token}", host="login1.cluster")[0] == 200
    until(lambda: served.said, "a warning")
    assert "not encrypted" in served.said[0]
    assert token not in "".join(served.said)


def test_a_token_from_a_file_is_not_printed(serve, make_run, tmp_path):
    (tmp_path / "token").write_text("correct-horse-battery\n")
    served = serve(make_run.runs_url, "--token-file", str(tmp_path / "token"))
    assert served.token is None
    assert served.ask("api/runs")[0] == 401
    assert served.ask("api/runs", authorization="Bearer correct-horse-battery")[0] == 200


def test_without_leave_nothing_can_be_changed(serve, make_run, alive):
    run = live(make_run, alive, "mine", time.time(), 20).load().id
    served = serve(make_run.runs_url)
    for action in ("cancel", "resume"):
        status = served.ask(f"api/run/{run}/{action}", "POST", {}, content_type="application/json")[0]
        assert status == 404
    assert served.ask("api/about")[1]["actions"] is False


def test_actions(serve, tmp_path):
    launcher = Launcher(tmp_path / "runs", "local")
    run = launcher.submit("--name", "sleeper", "code.enabled=false", command=("sleep", "300"))
    launcher.wait(run, "running")
    served = serve(str(tmp_path / "runs"), "--allow-actions")
    assert served.token is not None, "everybody on a login node reaches its loopback"
    good = {"authorization": f"Bearer {served.token}", "content_type": "application/json"}
    path, origin = f"api/run/{run}/cancel", served.url.rstrip("/")
    assert served.ask(path, "POST", {}, content_type="application/json")[0] == 401
    assert served.ask(path, "POST", {}, **{**good, "content_type": "text/plain"})[0] == 400
    assert served.ask(path, "POST", {"graceful": "yes"}, **good)[0] == 400
    assert served.ask(path, "POST", {}, **good, origin="http://evil.example")[0] == 403
    assert served.ask(path, "POST", {}, **good, sec_fetch_site="cross-site")[0] == 403
    assert served.ask(path, "GET", **good)[0] in (404, 405)
    assert launcher.status(run)["state"] == "running"
    assert served.ask(path, "POST", {"graceful": False}, **good, origin=origin)[0] == 200
    launcher.wait(run, "cancelled")
    assert served.ask(f"api/run/{run}/resume", "POST", {}, **good)[1] == {"done": "submitted"}
    launcher.wait(run, "running")
    again = until(
        lambda: (got := served.ask(f"api/run/{run}/resume", "POST", {}, **good))[0] != 200 and got, "a refusal"
    )
    assert (again[0], "is running" in again[1]["error"]) == (409, True)
    assert served.ask("api/run/nothing/cancel", "POST", {}, **good)[0] == 409
    launcher.ok("cancel", run)


def test_a_store_that_refuses_is_shown_for_what_it_is(serve, dead_port, stream):
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{dead_port}"}
    served = serve("s3://nothing/runs", **keys, AWS_EC2_METADATA_DISABLED="true", AWS_MAX_ATTEMPTS="1")
    said = stream(served).next("trouble")
    assert "s3://nothing/runs" in said["trouble"]
    assert served.ask("api/run/some")[0] in (502, 504)


def test_a_store_that_hangs_holds_up_nobody(serve):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        port = silent.getsockname()[1]
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        served = serve("s3://nothing/runs", **keys, AWS_EC2_METADATA_DISABLED="true")
        begun = time.monotonic()
        status, found, _ = served.ask("api/run/some")
        assert (status, 9 < time.monotonic() - begun < 15) == (504, True)
        assert "within 10 s" in found["error"]
        begun = time.monotonic()
        assert served.ask("healthz")[1] == "ok\n"
        assert time.monotonic() - begun < 1
        assert served.end() == 0


def test_a_scheduler_that_is_not_there(serve, make_run, tmp_path):
    run = make_run("elsewhere", created=time.time())
    run.submission()
    run.start(0)
    (tmp_path / "bin").mkdir()
    found = serve(make_run.runs_url, PATH=str(tmp_path / "bin")).ask("api/runs")[1]
    (row,) = found["runs"]
    assert row["state"] == "unknown"
    assert "slurm did not answer" in row["reason"]


def test_half_surrogates_and_damaged_runs_are_answers(serve, make_run):
    run = make_run("half", kind="llm")
    (Path(make_run.runs_url) / "20260101-000000-\udcff-abcd").mkdir()
    Path(run.store.url, "run.json").write_bytes(b'{"id": 7')
    found = serve(make_run.runs_url).ask("api/runs")[1]
    assert len(found["runs"]) == 2
    assert {row["state"] for row in found["runs"]} == {"unknown"}
    assert all(row["problems"] for row in found["runs"])


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["--interval", "0"], {}, "--interval 0"),
        (["--port", "70000"], {}, "--port 70000"),
        (["--host", "no.such.host.invalid"], {}, "--host no.such.host.invalid"),
        (["--token-file", "/nothing"], {}, "--token-file /nothing"),
        ([], {"LLMOPS_DASHBOARD_TOKEN": "short"}, "LLMOPS_DASHBOARD_TOKEN"),
        (["--runs-url", "nothing://here"], {}, "nothing"),
    ],
)
def test_bad_input_is_one_line(arguments, env, said, tmp_path):
    env = {**os.environ, "LLMOPS_RUNS_URL": str(tmp_path), **env}
    done = subprocess.run(
        [*LLMOPS, "dashboard", *arguments], env=env, capture_output=True, text=True, timeout=30, cwd=TREE
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_port_in_use_is_one_line(serve, make_run):
    port = str(urlsplit(serve(make_run.runs_url).url).port)
    command = [*LLMOPS, "dashboard", "--runs-url", make_run.runs_url, "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=TREE)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"--port {port}" in done.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_its_packages_it_says_what_to_install(package):
    program = (
        f"import sys; sys.modules[{package!r}] = None\nfrom llmops.cli.main import main\nsys.exit(main(['dashboard']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, cwd=TREE)
    assert done.returncode == 2
    assert "pip install 'llmops[ui]'" in done.stderr
    assert done.stderr.count("\n") == 1
