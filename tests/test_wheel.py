"""What a user installs: the wheel alone, used from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a source distribution, as for a release."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment with the wheel. Its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched for packages, but the .pth files in it are not read: no editable llmops.
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--force-reinstall", str(wheel)], check=True)
    return folder / "bin"


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, with nothing of this environment but its ``PATH``."""
    env = {"PATH": os.environ["PATH"], "HOME": str(cwd), "LLMOPS_CACHE_DIR": str(cwd / ".cache")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_content(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = ("hydra_plugins", "llm", "llmops")
    assert {name.split("/")[0] for name in names} == {*packages, wheel.name.split("-py3")[0] + ".dist-info"}
    for kind, folder in (("conf", "_conf"), ("templates", "_templates")):
        shipped = {str(path.relative_to(REPOSITORY / kind)) for path in (REPOSITORY / kind).rglob("*.*")}
        assert {name.removeprefix(f"llmops/{folder}/") for name in names if f"/{folder}/" in name} == shipped
    tracked = {str(path.relative_to(REPOSITORY)) for part in packages for path in (REPOSITORY / part).rglob("*.py")}
    assert tracked <= set(names)
    assert {"llmops/py.typed", "llm/py.typed"} <= set(names)  # type checkers read the annotations
    assert not [name for name in names if name.endswith(".pyc")]


def test_files_are_found(installed: Path, tmp_path: Path) -> None:
    code = (
        "import llmops, llm; from llmops.resources import conf_dir, templates_dir;"
        "print(llmops.__file__, llm.__file__, conf_dir(), templates_dir())"
    )
    for path in run(installed / "python", "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(installed.parent)


def test_dry_run_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    printed = run(installed / "llmops", "submit", "--dry-run", "recipe=tiny", cwd=tmp_path)
    assert "--submission 0" in printed
    assert f"{installed}/python" in printed
    assert [path.name for path in tmp_path.iterdir()] == [".cache"], "a dry run writes nothing but its cache"


def test_completion(installed: Path, tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "__complete" in run(installed / "llmops", "completion", shell, cwd=tmp_path)
    answer = run(installed / "llmops", "__complete", "fish", "llmops", "submit", "model=ti", cwd=tmp_path)
    assert answer.startswith("words\nmodel=tiny\t")


def test_a_mistake_is_one_line(installed: Path, tmp_path: Path) -> None:
    command = [installed / "llmops", "submit", "--dry-run", "recipe=tinny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "did you mean tiny?" in done.stderr
