"""Telling people what happens to a run: ``python agent.pyz notify``, a process beside the supervisor.

The supervisor starts it after an attempt and goes on. What is told, whether it was told just now, and all that waits
for servers is the process's own: it reads its order from its standard input and is gone after :data:`LIFE_S`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from llmops.agent import attempts, messengers
from llmops.agent.log import log
from llmops.agent.plain import plain
from llmops.agent.policy.common import Decision, Outcome
from llmops.agent.ranks import SpecError, read_secrets
from llmops.agent.rundir import RunDir, StoreError, open_rundir
from llmops.agent.signals import be_deaf

LIFE_S = 30
LAST_WORDS_S = 5.0  # a supervisor that leaves waits for as long
ENV = "env:"  # what begins the name of a variable that holds a secret
CRASHES = 3  # failed attempts in a row without a new committed step
INTERRUPTIONS = ("preempted", "timeout", "node_failure")
FAILURES = ("failed", "hung", "node_failure")

Order = dict[str, Any]
Send = Callable[[], list[str]]


class Notifier:
    """The supervisor's side. Never waits, but for :meth:`finish`; never raises."""

    def __init__(self, rundir: RunDir, submission: int, spec: dict[str, Any]) -> None:
        self._config: dict[str, Any] = spec.get("notify") or {}
        email = self._config.get("email") or {}
        anybody = self._config.get("webhook") or email.get("to") or self._config.get("command")
        self._wanted = bool(anybody and self._config.get("events"))
        self._rundir, self._submission, self._spec = rundir, submission, spec
        self._children: list[subprocess.Popen[bytes]] = []

    def tell(self, number: int, outcome: Outcome, decision: Decision) -> None:
        """An attempt has ended, and its record is written."""
        if not self._wanted or decision.reason == "cancelled":
            return
        self._children = [child for child in self._children if child.poll() is None]
        try:
            order = {
                "run": self._rundir.path("").rstrip("/"),
                "submission": self._submission,
                "attempt": number,
                "reason": decision.reason,
                "action": decision.action,
                "detail": decision.detail,
                "outcome": {
                    "error": (outcome.error or "")[-4000:],
                    "failed_rank": outcome.failed_rank,
                    "failed_host": outcome.failed_host,
                    "last_step": outcome.last_step,
                    "exit_code": outcome.exit_codes.get(str(outcome.failed_rank)),
                },
                "spec": {name: self._spec.get(name) for name in ("run_id", "name", "backend", "python", "study")},
                "config": self._config,
                "secrets": self._secrets(),
            }
            self._children.append(_start(order))
        except (OSError, SpecError, ValueError) as error:
            log(f"nobody is told how attempt {number} ended: {error}")

    def finish(self) -> None:
        """Before the supervisor leaves: what it started may be killed with the rest of the job."""
        deadline = time.monotonic() + LAST_WORDS_S
        for child in self._children:
            try:
                child.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                log(f"a notification is not sent after {LAST_WORDS_S:g} s, and left to itself")

    def _secrets(self) -> dict[str, str]:
        email = self._config.get("email") or {}
        names = [each[len(ENV) :] for each in (self._config.get("webhook"), email.get("password")) if each]
        path = self._spec["options"].get("secrets_file")
        if path:
            return read_secrets(path, names)
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise SpecError(f"{', '.join(missing)} is not in the environment")
        return {name: os.environ[name] for name in names}


def _start(order: Order) -> subprocess.Popen[bytes]:
    own = sys.argv[0]
    inherited = (int(os.path.basename(own)),) if own.startswith("/proc/self/fd/") else ()
    # The tag of a job means its supervisor, which this is not.
    environment = {name: value for name, value in os.environ.items() if name != "LLMOPS_TAG"}
    child = subprocess.Popen(
        [sys.executable, own, "notify"],
        stdin=subprocess.PIPE,
        env=environment,
        pass_fds=inherited,
        start_new_session=True,
        preexec_fn=be_deaf,  # one thread, and nothing imported after the fork: safe
    )
    assert child.stdin is not None
    # Less than a pipe holds: nothing waits for the process to read it.
    with child.stdin:
        child.stdin.write(json.dumps(order).encode())
    return child


def main() -> int:
    """Entry point of ``agent.pyz notify``: one order on standard input."""

    def late(*_: Any) -> None:
        log(f"a notification was given up after {LIFE_S} s")
        messengers.kill_commands()
        os._exit(1)

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIFE_S)
    deadline = time.monotonic() + LIFE_S - 2
    order: Order = json.load(sys.stdin)
    try:
        tell(order, deadline)
    except (StoreError, OSError, ValueError) as error:
        log(f"nobody is told how attempt {order['attempt']} ended: {error}")
        return 1
    return 0


def tell(order: Order, deadline: float) -> None:
    """Find out whether there is something to tell, and tell it once."""
    rundir = open_rundir(order["run"], order["spec"]["python"])
    try:
        found = event_of(order, rundir)
        if found is None:
            return
        name, event = found
        # A scheduler that starts the job again kills this process at any moment: what was not told must not count as
        # told. Elsewhere the first one to take the place tells it, of many trials that fail at once.
        first = order["action"] in ("exit", "again")
        scope = _scope(order, rundir)
        try:
            every_s = float(order["config"]["every_minutes"]) * 60
            if _recently(scope, name, every_s) or (first and not _take(scope, name, every_s)):
                log(f"{name} was told less than {order['config']['every_minutes']:g} minutes ago")
                return
            if send(order, event, deadline) and not first:
                _take(scope, name, every_s)
        finally:
            if scope is not rundir:
                scope.close()
    finally:
        rundir.close()


def _scope(order: Order, rundir: RunDir) -> RunDir:
    """What shares one limit: a run, or all trials of a study."""
    study = order["spec"]["study"]
    return open_rundir(study["url"], order["spec"]["python"]) if study else rundir


def _recently(scope: RunDir, name: str, every_s: float) -> bool:
    if every_s <= 0:
        return False
    now = time.time()
    for bucket in (int(now // every_s), int(now // every_s) - 1):
        record = scope.get(f"notified/{name}-{bucket}.json")
        if record is not None and now - float(record["time"]) < every_s:
            return True
    return False


def _take(scope: RunDir, name: str, every_s: float) -> bool:
    if every_s <= 0:
        return True
    return scope.create(f"notified/{name}-{int(time.time() // every_s)}.json", {"event": name, "time": time.time()})


def event_of(order: Order, rundir: RunDir) -> tuple[str, Order] | None:
    """What is to be told of an attempt's end, and its event; None for nothing."""
    reason, ends, wanted = order["reason"], order["action"] == "exit", order["config"]["events"]
    history = attempts.history(rundir, order["submission"])
    interruptions = 0
    names: list[str] = []
    if ends and reason == "finished":
        names = [] if order["spec"]["study"] else ["finished"]  # of a study's trials, its own screens tell
    elif ends and reason in FAILURES:
        names = ["failed", "crash_loop"]
    elif ends:  # the scheduler refused to start it again
        names = ["failed"] if order["detail"] else []
    else:
        if reason in FAILURES and history.without_progress >= CRASHES:
            names.append("crash_loop")
        if reason in INTERRUPTIONS and "preempted" in wanted:
            interruptions = count_interruptions(rundir, order["config"], time.time())
            if interruptions >= order["config"]["preemptions"]:
                names.append("preempted")
    name = next((each for each in names if each in wanted), None)
    if name is None:
        return None
    return name, _event(name, order, rundir, history, interruptions)


def count_interruptions(rundir: RunDir, config: dict[str, Any], now: float) -> int:
    """How often it was interrupted within the window, counted no further than to what is too often."""
    found, since = 0, now - float(config["window_h"]) * 3600
    claimed = attempts.numbers(rundir)
    for number in reversed(claimed):
        end = rundir.get(f"attempts/{number:04d}/end.json")
        if end is None:  # it died with its node
            start = rundir.get(f"attempts/{number:04d}/start.json") or {}
            end = {"reason": "node_failure", "time": start.get("time", 0)}
        if float(end["time"]) < since or found >= int(config["preemptions"]):
            break
        found += end["reason"] in INTERRUPTIONS
    return found


def _event(name: str, order: Order, rundir: RunDir, history: attempts.History, interruptions: int) -> Order:
    spec, outcome, number = order["spec"], order["outcome"], order["attempt"]
    record = rundir.get("run.json") or {}
    start = rundir.get(f"attempts/{number:04d}/start.json") or {}
    errors = [line for line in outcome["error"].splitlines() if line.strip()]
    rank = outcome["failed_rank"]
    return {
        "event": name,
        "run_id": spec["run_id"],
        "name": spec["name"],
        "backend": spec["backend"],
        "run_url": order["run"],
        "attempts": number + 1,
        "reason": order["reason"],
        "detail": order["detail"],
        "goes_on": order["action"] != "exit",
        "failures_without_progress": history.without_progress,
        "interruptions": interruptions,
        "window_h": order["config"]["window_h"],
        "step": outcome["last_step"] if outcome["last_step"] is not None else start.get("resume_step"),
        "max_steps": record.get("max_steps"),
        "failed_rank": rank,
        "failed_host": outcome["failed_host"],
        "exit_code": outcome["exit_code"],
        "error": plain(errors[-1]) if errors else "",
        "submitted": record.get("created"),
        "time": time.time(),
    }


def headline(event: Order) -> str:
    """All that matters in one line."""
    count = event["attempts"]
    tries = f"after {count} attempt{'s' if count > 1 else ''}"
    said = {
        "finished": "finished",
        "failed": "failed",
        "crash_loop": "keeps failing" if event["goes_on"] else "failed",
        "preempted": f"was interrupted {event['interruptions']} times within {event['window_h']:g} h",
    }[event["event"]]
    step, most = event["step"], event["max_steps"]
    at = f" at step {step:,}" + (f" of {most:,}" if most else "") if step else ""
    parts = []
    if event["failed_rank"] is not None:
        where = f" on {plain(event['failed_host'])}" if event["failed_host"] else ""
        code = event["exit_code"]
        how = "" if code is None else f", exit code {code}" if code >= 0 else f", killed by signal {-code}"
        parts.append(f"rank {event['failed_rank']}{where}{how}")
    elif event["reason"] == "hung" or (event["event"] != "finished" and event["reason"] == "node_failure"):
        parts.append({"hung": "it hung", "node_failure": "a node was lost"}[event["reason"]])
    if event["detail"]:
        parts.append(plain(event["detail"]))
    why = f": {'; '.join(parts)}" if parts else ""
    run = f"{plain(event['name'])} ({plain(event['run_id'])})"
    return f"llmops: {run} {said} on {event['backend']} {tries}{at}{why}"


def text_of(event: Order) -> str:
    """The headline, and where to look."""
    lines = [headline(event)]
    if event["error"]:
        lines.append(f"last error: {event['error']}")
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(event["time"]))
    if event["submitted"]:
        hours, rest = divmod(int(max(event["time"] - event["submitted"], 0)), 3600)
        lines.append(f"{now}, {hours} h {rest // 60} min after it was submitted" + _onward(event))
    look = "status" if event["event"] in ("finished", "preempted") else "logs --errors"
    lines.append(f"look: llmops {look} {plain(event['run_id'])}")
    return "\n".join(lines)


def _onward(event: Order) -> str:
    return "; it goes on" if event["goes_on"] else ""


def send(order: Order, event: Order, deadline: float) -> bool:
    """Send it all ways at once; whether one of them worked. What did not is a line in the log."""
    config, secrets = order["config"], order["secrets"]
    text = text_of(event)
    ways: list[Send] = []
    if config["webhook"]:
        url = secrets[config["webhook"][len(ENV) :]]
        ways.append(lambda: messengers.webhook(url, text, deadline))
    if config["email"]["to"]:
        password = secrets.get((config["email"]["password"] or "")[len(ENV) :])
        ways.append(lambda: messengers.mail(config["email"], password, headline(event), text))
    if config["command"]:
        environment = {
            "LLMOPS_EVENT": event["event"],
            "LLMOPS_RUN_ID": event["run_id"],
            "LLMOPS_RUN_NAME": event["name"],
        }
        ways.append(lambda: messengers.command(config["command"], {**event, "text": text}, environment))
    worked: list[bool] = []

    def go(way: Send) -> None:
        try:
            for line in way():
                log(f"notify command: {line}")
        except messengers.NotSent as error:
            log(f"not told ({event['event']}): {error}")
        else:
            worked.append(True)

    threads = [threading.Thread(target=go, args=(way,)) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return bool(worked)
