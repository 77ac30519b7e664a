"""How much of the hardware's arithmetic a run uses: model FLOPs utilisation (MFU)."""

from __future__ import annotations

import torch

from llm.estimate.flops import flops_per_token
from llm.utils.config import LORA_OFF, LoraConfig, ModelConfig, TrainConfig

# Dense TFLOP/s of one device, by a part of its name: in bfloat16, and in float32 without tensor cores. The first that
# fits counts. From the makers' data sheets.
_PEAKS = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("H200", 989.4, 66.9),
    ("GH200", 989.4, 66.9),
    ("H100 PCIe", 756.5, 51.2),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("L40S", 362.1, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("V100", None, 15.7),
)


def peak_flops(train: TrainConfig, device: torch.device) -> float | None:
    """FLOP/s of one device at most: as configured, else of a known device in the run's precision, else None.

    With float8 some products have one peak and some another: a share of either would say nothing, so there is none.
    """
    if train.peak_tflops is not None:
        return train.peak_tflops * 1e12
    if device.type != "cuda" or train.float8 != "off":
        return None
    name = torch.cuda.get_device_name(device)
    known = next(((half, single) for part, half, single in _PEAKS if part in name), None)
    if known is None:
        return None
    peak = known[0] if train.dtype == "bfloat16" else known[1]
    return None if peak is None else peak * 1e12


class Throughput:
    """What a run of ``world_size`` devices makes of them."""

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        world_size: int,
        device: torch.device,
        lora: LoraConfig = LORA_OFF,
    ) -> None:
        self._flops = flops_per_token(model, train.seq_len, lora)
        peak = peak_flops(train, device)
        self._peak = None if peak is None else peak * world_size

    def mfu(self, tokens_per_s: float) -> float | None:
        """Share of the peak, between 0 and 1; None where the peak is not known."""
        return None if self._peak is None else self._flops * tokens_per_s / self._peak


def gpu_memory(device: torch.device) -> dict[str, int] | None:
    """Bytes of the device that this process has ``allocated`` to tensors, has ``reserved``, and its ``peak`` of the
    first. Asks the allocator, not the device: nothing waits. None without a GPU."""
    if device.type != "cuda":
        return None
    stats = torch.cuda.memory_stats(device)
    return {
        "allocated": stats.get("allocated_bytes.all.current", 0),
        "reserved": stats.get("reserved_bytes.all.current", 0),
        "peak": stats.get("allocated_bytes.all.peak", 0),
    }
