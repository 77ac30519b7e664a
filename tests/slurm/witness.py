"""Writes down every signal that reaches it: ``witness.py FOLDER NAME [CHILD] [-- COMMAND…]``.

Run by path in jobs. NAME and CHILD (a process forked from it) may hold ``{VARIABLE}``s of the environment. Each
appends its pid to a file of its name, then a line for each signal, and ends once FOLDER/quit is there. COMMAND runs
beside them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

WATCHED = (signal.SIGCONT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def watch(folder: str, name: str) -> None:
    with open(os.path.join(folder, name.format_map(os.environ)), "a", buffering=1) as out:
        print(os.getpid(), file=out)
        while not os.path.exists(os.path.join(folder, "quit")):
            caught = signal.sigtimedwait(WATCHED, 0.2)
            os.utime(out.fileno())  # it lived until then
            if caught:
                print(signal.Signals(caught.si_signo).name.removeprefix("SIG"), f"{time.time():.2f}", file=out)


def main(folder: str, *arguments: str) -> None:
    names, command = list(arguments), list[str]()
    if "--" in names:
        command = names[names.index("--") + 1 :]
        del names[names.index("--") :]
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    if command:
        subprocess.Popen(command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED))
    if len(names) > 1 and os.fork() == 0:
        names.pop(0)
    watch(folder, names[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
