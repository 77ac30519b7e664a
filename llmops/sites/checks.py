"""Checks: asked all at once, each with a deadline, and told in the order in which they were given."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llmops.errors import ClusterError, UserError

Result = Literal["ok", "warn", "fail"]
LOOK_S = 0.2  # between two tells of what is still waited for


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table. ``remedy`` is empty where all is well."""

    section: str
    name: str
    result: Result
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Probe:
    """A question, and the checks that its answer gives. ``ask`` may block and raise: both become a failed check, with
    ``remedy`` where there is no answer, or the error names none."""

    section: str
    name: str
    ask: Callable[[], Sequence[Check]]
    remedy: str = ""


def run(
    probes: Sequence[Probe], deadline_s: float, tell: Callable[[int, Sequence[str]], None] = lambda done, waiting: None
) -> list[Check]:
    """All checks of ``probes``. ``tell`` hears how many answered, and the names of those that did not, while it lasts.

    Each probe has a thread of its own, which is left behind when it does not answer in time.
    """
    answers: queue.SimpleQueue[tuple[int, Sequence[Check]]] = queue.SimpleQueue()
    for number, probe in enumerate(probes):
        threading.Thread(target=lambda n, p: answers.put((n, _ask(p))), args=(number, probe), daemon=True).start()
    found: dict[int, Sequence[Check]] = {}
    until = time.monotonic() + deadline_s
    while len(found) < len(probes) and (left := until - time.monotonic()) > 0:
        tell(len(found), [probe.name for number, probe in enumerate(probes) if number not in found])
        try:
            number, checks = answers.get(timeout=min(left, LOOK_S))
        except queue.Empty:
            continue
        found[number] = checks
    late = f"no answer within {deadline_s:g} s"
    remedy = "check the network and the service, or give it more time with --timeout"
    return [
        check
        for number, probe in enumerate(probes)
        for check in found.get(number, [Check(probe.section, probe.name, "fail", late, probe.remedy or remedy)])
    ]


def _ask(probe: Probe) -> Sequence[Check]:
    try:
        return probe.ask()
    except (UserError, ClusterError) as error:
        check = failed(probe.section, probe.name, str(error))
        return [check if check.remedy else replace(check, remedy=probe.remedy)]
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return [Check(probe.section, probe.name, "fail", f"{error.strerror or error}{where}", probe.remedy)]
    except Exception as error:  # noqa: BLE001 - the other checks are still worth telling
        what = f"this check itself failed: {type(error).__name__}: {error}"
        return [Check(probe.section, probe.name, "fail", what, "report it, with what the commands that it uses print")]


def failed(section: str, name: str, message: str, result: Result = "fail") -> Check:
    """A check of an error's text, which says what is wrong and, after its last semicolon, what to do."""
    found, _, remedy = message.rpartition("; ")
    return Check(section, name, result, found or message, remedy if found else "")
