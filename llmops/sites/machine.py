"""This machine: Python, llmops and its extras, torch and the GPUs' driver, and what the local backend needs."""

from __future__ import annotations

import json
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from llmops.sites.checks import Check

SECTION = "this machine"
OLDEST_PYTHON = (3, 11)
FOR_DEVELOPERS = ("bench", "dev", "docs")  # extras that change nothing of what works
SHM = Path("/dev/shm")  # noqa: S108 - the kernel's shared memory, which DataLoader workers and NCCL use
# The first driver that runs each major release of CUDA:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}
TORCH = """
import json, torch
gpus = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
                  "available": torch.cuda.is_available(), "gpus": gpus, "archs": torch.cuda.get_arch_list()}))
"""


def python() -> list[Check]:
    """The interpreter, llmops and its extras."""
    version = platform.python_version()
    fine = sys.version_info[:2] >= OLDEST_PYTHON
    wanted = ".".join(map(str, OLDEST_PYTHON))
    remedy = "" if fine else f"make an environment with Python {wanted} or later"
    return [Check(SECTION, "python", "ok" if fine else "fail", f"{version}, {sys.executable}", remedy), _install()]


def _install() -> Check:
    from llmops import __version__

    try:
        wanted = metadata.requires("llmops") or []
    except metadata.PackageNotFoundError:
        found = f"{__version__}, run from {Path(__file__).parents[2]} without being installed"
        return Check(SECTION, "llmops", "warn", found, "pip install -e . there, so that jobs find it too")
    missing = {extra: _missing(wanted, extra) for extra in _extras()}
    there = [extra for extra, names in missing.items() if not names]
    absent = [extra for extra, names in missing.items() if names]
    core = _missing(wanted, None)
    found = f"{__version__}, with {', '.join(there) or 'no extras'}" + (f"; without {', '.join(absent)}" * bool(absent))
    if core:
        return Check(SECTION, "llmops", "fail", f"{found}; missing: {', '.join(core)}", "pip install llmops, once more")
    return Check(SECTION, "llmops", "ok", found)


def _extras() -> list[str]:
    """The extras of llmops, as its metadata has them."""
    known = metadata.metadata("llmops").get_all("Provides-Extra") or []
    return [extra for extra in known if extra not in FOR_DEVELOPERS]


def lacks(extra: str) -> list[str]:
    """Packages of an extra that are not installed here."""
    try:
        return _missing(metadata.requires("llmops") or [], extra)
    except metadata.PackageNotFoundError:
        return []


def _missing(wanted: Sequence[str], extra: str | None) -> list[str]:
    """Names in ``wanted`` (as ``name>=1; extra == "x"``) of an extra, or of none, that are not installed."""
    names = []
    for line in wanted:
        requirement, _, marker = line.partition(";")
        of = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        if (of[1] if of else None) == extra:
            names.append(re.split(r"[^\w.-]", requirement.strip())[0])
    return [name for name in names if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def gpus(timeout: float) -> list[Check]:
    """Torch, asked in a process of its own, and the driver, as ``nvidia-smi`` has it."""
    driver, driver_cuda, cards, trouble = _driver(timeout)
    checks = [_driver_check(driver, driver_cuda, cards, trouble)]
    try:
        done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        remedy = "an environment on a slow shared disk starts every rank as slowly: keep it on a local one"
        return [Check(SECTION, "torch", "fail", f"not imported within {timeout:g} s", remedy), *checks]
    if done.returncode:
        return [_no_torch(done.stderr), *checks]
    told = json.loads(done.stdout.splitlines()[-1])
    return [_match(told, driver, cards), *checks]


def _no_torch(errors: str) -> Check:
    last = errors.strip().splitlines()[-1] if errors.strip() else "its import ended without a word"
    if "No module named 'torch'" in last:
        remedy = "pip install 'llmops[train]', unless your jobs bring their own environment or image"
        return Check(SECTION, "torch", "warn", "not installed here", remedy)
    remedy = "install it again: pip install --force-reinstall torch"
    return Check(SECTION, "torch", "fail", f"cannot be imported: {last}", remedy)


def _driver(timeout: float) -> tuple[str, str, list[str], str]:
    """The driver's version, the CUDA that it brings, the GPUs, and what nvidia-smi complains of."""
    if shutil.which("nvidia-smi") is None:
        return "", "", [], ""
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=timeout)
        header = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "", "", [], f"nvidia-smi did not answer within {timeout:g} s"
    if listed.returncode:
        text = (listed.stdout + listed.stderr).strip().splitlines()
        return "", "", [], text[0] if text else f"nvidia-smi returned {listed.returncode}"
    rows = [[field.strip() for field in line.split(",")] for line in listed.stdout.splitlines() if line.strip()]
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*([\d.]+)", header.stdout)
    cards = [f"{name}, {memory}" for _, name, memory in rows]
    return rows[0][0] if rows else "", cuda[1] if cuda else "", cards, ""


def _driver_check(driver: str, cuda: str, cards: Sequence[str], trouble: str) -> Check:
    if trouble:
        remedy = "a node in this state trains nothing: reload the driver, or tell its administrator"
        return Check(SECTION, "GPU driver", "fail", trouble, remedy)
    if not driver:
        return Check(SECTION, "GPU driver", "ok", "no NVIDIA driver here; the nodes of a cluster may have one")
    kinds = ", ".join(f"{cards.count(card)} x {card}" for card in dict.fromkeys(cards))
    return Check(SECTION, "GPU driver", "ok", f"{driver}" + f" (CUDA {cuda})" * bool(cuda) + f": {kinds}")


def _match(torch: dict[str, object], driver: str, cards: Sequence[str]) -> Check:
    """Does torch see the GPUs that the driver has, and was it built for them?"""
    cuda, gpus, archs = torch["cuda"], torch["gpus"], torch["archs"]
    assert isinstance(gpus, list)
    assert isinstance(archs, list)
    built = f"CUDA {cuda}" if cuda else f"ROCm {torch['hip']}" if torch["hip"] else "CPU only"
    found = f"{torch['version']} ({built})"
    if not cards:
        return Check(SECTION, "torch", "ok", found + (f", {len(gpus)} GPUs" if gpus else ", no GPU here"))
    if not cuda:
        remedy = "install the build for CUDA: https://pytorch.org/get-started/locally"
        return Check(SECTION, "torch", "fail", f"{found}, but this machine has {len(cards)} GPUs", remedy)
    need = DRIVER_OF_CUDA.get(int(str(cuda).split(".")[0]))
    has = int(driver.split(".")[0])
    if not torch["available"]:
        if need is not None and has < need:
            remedy = f"install a driver of {need} or later, or a torch that was built for an older CUDA"
            return Check(SECTION, "torch", "fail", f"{found} needs driver {need}, and here is {driver}", remedy)
        remedy = "look at CUDA_VISIBLE_DEVICES, the permissions of /dev/nvidia*, and what dmesg says of NVRM"
        return Check(SECTION, "torch", "fail", f"{found} sees none of {len(cards)} GPUs", remedy)
    for name, (major, minor) in gpus:
        # Code for a lower minor of the same major runs too; compute_XX is compiled when it is loaded.
        sass = [re.fullmatch(r"sm_(\d+)(\d)[a-z]?", str(arch)) for arch in archs]
        runs = any(each and int(each[1]) == major and int(each[2]) <= minor for each in sass)
        if not runs and not any(str(arch).startswith("compute_") for arch in archs):
            remedy = f"install a torch whose builds include sm_{major}{minor}"
            return Check(
                SECTION, "torch", "fail", f"{found} was built without code for {name} (sm_{major}{minor})", remedy
            )
    if len(gpus) < len(cards):
        remedy = "if that is not wanted: unset CUDA_VISIBLE_DEVICES"
        return Check(SECTION, "torch", "warn", f"{found} sees {len(gpus)} of {len(cards)} GPUs", remedy)
    return Check(SECTION, "torch", "ok", f"{found}, {len(gpus)} GPUs")


OPEN_FILES = 4096
SHM_BYTES = 1 << 30


def local() -> list[Check]:
    """What runs on this machine use: a loopback connection, open files, shared memory."""
    return [_loopback(), _open_files(), _shm()]


def _loopback() -> Check:
    """Ranks meet over TCP."""
    remedy = "bring up the interface lo, and let nothing filter it: ip link set lo up"
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), timeout=5), server.accept()[0]:
                return Check("local", "ranks meet", "ok", "a connection over 127.0.0.1")
    except OSError as error:
        return Check("local", "ranks meet", "fail", f"no connection over 127.0.0.1: {error.strerror or error}", remedy)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = hard if hard != resource.RLIM_INFINITY and hard < OPEN_FILES else OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        return Check(
            "local", "open files", "warn", f"at most {soft} a process", f"ulimit -n {least}, before you submit"
        )
    return Check("local", "open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"{soft} a process")


def _shm() -> Check:
    if not SHM.is_dir():
        return Check("local", "shared memory", "warn", f"there is no {SHM}", f"mount a tmpfs at {SHM}")
    free = shutil.disk_usage(SHM).free
    found = f"{free / (1 << 30):.1f} GiB free in {SHM}"
    if free < SHM_BYTES:
        remedy = "give a container more, as docker run --shm-size=8g: NCCL and the workers of DataLoaders use it"
        return Check("local", "shared memory", "warn", found, remedy)
    return Check("local", "shared memory", "ok", found)
