"""Runs a program that uses ``llmops.preempt`` and holds it at a step of its first attempt until it is told to stop.

``hold.py FOLDER STEP SCRIPT [ARGUMENT...]``: FOLDER/held.<rank> is there as soon as the rank has done that step.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

from llmops import preempt


def main(folder: Path, held: int, script: str) -> None:
    told = preempt.beat

    def beat(step: int) -> None:
        told(step)
        if step == held and os.environ["LLMOPS_ATTEMPT"] == "0":
            (folder / f"held.{os.environ['RANK']}").touch()
            while not preempt.should_stop():
                time.sleep(0.02)

    preempt.beat = beat
    sys.argv = sys.argv[3:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
