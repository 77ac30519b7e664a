"""A training program's side of a job: when to stop, where to go on, what is saved. Standard library alone.

    from llmops import preempt

    start = preempt.resume_from()                 # None on a fresh start
    for step in range(start.step + 1 if start else 1, steps + 1):
        train(step)
        preempt.beat(step)
        stop = preempt.should_stop()              # several ranks must agree: see docs/preempt.md
        if stop or step % 100 == 0:
            save(path)
            preempt.committed(step, path)         # once all ranks have saved
        if stop:
            preempt.exit_stopped()

Outside of a job, where LLMOPS_CONTROL_DIR is not set, nobody asks for a stop and nothing is written: the same program
runs on a laptop. Inside, importing this module ignores SIGTERM, SIGUSR1 and SIGUSR2 where the program has no handlers
of its own: some clusters send them to every process, and the stop file is what counts.

The supervisor puts this file where every Python of the job finds it, also one without llmops; hence the old syntax.
In a shell: ``python -m llmops.preempt --help``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

__all__ = [
    "EXIT_STOPPED",
    "Resume",
    "beat",
    "committed",
    "exit_stopped",
    "outlive_signals",
    "resume_from",
    "seconds_left",
    "should_stop",
]

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, state saved
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_step: int | None = None  # of the last beat
_first_step: int | None = None  # of this attempt


class Resume(NamedTuple):
    """What to go on from: the last step that is saved, and the path or URL that was committed with it."""

    step: int
    path: str


def should_stop() -> bool:
    """Whether this program is to save and leave. Call it once a step: it looks for a file, which takes microseconds.

    The ranks of a node, and the nodes, may see it a step apart: let them agree before they act on it.
    """
    control = _control()
    return control is not None and os.path.exists(os.path.join(control, "stop"))


def seconds_left() -> float | None:
    """Seconds until the program is killed, never below 0; None while nobody has asked it to stop."""
    control = _control()
    record = _read(os.path.join(control, "stop")) if control is not None else None
    return max(float(record["deadline"]) - time.time(), 0.0) if record else None


def resume_from() -> Resume | None:
    """The newest commit that counts, or None on a fresh start. The same for all ranks, and throughout an attempt."""
    path = os.environ.get("LLMOPS_RESUME_FROM", "")
    if _control() is None or not path:
        return None
    if not os.path.isabs(path) and "://" not in path:
        run = os.environ["LLMOPS_RUN_URL"].rstrip("/")
        path = run if path == "." else f"{run}/{path}"
    return Resume(int(os.environ["LLMOPS_RESUME_STEP"]), path)


def beat(step: int, phase: str = "train") -> None:
    """Tell the supervisor that ``step`` is done. A rank that has beaten once must go on: silent, it counts as hung."""
    global _step, _first_step
    _check(step)
    control = _control()
    if control is None:
        return
    name = f"heartbeat.{_rank()}"
    if _first_step is None:
        before = _read(os.path.join(control, name)) or {}  # of this program's last call, where it is a shell's
        _first_step = int(before.get("first_step", step))
    _step = step
    _write(control, name, {"step": step, "first_step": _first_step, "phase": phase, "time": time.time()})


def committed(step: int, path: str = ".") -> None:
    """Tell that the state after ``step`` is saved: the next attempt goes on from there, and the run makes progress.

    ``path``: of its file or folder, absolute, below LLMOPS_RUN_URL, or a URL. To be called when every rank has saved;
    the word of rank 0 counts, other ranks may call it or not.
    """
    _check(step)
    path = os.fspath(path)
    if not path:
        raise ValueError("committed: the path is empty; leave it out if the program knows where its state is")
    control = _control()
    if control is None or _rank() != 0:
        return
    run = os.environ.get("LLMOPS_RUN_URL", "").rstrip("/")
    if run and path.startswith(f"{run}/"):
        path = path[len(run) + 1 :]  # the folder of all runs may move
    _write(control, "committed.0", {"step": step, "path": path, "time": time.time()})


def exit_stopped(step: int | None = None) -> NoReturn:
    """Leave after a stop: the state is saved, and another attempt is to go on. To be called by every rank.

    ``step``: the last one that is saved; by default that of the last beat. Exits with code 75, and under torchrun,
    which takes that for a crash and kills or restarts the other workers, with 0: what counts is the marker.
    """
    control = _control()
    if control is not None:
        _write(control, f"stopped.{_rank()}", {"step": _step if step is None else step, "time": time.time()})
    sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_STOPPED)


def outlive_signals(_worker: int = 0) -> None:
    """Ignore SIGTERM, SIGUSR1 and SIGUSR2, whoever handles them now; for programs whose framework has taken them.

    To be given to a DataLoader with workers, as ``worker_init_fn``: PyTorch lets them die of SIGTERM.
    """
    if _control() is not None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _control() -> str | None:
    return os.environ.get("LLMOPS_CONTROL_DIR") or None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _check(step: int) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"step={step!r}: a step is a whole number from 0 on")


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (FileNotFoundError, ValueError):  # not there, or a shell is in the middle of writing it
        return None
    return value if isinstance(value, dict) else None


def _write(control: str, name: str, record: dict[str, Any]) -> None:
    aside = os.path.join(control, f".{name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(record, file)
    os.replace(aside, os.path.join(control, name))


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m llmops.preempt", description="A shell script's side of a job.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("should-stop", help="return 0 if the program is to save and leave, else 1")
    verbs.add_parser("resume-from", help="print the step and the path to go on from; nothing on a fresh start")
    for verb, text in (("beat", "STEP is done"), ("committed", "STEP is saved"), ("stopped", "leave after STEP")):
        command = verbs.add_parser(verb, help=text)
        command.add_argument("step", type=int)
        if verb == "committed":
            command.add_argument("path", nargs="?", default=".", help="of the state, absolute or below LLMOPS_RUN_URL")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "should-stop":
            return 0 if should_stop() else 1
        if arguments.verb == "resume-from":
            start = resume_from()
            if start is not None:
                print(start.step, start.path)
        elif arguments.verb == "beat":
            beat(arguments.step)
        elif arguments.verb == "committed":
            committed(arguments.step, arguments.path)
        else:
            _check(arguments.step)
            exit_stopped(arguments.step)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if _control() is not None and threading.current_thread() is threading.main_thread():  # no other may
    for _number in _SIGNALS:
        if signal.getsignal(_number) == signal.SIG_DFL:
            signal.signal(_number, signal.SIG_IGN)

if __name__ == "__main__":
    sys.exit(_main())
