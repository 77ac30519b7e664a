"""A torchrun in each pod of a job: they find each other, stop together and go on, by what is in the environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.agent.pods import Pods

HELD, STEPS = 5, 8
# Free of torch, so that it starts at once; each step is a line, and the first attempt waits for its stop after one.
WORKER = """
import os, sys, time
from pathlib import Path
from llmops import preempt

folder, held, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rank = int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == "4", os.environ["WORLD_SIZE"]
start = preempt.resume_from()
for step in range(start.step + 1 if start else 1, steps + 1):
    with (folder / f"steps.{rank}").open("a") as file:
        print(step, file=file)
    preempt.beat(step)
    if step == held:
        (folder / f"held.{rank}").touch()
        while not preempt.should_stop():
            time.sleep(0.02)
        preempt.committed(step, "state")
        preempt.exit_stopped()
"""


def test_workers_of_all_nodes_stop_and_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    made = Pods(tmp_path, "job", command=[*torchrun, str(script), str(folder), str(HELD), str(STEPS)]).start()
    try:
        made.until(lambda: len(list(folder.glob("held.*"))) == 4, "all workers to be at the step")
        made.delete(1)
        made.until_over()
        assert made.state == "succeeded", made.logs()
    finally:
        made.close()
    assert made.reasons() == ["preempted", "finished"], made.logs()
    for rank in range(4):
        lines = (folder / f"steps.{rank}").read_text().split()
        assert lines == [str(step) for step in range(1, STEPS + 1)], f"rank {rank}"
    first, second = (json.loads((tmp_path / f"attempts/{name}/end.json").read_text()) for name in ("0000", "0001"))
    assert (first["saved"], first["exit_codes"]) == (True, {"0": 0, "1": 0}), "the markers of all four, and no errors"
    assert (first["last_step"], second["first_step"], second["last_step"]) == (HELD, HELD + 1, STEPS)
    start = json.loads((tmp_path / "attempts/0001/start.json").read_text())
    assert (start["resume_step"], start["resume_path"]) == (HELD, "state")
