"""Runs `torchrun` many times and imports torch once: a line ``FOLDER ARGUMENT…`` on standard input starts one.

Each is a fork that calls what the console script calls. It writes FOLDER/torchrun.pid, FOLDER/log and, once it has
ended, FOLDER/rc: its exit code, negative when a signal killed it. FOLDER/env holds variables for it.
"""

from __future__ import annotations

import os
import select
import shlex
import sys
import traceback
from pathlib import Path
from typing import BinaryIO

from torch.distributed.run import main


def run(folder: Path, arguments: list[str]) -> None:
    os.setsid()
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(line.split("=", 1) for line in (folder / "env").read_text().splitlines())
    code = 1
    try:
        main(arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    aside.replace(path)


def serve(requests: BinaryIO) -> None:
    running: dict[int, Path] = {}
    print("ready", flush=True)
    while True:
        if select.select([requests], [], [], 0.05)[0]:
            line = requests.readline().decode()
            if not line:
                return
            folder, *arguments = shlex.split(line)
            pid = os.fork()
            if pid == 0:
                run(Path(folder), arguments)
            running[pid] = Path(folder)
            write(Path(folder, "torchrun.pid"), f"{pid}\n")
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                write(running.pop(pid) / "rc", f"{os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    # A line in a buffer would be one that select does not see.
    with open(0, "rb", buffering=0) as requests:
        serve(requests)
