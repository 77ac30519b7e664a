"""The supervisor's own calls to the controller, from inside real jobs."""

from __future__ import annotations

import sys

from tests.launcher.harness import TREE
from tests.slurm import cluster

REQUEUE = f"""#!/bin/bash
trap '' TERM
echo "$SLURM_ARRAY_TASK_ID ${{SLURM_RESTART_COUNT:-0}}" >> {{out}}
[ -n "$SLURM_RESTART_COUNT" ] && exit 0
[ "${{SLURM_ARRAY_TASK_ID:-1}}" = 0 ] && exit 0
cd {TREE} && {sys.executable} - <<'PYTHON'
import os
from llmops.agent import scontrol
ref = scontrol.job_ref(dict(os.environ))
print(ref, scontrol.show_job(ref))
assert scontrol.requeue(ref) is None
assert scontrol.cut_wait(ref, 3)
PYTHON
"""


def test_an_array_element_requeues_alone_and_soon(slurm, tmp_path):
    out = tmp_path / "out"
    options = ("--array=0-1", "--requeue", f"--output={tmp_path}/log-%a")
    cluster.submit(REQUEUE.replace("{out}", str(out)), *options)
    # The last element's own SLURM_JOB_ID is that of the whole array.
    cluster.wait_for(lambda: out.exists() and "1 1" in out.read_text(), 60, "element 1 to run again")
    cluster.wait_for(lambda: not cluster.queue(), 30, "the array's end")
    assert sorted(out.read_text().split("\n")) == ["", "0 0", "1 0", "1 1"], (tmp_path / "log-1").read_text()
