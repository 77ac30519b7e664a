"""What a bit-identical rerun needs to be the same, beside config and data: recorded, and held against a record."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Variables that change which kernels run, or in which order they add up.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
)
_PREFIXES = ("NCCL_", "TORCHINDUCTOR_", "TORCH_NCCL_")
# Of these nothing that is computed depends.
_HARMLESS = frozenset({"NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS", "TORCHINDUCTOR_CACHE_DIR"})


def record(layout: Mapping[str, int], device: torch.device, code: str = "") -> dict[str, Any]:
    """Versions, hardware, threads and switches of this process, as plain values for a checkpoint's state.

    ``layout``: number of ranks on every axis; ``code``: digest of the code snapshot. Reads files and asks the driver
    for names: nothing that waits.
    """
    found: dict[str, Any] = {
        "torch": str(torch.__version__),  # as plain text
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode() > 0,
        "float32 products": torch.get_float32_matmul_precision(),
        "layout": dict(layout),
        "code": code,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in _VARIABLES or (name.startswith(_PREFIXES) and name not in _HARMLESS)
        },
    }
    if device.type == "cuda":
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        found |= {
            "device": torch.cuda.get_device_name(device),
            "driver": _driver(),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "NCCL": ".".join(str(part) for part in nccl),
        }
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed from one record to another, in words: ``torch 2.12 -> 2.13``. Empty: nothing has."""
    found: list[str] = []
    for key in [*then, *(key for key in now if key not in then)]:
        before, after = then.get(key), now.get(key)
        if isinstance(before, Mapping) or isinstance(after, Mapping):
            found += differences(before or {}, after or {})
        elif before != after:
            found.append(f"{key} {_word(before)} -> {_word(after)}")
    return found


def note(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """One line for the log of a run that goes on, or None where nothing has changed."""
    changes = differences(then, now)
    if not changes:
        return None
    return f"note: not to be expected bit-identical to a run that was never stopped: {', '.join(changes)}"


def _word(value: object) -> str:
    return "unset" if value is None or value == "" else str(value)


def _cpu() -> str:
    """Model of the processor, as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in fields.items()}.get("model name", platform.machine())


def _driver() -> str | None:
    """Version of NVIDIA's kernel module."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:  # in a sandbox that hides it
        return None
