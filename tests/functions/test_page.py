"""The page's own code, run from the first block to the last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.launcher.harness import TREE

SHOWN = [
    "finished",
    "last loss ",
    "area 6.0",
    "raised there: can't multiply sequence by non-int",
    "['hello from rank 0', 'hello from rank 1']",
    "areas [10, 40, 90]",
    "counted 1000",
]


def test_the_page_works_when_pasted(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (TREE / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    env = {**os.environ, "HOME": str(tmp_path), "LLMOPS_RUNS_URL": str(tmp_path / "runs"), "PYTHONPATH": str(TREE)}
    env.pop("XDG_DATA_HOME", None)
    done = subprocess.run(
        [sys.executable, "-"], input="".join(blocks), cwd=TREE, env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    for text in SHOWN:
        assert text in done.stdout, done.stdout
