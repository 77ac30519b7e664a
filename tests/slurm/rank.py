"""A rank that saves when it is told to, free of torch: ``rank.py FOLDER SECONDS [default|ignore]``.

Told by TERM, USR1, or the flag file of the control directory, it saves for SECONDS, writes FOLDER/saved with what told
it, and returns 85. With a third argument a helper process, as a DataLoader has them, must be alive while it saves; the
helper takes TERM as it comes or ignores it. FOLDER/up is there as soon as both are ready.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

told: list[str] = []


def helper(handling: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGTERM, signal.SIG_IGN if handling == "ignore" else signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    while os.getppid() != 1:
        time.sleep(0.1)
    os._exit(0)


def flag(control: str, step: int) -> str | None:
    """Tell the supervisor that this rank takes part, and look for its stop request."""
    beat = Path(control, f"heartbeat.{os.environ['RANK']}")
    beat.write_text(json.dumps({"step": step, "first_step": 1, "phase": "train", "time": time.time()}))
    return "flag" if Path(control, "stop").exists() else None


def main(folder: Path, seconds: float, handling: str | None = None) -> int:
    child = helper(handling) if handling else None
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: told.append(signal.Signals(number).name.removeprefix("SIG")))
    control = os.environ.get("LLMOPS_CONTROL_DIR")
    (folder / "rank.pid").write_text(f"{os.getpid()}\n")
    (folder / "up").write_text("up\n")
    step = 0
    while not told:
        step += 1
        time.sleep(0.05)
        if control and (found := flag(control, step)):
            told.append(found)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)
        if child and os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError(f"helper {child} was killed before the state was saved")
    (folder / "saved").write_text(f"{told[0]}\n")
    if control:
        Path(control, f"stopped.{os.environ['RANK']}").write_text(json.dumps({"step": step}))
        return 75
    return 85


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]))
