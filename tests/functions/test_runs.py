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
from tests.conftest import RunMaker
from tests.launcher.harness import TREE


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


@pytest.fixture
def trained(make_run: RunMaker) -> llmops.Run[None]:
    """What a training of a hundred steps leaves that was preempted at step 50, after a commit at step 40."""
    made = make_run("trained", backend="local")
    made.submission(0, "1", "local")
    made.start(0, job_id="1")
    made.metrics(0, range(1, 51))
    made.end(0, "preempted", "retry", last_step=50)
    made.start(1, "checkpoints/step_00000040/0000-0000", job_id="1")
    made.metrics(1, range(41, 101))
    made.end(1, "finished", last_step=100)
    return llmops.Run(made.store.url)


def test_a_training_has_each_step_once(trained: llmops.Run[None]) -> None:
    assert [record["step"] for record in trained.metrics()] == list(range(1, 101))
    assert trained.metrics()[40]["loss"] == 10 / 41 + 1, "of the attempt that counts"
    assert trained.describe()["step"] == 100
    assert trained.wait(1, progress=True).state == "finished"
    assert trained.result() is None


def test_a_run_in_a_notebook(trained: llmops.Run[None], monkeypatch: pytest.MonkeyPatch) -> None:
    """One output, replaced as the run goes on; IPython's interface, without a kernel to talk to."""
    assert "finished" in trained._repr_html_()
    assert "100 of 100" in trained._repr_html_()
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
    status = trained.status()
    with display.shown(trained.id, None) as show:
        for _ in range(3):
            show(status)
        show(llmops.Status(status.run, "running", "<b>", None))
    assert [data["text/plain"].split()[1] for data in shown] == ["finished,", "running,"]
    assert "&lt;b&gt;" in shown[1]["text/html"]


def test_a_damaged_run_is_still_shown(home: Path) -> None:
    assert "nowhere" in llmops.Run[Any](str(home / "runs" / "nowhere"))._repr_html_()


def test_a_notebook_shows_errors_in_one_line() -> None:
    assert llmops.UserError("no key")._render_traceback_() == ["llmops: no key"]


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
