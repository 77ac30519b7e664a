"""Signals that reach a job before its supervisor can listen."""

from __future__ import annotations

import sys

import pytest

from tests.launcher.harness import Launcher
from tests.slurm import cluster

# A Python that takes its time to start, as from a slow disk. It says so when it is a node agent.
SLOW_PYTHON = f"""#!/bin/sh
case "$*" in *" node"*)
  echo up > {{folder}}/starting
  until [ -e {{folder}}/go ]; do sleep 0.1; done ;;
esac
exec {sys.executable} "$@"
"""


@pytest.fixture
def launcher(slurm, tmp_path):
    yield Launcher(tmp_path / "runs", "slurm")
    cluster.cancel_all()


@pytest.mark.signals
def test_a_node_agent_that_is_told_to_stop_before_it_has_started_is_not_lost(launcher, tmp_path, proctrack):
    python = tmp_path / "python"
    python.write_text(SLOW_PYTHON.format(folder=tmp_path))
    python.chmod(0o755)
    run_id = launcher.submit("code.enabled=false", f"cluster.python={python}", command=("true",))
    cluster.wait_file(tmp_path / "starting")
    (job_id,) = launcher.status(run_id)["job_ids"]
    for name in ("TERM", "USR1", "USR2", "INT", "HUP"):
        cluster.run(["scancel", f"--signal={name}", f"{job_id}.0"])
    (tmp_path / "go").touch()
    launcher.wait(run_id, "finished")
    assert launcher.attempts(run_id) == [("finished", "end")]
