"""Configured runs from Python, and what a notebook makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import llmops
from llmops import display
from tests.launcher.harness import TINY, TREE


@pytest.fixture(scope="module")
def tiny(home: Path) -> llmops.Run[None]:
    """A training of ten steps."""
    short = ["train.max_steps=10", "train.seq_len=64", "train.warmup_steps=2"]
    return llmops.submit([*TINY, *short, "code.enabled=false"], name="tiny-from-python")


def test_a_program_is_followed_cancelled_and_resumed(home: Path, tmp_path: Path) -> None:
    script = f"echo attempt $LLMOPS_ATTEMPT; until [ -e {tmp_path}/go ]; do sleep 0.1; done"
    run = llmops.submit(["code.enabled=false"], command=["bash", "-c", script], backend="local")
    assert next(run.logs(follow=True)) == "attempt 0"
    assert run.status().state == "running"
    assert not run.done()
    with pytest.raises(TimeoutError, match="is running after 0"):
        run.wait(0)
    assert run.cancel(graceful=True).state == "cancelled"
    with pytest.raises(llmops.RunFailed, match="cancelled by"):
        run.result()
    (tmp_path / "go").touch()
    assert run.resume() is run
    assert list(run.logs(follow=True)) == ["attempt 0", "attempt 1"]
    assert run.result(120) is None
    assert list(run.logs(attempt=1, tail=1)) == ["attempt 1"]
    assert run.metrics() == []


def test_a_training_has_metrics(tiny: llmops.Run[None]) -> None:
    assert tiny.wait(180, progress=True).state == "finished"
    assert [record["step"] for record in tiny.metrics()] == list(range(1, 11))
    assert all(record["loss"] > 0 for record in tiny.metrics())
    assert tiny.describe()["step"] == 10
    assert llmops.find("tiny-from-python") == tiny


def test_a_run_in_a_notebook(tiny: llmops.Run[None], monkeypatch: pytest.MonkeyPatch) -> None:
    """One output, replaced as the run goes on; IPython's interface, without a kernel to talk to."""
    tiny.wait(120)
    assert "finished" in tiny._repr_html_()
    assert "10 of 10" in tiny._repr_html_()
    shown: list[dict[str, str]] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(data)

    def first(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(data)
        return Handle()

    ipython = types.SimpleNamespace(
        get_ipython=lambda: types.SimpleNamespace(kernel=1), display=types.SimpleNamespace(display=first)
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)  # type: ignore[arg-type]
    status = tiny.status()
    with display.shown(tiny.id, None) as show:
        for _ in range(3):
            show(status)
        show(llmops.Status(status.run, "running", "<b>", None))
    assert [data["text/plain"].split()[1] for data in shown] == ["finished,", "running,"]
    assert "&lt;b&gt;" in shown[1]["text/html"]


def test_a_damaged_run_is_still_shown(home: Path) -> None:
    assert "nowhere" in llmops.Run[Any](str(home / "runs" / "nowhere"))._repr_html_()


def python(code: str, folder: Path = TREE, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TREE), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_costs_nothing() -> None:
    loaded = "print(sorted(name for name in sys.modules if name.split('.')[0] in %r))"
    assert python("import sys, llmops; " + loaded % (("llmops", "llm", "fsspec", "msgspec"),)) == "['llmops']\n"
    heavy = ("torch", "hydra", "omegaconf", "submitit", "cloudpickle", "numpy", "rich", "yaml", "kubernetes")
    assert python("import sys, llmops; llmops.submit, llmops.Run; " + loaded % (heavy,)) == "[]\n"
    assert "Executor" in python("import llmops; print(dir(llmops))")


def test_a_function_of_a_module_beside_the_script_in_a_folder_of_a_repository(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "experiments"
    folder.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(folder.parent)], check=True)
    (folder / "beside.py").write_text("def twice(x):\n    return 2 * x\n")
    script = "import llmops, beside\nprint(llmops.submit(beside.twice, 21).result(120))\n"
    assert python(script, folder) == "42\n"
