"""The doctor's own machinery: deadlines, errors as checks, the table, this machine, the run store."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from llmops.cli.main import main
from llmops.errors import ClusterError, UserError
from llmops.runs.store import PosixStore
from llmops.sites import checks, machine, stores, table
from llmops.sites.checks import Check, Probe

TREE = Path(__file__).parents[2]
FINE = Check("a", "fine", "ok", "all is well")


def raising(error: Exception) -> Probe:
    def ask() -> list[Check]:
        raise error

    return Probe("a", "raises", ask)


def test_answers_keep_their_order_and_a_silent_probe_is_one_failed_check():
    released, told = threading.Event(), []
    silent = Probe("a", "silent", lambda: [FINE] if released.wait(60) else [])
    began = time.monotonic()
    found = checks.run([silent, Probe("a", "b", lambda: [FINE, FINE])], 0.5, lambda *seen: told.append(seen))
    released.set()
    assert time.monotonic() - began < 30
    assert [check.result for check in found] == ["fail", "ok", "ok"]
    assert (found[0].name, found[0].found) == ("silent", "no answer within 0.5 s")
    assert "--timeout" in found[0].remedy
    assert told[-1] == (1, ["silent"])


def test_a_probe_without_checks_is_no_failure():
    assert checks.run([Probe("a", "nothing to say", list)], 60) == []


@pytest.mark.parametrize(
    ("error", "found", "remedy"),
    [
        (ClusterError("it is down; wait; then try again"), "it is down; wait", "then try again"),
        (UserError("no such thing"), "no such thing", ""),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: /x", ""),
        (KeyError("GraceTime"), "this check itself failed: KeyError: 'GraceTime'", "report it"),
    ],
)
def test_what_a_probe_raises_is_a_line(error, found, remedy):
    (check,) = checks.run([raising(error)], 60)
    assert (check.result, check.found) == ("fail", found)
    assert check.remedy.startswith(remedy)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_the_terminal_and_shows_no_control_characters(width, capsys):
    long = Check("slurm", "preemption: a-very-long-partition-name, other", "warn", "x " * 100, "do " * 60)
    evil = Check("slurm", "evil", "fail", "red\x1b[31m line\nnext \u202e", "")
    console = Console(width=width, force_terminal=True, color_system=None)
    table.show([FINE, long, evil], console)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines)
    assert not any("\x1b" in line or "\u202e" in line for line in lines)
    assert lines[-1].rstrip() == "1 fine, 1 to look at, 1 broken"
    assert sum("to do:" in line for line in lines) == 1


def test_a_pipe_gets_whole_lines(capsys):
    table.show([Check("a", "long", "warn", "word " * 60, "cure " * 60)], Console())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["a", "warn", "to", "1"]


def test_who_waits_without_a_terminal_is_told_for_what(monkeypatch, capsys):
    monkeypatch.setattr(table, "LATE_S", 0.0)
    with table.waiting() as tell:
        tell(1, 3, ["torch", "round trip"])
    assert capsys.readouterr().err.startswith("llmops: 1 of 3 have answered; waiting for torch, round trip, for ")
    monkeypatch.setattr(table, "LATE_S", 60.0)
    with table.waiting() as tell:
        tell(1, 3, ["torch"])
    assert capsys.readouterr().err == ""


# --- this machine ----------------------------------------------------------------------------------------------------

HEADER = "| NVIDIA-SMI 580.82.07    Driver Version: 580.82.07    CUDA Version: 13.0     |"
CARDS = "580.82.07, NVIDIA H100 80GB HBM3, 81559 MiB\n" * 2
TORCH = {"version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "available": True, "archs": ["sm_80", "sm_90"]}
H100 = ["NVIDIA H100 80GB HBM3", [9, 0]]


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi with these texts on PATH."""

    def make(cards=CARDS, header=HEADER, code=0):
        script = f"#!/bin/sh\ncase \"$1\" in --query*) printf '%s' '{cards}'; exit {code};; esac\necho '{header}'\n"
        path = tmp_path / "nvidia-smi"
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


@pytest.fixture
def torch(tmp_path, monkeypatch):
    """Makes `python -c` with the question about torch answer this."""

    def make(**changes):
        told = {**TORCH, "gpus": [H100, H100], **changes}
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\necho '{json.dumps(told)}'\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(machine.sys, "executable", str(path))

    return make


def results():
    return {check.name: check for check in machine.gpus(60)}


def test_torch_and_the_driver_that_go_together(smi, torch):
    smi()
    torch()
    found = results()
    assert found["torch"].found == "2.13.0+cu130 (CUDA 13.0), 2 GPUs"
    assert found["GPU driver"].found == "580.82.07 (CUDA 13.0): 2 x NVIDIA H100 80GB HBM3, 81559 MiB"
    assert {check.result for check in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("cards", "changes", "result", "words", "remedy"),
    [
        (CARDS.replace("580", "535"), {"available": False, "gpus": []}, "fail", "needs driver 580", "driver of 580"),
        (CARDS, {"available": False, "gpus": []}, "fail", "sees none of 2 GPUs", "CUDA_VISIBLE_DEVICES"),
        (CARDS, {"cuda": None, "available": False, "gpus": []}, "fail", "CPU only", "the build for CUDA"),
        (CARDS, {"gpus": [H100]}, "warn", "sees 1 of 2 GPUs", "CUDA_VISIBLE_DEVICES"),
        (CARDS, {"archs": ["sm_50", "sm_80"]}, "fail", "without code for NVIDIA H100", "sm_90"),
        (CARDS, {"archs": ["sm_80", "compute_80"]}, "ok", "2 GPUs", ""),
        (CARDS, {"gpus": [["NVIDIA L40S", [8, 9]]] * 2}, "ok", "2 GPUs", ""),
    ],
)
def test_torch_and_the_driver_that_do_not(smi, torch, cards, changes, result, words, remedy):
    smi(cards)
    torch(**changes)
    check = results()["torch"]
    assert check.result == result
    assert words in check.found
    assert remedy in check.remedy


def test_a_driver_that_fails_is_told_in_its_own_words(smi, torch):
    smi("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", code=9)
    torch(available=False, gpus=[])
    check = results()["GPU driver"]
    assert (check.result, "could not communicate" in check.found) == ("fail", True)


ASK = """
import sys
from llmops.sites import machine
print(machine.gpus(120)[0].found)
assert "torch" not in sys.modules
"""


def test_the_real_torch_is_asked_in_another_process():
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        capture_output=True,
        text=True,
        cwd=TREE,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2."), done.stdout


def test_an_environment_without_torch_is_told_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = machine.gpus(60)[0]
    assert (check.result, check.found) == ("warn", "not installed here")
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    check = machine.gpus(60)[0]
    assert (check.result, "libcudart" in check.found) == ("fail", True)


# --- the run store ------------------------------------------------------------------------------------------


def by_name(found):
    return {check.name: check for check in found}


def test_a_folder_makes_the_round_trip_and_is_left_as_it_was(tmp_path):
    (tmp_path / "kept").write_text("a run")
    found = by_name(stores.check(str(tmp_path)))
    assert found["round trip"].result == found["clock"].result == "ok"
    assert all(f"{verb} " in found["round trip"].found for verb in ("put", "create", "list", "read", "delete"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_an_object_store_makes_the_round_trip(s3_url):
    found = by_name(stores.check(s3_url))
    assert (found["round trip"].result, found["clock"].result) == ("ok", "ok"), found
    assert "space" not in found
    import s3fs

    left = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False).find(s3_url)
    assert [name for name in left if f"s3://{name}" != s3_url] == []


def test_a_store_that_is_not_there_is_a_failed_check(dead_port, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")  # not asked about here
    keys = {
        "PYTHONPATH": str(tmp_path),
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_MAX_ATTEMPTS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "llmops", "doctor", "--backend", "local", "--runs-url", "s3://elsewhere/runs", "--json"],
        env={**os.environ, **keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{dead_port}"},
        capture_output=True,
        text=True,
        cwd=TREE,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    found = by_name(Check(**each) for each in json.loads(done.stdout)["checks"])
    assert found["round trip"].result == "fail"
    assert "s3://elsewhere/runs: the store did not answer" in found["round trip"].found
    assert found["round trip"].remedy.startswith("check s3://elsewhere/runs")
    assert "Traceback" not in done.stderr
    blocked = tmp_path / "file"
    blocked.write_text("")
    (check,) = checks.run([Probe("run store", "round trip", lambda: stores.check(str(blocked / "runs")))], 60)
    assert "runs cannot be kept there" in check.found
    assert check.remedy == "choose another runs_url"


def test_a_store_without_exclusive_create_is_refused(tmp_path, monkeypatch):
    def create(self, path, data, mode=0o644):
        self.put(path, data)
        return True

    monkeypatch.setattr(PosixStore, "create", create)
    check = by_name(stores.check(str(tmp_path)))["round trip"]
    assert (check.result, "exclusive create does not hold" in check.found) == ("fail", True)
    assert "two jobs could run one run" in check.remedy


@pytest.mark.parametrize(("hours", "result"), [(0.01, "warn"), (2, "fail"), (-2, "fail")])
def test_a_store_whose_clock_is_wrong(tmp_path, monkeypatch, hours, result):
    put = PosixStore.put

    def late(self, path, data):
        put(self, path, data)
        moment = time.time() + hours * 3600
        os.utime(self.local_path / path, (moment, moment))

    monkeypatch.setattr(PosixStore, "put", late)
    check = by_name(stores.check(str(tmp_path)))["clock"]
    assert check.result == result
    assert ("ahead of" if hours > 0 else "behind") in check.found


def test_little_space_is_told(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5 * stores.GIB})
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda path: usage)
    check = by_name(stores.check(str(tmp_path)))["space"]
    assert (check.result, check.found.split(" (")[0]) == ("warn", "5.0 GiB free")
    usage.free = stores.GIB // 2
    assert by_name(stores.check(str(tmp_path)))["space"].result == "fail"


# --- the verb ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "pbs"], "choose one of local, slurm, k8s"),
        (["--timeout", "0"], "more than 0"),
        (["cluster=nope"], "nope"),
        (["--backend", "local", "cluster.partition=gpu"], "partition"),
        (["--backend", "slurm", "cluster=local"], "is for local"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_without_slurm_and_a_store_it_says_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLMOPS_RUNS_URL", raising=False)
    monkeypatch.setattr(machine, "gpus", lambda timeout: [])
    assert main(["doctor", "--backend", "slurm"]) == 1
    out = capsys.readouterr().out
    assert "not on PATH: sbatch, squeue" in out
    assert "LLMOPS_RUNS_URL is not set" in out
    assert "to do: run llmops on a login node" in out


def test_every_extra_for_users_is_looked_for():
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    found = machine.python()[1].found
    for extra in set(project["optional-dependencies"]) - set(machine.FOR_DEVELOPERS):
        assert re.search(rf"\b{extra}\b", found), found
