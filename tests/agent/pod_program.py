"""What the ranks run in the tests of pods: says that it is there, stops on request, finishes or fails when told to."""

import os
import signal
import sys
import time
from pathlib import Path

root, attempt, rank = Path(os.environ["LLMOPS_RUN_URL"]), int(os.environ["LLMOPS_ATTEMPT"]), os.environ["RANK"]
control = Path(os.environ["LLMOPS_CONTROL_DIR"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the flag is enough
until = time.monotonic() + 120
(root / f"started-{attempt}-{rank}").write_text(f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
while time.monotonic() < until:
    if (control / "stop").exists():
        (control / f"stopped.{rank}").write_text('{"step": 1}')
        sys.exit(75)
    if (root / f"fail-{attempt}-{rank}").exists():
        sys.exit("it was told to fail")
    if (root / "finish").exists():
        sys.exit(0)
    time.sleep(0.02)
sys.exit("nobody told it what to do")
